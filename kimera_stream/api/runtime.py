"""The running application: its supervisor, its readiness, and how it comes up and goes down."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import structlog

from kimera_stream.infrastructure.tasks import Service, ServiceFailed, ServiceSpec, ServiceState, StopReport, Supervisor

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Readiness:
    """What /readyz says: ``ready``, and per service its state and progress in words."""

    ready: bool
    draining: bool
    services: dict[str, str]


class Runtime:
    """The services of one server process.

    The lifespan enters the supervisor (the root task group) and returns at once: the server answers /livez and /readyz
    while the services load. ``drain`` stops the work in the promised order; the lifespan's end stops the services.

    Args:
        specs: Services for the supervisor.
        drains: Awaited in order by ``drain``: first what takes work in, last what sends it out.
        shutdown_deadline: Seconds for draining and stopping together.
        crashed: Told of every failure of a service.
    """

    def __init__(
        self,
        specs: Sequence[ServiceSpec],
        *,
        drains: Sequence[tuple[str, Callable[[float], Any]]],
        shutdown_deadline: float,
        crashed: Callable[[str, BaseException], None],
    ) -> None:
        self._observers: list[Callable[[Service], None]] = []
        self.supervisor = Supervisor(specs, stop_deadline=shutdown_deadline, changed=self._changed, crashed=crashed)
        self._drains = drains
        self._deadline = shutdown_deadline
        self._began = anyio.Event()
        self.draining = False
        self._stop_by: float | None = None
        self.stop_report: StopReport | None = None

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """The life of the services, around the life of the server."""
        async with self.supervisor:
            self.supervisor.begin()
            self._began.set()
            try:
                yield
            finally:
                with anyio.CancelScope(shield=True):
                    await self.drain()
                    assert self._stop_by is not None
                    self.stop_report = await self.supervisor.stop(max(1.0, self._stop_by - anyio.current_time()))

    async def drain(self) -> None:
        """Refuse new work, finish what was accepted, close the subscribers; bounded by half of the shutdown deadline."""
        if self.draining:
            return
        self.draining = True
        self._stop_by = anyio.current_time() + self._deadline
        if not self.supervisor.is_ready:
            return
        for name, drain in self._drains:
            budget = max(0.1, (self._stop_by - anyio.current_time()) / 2)
            with anyio.move_on_after(budget) as scope:
                await drain(budget)
            if scope.cancelled_caught:
                log.warning("drain cut short", part=name, seconds=round(budget, 3))

    async def ready(self) -> None:
        """Wait until every service is ready.

        Raises:
            ServiceFailed: one failed for good.
        """
        await self._began.wait()
        await self.supervisor.ready()

    async def failed(self) -> ServiceFailed:
        """Wait until a service fails for good; returns why. Waits forever in a process that works."""
        await self.supervisor.fatal.wait()
        assert self.supervisor.failure is not None
        return self.supervisor.failure

    def readiness(self) -> Readiness:
        return Readiness(
            ready=self.supervisor.is_ready and not self.draining,
            draining=self.draining,
            services={
                service.name: f"{service.state.value}: {service.detail}" if service.detail else service.state.value
                for service in self.supervisor.services
            },
        )

    def running(self) -> list[str]:
        """Names of the services that have not ended."""
        over = {ServiceState.ENDED, ServiceState.STOPPED, ServiceState.FAILED}
        return [service.name for service in self.supervisor.services if service.state not in over]

    def observe(self, observer: Callable[[Service], None]) -> None:
        """Tell ``observer`` of every change of a service's state or progress."""
        self._observers.append(observer)

    def _changed(self, service: Service) -> None:
        for observer in self._observers:
            observer(service)
