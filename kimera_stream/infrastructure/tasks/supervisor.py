"""The supervisor: one task group, the services in it by name, their order, restarts and end.

A crash (anything that is not an ``OperationalError`` or an ``OSError``) is logged once with its traceback and counted; an
operational failure that a service lets through is logged as one line. Both lead to a restart within the budget. What says of
itself when it is worth another try (``UnavailableError`` with ``retry_after``: the database is away) and comes before the
service was ready is waited out instead, with the same backoff and no end: the process is not ready meanwhile, and another process
in its place would have to wait as well. A service whose budget is used up, that escalates or raises ``Unrecoverable``, sets
``fatal``: readiness goes off and the process is expected to end non-zero.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import anyio
import anyio.abc
import structlog

from kimera_stream.infrastructure.tasks.native import NativeTask, abort_task, current_native_task
from kimera_stream.infrastructure.tasks.service import Service, ServiceFailed, ServiceSpec, ServiceState, Unrecoverable
from kimera_stream.protocol.errors import OperationalError, UnavailableError

log = structlog.get_logger(__name__)

WAITS_TOLD_EVERY = 30.0
"""Seconds between two warnings of a service that waits."""


@dataclass(slots=True)
class StopReport:
    """How a stop went. ``aborted`` names what did not end by itself within its deadline."""

    stopped: list[str] = field(default_factory=list)
    undrained: list[str] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def clean(self) -> bool:
        return not self.aborted and not self.undrained


@dataclass(slots=True)
class _Waits:
    """Starts in a row that were waited out."""

    count: int = 0
    _told_at: float = float("-inf")

    def tell(self, now: float) -> bool:
        """One more; whether it is time for a warning."""
        self.count += 1
        due = now - self._told_at >= WAITS_TOLD_EVERY
        if due:
            self._told_at = now
        return due


class Supervisor:
    """Owns services. Use as an async context manager around the life of the process.

    Args:
        specs: The services; ``after`` must name others of them, without a cycle.
        stop_deadline: Seconds a stop may take in all.
        changed: Told of every change of a service's state or progress.
        crashed: Told of every failure (service name, error): metrics hang on it.
    """

    def __init__(
        self,
        specs: Iterable[ServiceSpec],
        *,
        stop_deadline: float = 10.0,
        changed: Callable[[Service], None] | None = None,
        crashed: Callable[[str, BaseException], None] | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._order = _start_order(list(specs))
        self._services = {spec.name: Service(spec) for spec in self._order}
        if changed is not None:
            for service in self._services.values():
                service.observe(changed)
        self._crashed = crashed or (lambda _name, _error: None)
        self._rng = rng or random.Random()  # noqa: S311 - jitter, not a secret
        self._stop_deadline = stop_deadline
        self._group: anyio.abc.TaskGroup | None = None
        self._native: dict[str, NativeTask] = {}
        self._aborted: set[str] = set()
        self._stopping = False
        self.fatal = anyio.Event()
        self.failure: ServiceFailed | None = None

    # -- life ------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._group = await anyio.create_task_group().__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        assert self._group is not None
        with anyio.CancelScope(shield=True):
            await self.stop()
        return await self._group.__aexit__(kind, error, traceback)

    def begin(self) -> None:
        """Start every service as soon as those it comes after are ready; returns at once."""
        assert self._group is not None, "enter the supervisor first"
        for spec in self._order:
            self._group.start_soon(self._own, self._services[spec.name], name=f"service:{spec.name}")

    async def ready(self) -> None:
        """Wait until every service is ready.

        Raises:
            ServiceFailed: one of them failed for good.
        """
        async with anyio.create_task_group() as group:

            async def watch_fatal() -> None:
                await self.fatal.wait()
                group.cancel_scope.cancel()

            group.start_soon(watch_fatal, name="supervisor:fatal-while-starting")
            for service in self._services.values():
                await service.became_ready.wait()
            group.cancel_scope.cancel()
        if self.failure is not None:
            raise self.failure

    async def stop(self, deadline: float | None = None) -> StopReport:
        """Stop all services, dependants first: drain, cancel, and abort what does not end. Always ends by the deadline."""
        report = StopReport()
        if self._stopping:
            return report
        self._stopping = True
        began = anyio.current_time()
        limit = began + (self._stop_deadline if deadline is None else deadline)
        for level in reversed(_levels(self._order)):
            async with anyio.create_task_group() as group:
                for spec in level:
                    group.start_soon(self._stop_one, self._services[spec.name], limit, report, name=f"stop:{spec.name}")
        report.seconds = anyio.current_time() - began
        if report.aborted:
            log.error("stop had to abort services", aborted=report.aborted, seconds=round(report.seconds, 3))
        return report

    async def cancel(self, name: str) -> StopReport:
        """Stop one service by name, for good; it is not restarted.

        Raises:
            KeyError: there is no such service.
        """
        service = self._services[name]
        report = StopReport()
        await self._stop_one(service, anyio.current_time() + service.spec.stop_deadline, report)
        return report

    # -- looking in ------------------------------------------------------------------------------------------------

    @property
    def services(self) -> Sequence[Service]:
        """In start order."""
        return [self._services[spec.name] for spec in self._order]

    @property
    def is_ready(self) -> bool:
        """Every service is ready (or ended as it should), none has failed, and no stop has begun."""
        return (
            not self._stopping
            and self.failure is None
            and all(
                service.state is ServiceState.READY
                or (service.state is ServiceState.ENDED and service.became_ready.is_set())
                for service in self._services.values()
            )
        )

    # -- one service -----------------------------------------------------------------------------------------------

    async def _own(self, service: Service) -> None:
        self._native[service.name] = current_native_task()
        try:
            with service.scope:
                for name in service.spec.after:
                    await self._services[name].became_ready.wait()
                await self._run_with_restarts(service)
            if service.scope.cancelled_caught:
                service.enter(ServiceState.STOPPED)
        except anyio.get_cancelled_exc_class():
            if service.name not in self._aborted:
                raise
            # The task group must not take our own abort for a cancellation of its host.
            service.enter(ServiceState.STOPPED)
        finally:
            self._native.pop(service.name, None)
            service.finished.set()

    async def _run_with_restarts(self, service: Service) -> None:
        spec, statistics, budget = service.spec, service.statistics, service.spec.budget.fresh()
        first_start = anyio.current_time()
        waits = _Waits()
        while True:
            statistics.starts += 1
            service.enter(ServiceState.STARTING)
            failure: Exception | None = None
            try:
                await spec.run(service)
            except Exception as error:  # noqa: BLE001 - the supervisor is where crashes end up: logged, counted, restarted
                failure = error
            finally:
                await service.clean_up()
            if statistics.ready_after is None and service.became_ready.is_set():
                statistics.ready_after = anyio.current_time() - first_start
            if service.state is ServiceState.READY:
                waits = _Waits()
            elif (
                spec.on_failure == "restart"
                and isinstance(failure, UnavailableError)
                and failure.retry_after is not None
            ):
                self._report(service, failure, quiet=not waits.tell(anyio.current_time()))
                service.enter(ServiceState.BACKING_OFF, f"waits: {failure.message}")
                await anyio.sleep(spec.backoff.delay(waits.count, self._rng))
                continue
            if failure is not None:
                self._report(service, failure)
            if failure is None and spec.on_end == "ignore":
                service.became_ready.set()
                service.enter(ServiceState.ENDED)
                return
            if isinstance(failure, Unrecoverable):
                self._fail(service, str(failure))
                return
            reason = repr(failure) if failure is not None else "it ended although it should run until stopped"
            if (spec.on_failure if failure is not None else spec.on_end) == "escalate":
                self._fail(service, reason)
                return
            if not budget.spend(anyio.current_time()):
                self._fail(
                    service, f"{budget.restarts} restarts within {budget.window:g} s were not enough; last: {reason}"
                )
                return
            service.enter(ServiceState.BACKING_OFF)
            await anyio.sleep(spec.backoff.delay(budget.spent, self._rng))

    def _report(self, service: Service, error: Exception, *, quiet: bool = False) -> None:
        service.statistics.last_error = repr(error)
        if isinstance(error, OperationalError | OSError | Unrecoverable):
            service.statistics.operational_failures += 1
            (log.debug if quiet else log.warning)("service failed", service=service.name, error=repr(error))
        else:
            service.statistics.crashes += 1
            log.error("service crashed", service=service.name, error=repr(error), exc_info=error)
        self._crashed(service.name, error)

    def _fail(self, service: Service, reason: str) -> None:
        service.enter(ServiceState.FAILED)
        if self.failure is None:
            self.failure = ServiceFailed(service.name, reason)
            log.critical("service failed for good", service=service.name, reason=reason)
        self.fatal.set()

    async def _stop_one(self, service: Service, limit: float, report: StopReport) -> None:
        spec = service.spec
        if service.name not in self._native:
            service.scope.cancel()
            return
        if spec.drain is not None and service.state is ServiceState.READY:
            with anyio.move_on_after(max(0.0, limit - anyio.current_time())) as scope:
                try:
                    await spec.drain()
                except Exception:  # a failing drain must not keep the rest from stopping
                    log.exception("drain failed", service=spec.name)
                    report.undrained.append(spec.name)
            if scope.cancelled_caught:
                report.undrained.append(spec.name)
        service.scope.cancel()
        grace = min(spec.stop_deadline, max(0.05, limit - anyio.current_time()))
        with anyio.move_on_after(grace):
            await service.finished.wait()
        if service.finished.is_set():
            report.stopped.append(spec.name)
            return
        report.aborted.append(spec.name)
        self._aborted.add(spec.name)
        abort_task(self._native[service.name])
        with anyio.move_on_after(0.5):
            await service.finished.wait()


def _start_order(specs: list[ServiceSpec]) -> list[ServiceSpec]:
    """Topological order, stable in the given order.

    Raises:
        ValueError: a name is double or unknown, or the order has a cycle (the path is named).
    """
    by_name: dict[str, ServiceSpec] = {}
    for spec in specs:
        if spec.name in by_name:
            raise ValueError(f"two services are named {spec.name}")
        by_name[spec.name] = spec
    order: list[ServiceSpec] = []
    done: set[str] = set()

    def visit(spec: ServiceSpec, path: tuple[str, ...]) -> None:
        if spec.name in path:
            raise ValueError(
                "services wait for each other: " + " -> ".join((*path[path.index(spec.name) :], spec.name))
            )
        if spec.name in done:
            return
        for name in spec.after:
            if name not in by_name:
                raise ValueError(f"service {spec.name} comes after {name}, which does not exist")
            visit(by_name[name], (*path, spec.name))
        done.add(spec.name)
        order.append(spec)

    for spec in specs:
        visit(spec, ())
    return order


def _levels(order: list[ServiceSpec]) -> list[list[ServiceSpec]]:
    """The order cut into levels: each comes after earlier levels only."""
    level_of: dict[str, int] = {}
    levels: list[list[ServiceSpec]] = []
    for spec in order:
        level = 1 + max((level_of[name] for name in spec.after), default=-1)
        level_of[spec.name] = level
        if level == len(levels):
            levels.append([])
        levels[level].append(spec)
    return levels
