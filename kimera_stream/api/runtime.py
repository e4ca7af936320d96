"""The running application: its supervisor, its readiness, and how it comes up and goes down."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio
import structlog

from kimera_stream.infrastructure.container import Container
from kimera_stream.infrastructure.settings import Settings
from kimera_stream.infrastructure.tasks import Service, ServiceFailed, ServiceSpec, ServiceState, StopReport, Supervisor
from kimera_stream.infrastructure.telemetry import Metrics, Tracing

if TYPE_CHECKING:
    from kimera_stream.api.services import Parts

Drain = tuple[str, Callable[[float], Awaitable[object]]]
Plan = Callable[["Runtime"], "tuple[Parts, list[ServiceSpec], list[Drain]]"]

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
        settings: Checked settings.
        container: Built, its ground started; closed at the end of the lifespan.
        plan: Given the runtime, makes the parts, the services and what a stop drains, in order: first what takes work in,
            last what sends it out.
    """

    def __init__(self, settings: Settings, container: Container, plan: Plan) -> None:
        self.settings = settings
        self.tracing = container.get(Tracing)
        self._container = container
        self._observers: list[Callable[[Service], None]] = []
        self._deadline = settings.api.shutdown_deadline
        self._began = anyio.Event()
        self.draining = False
        self._draining = anyio.CancelScope()
        self._stop_by: float | None = None
        self.stop_report: StopReport | None = None
        self.parts, specs, self._drains = plan(self)
        self.supervisor = Supervisor(
            specs,
            stop_deadline=self._deadline,
            changed=self._changed,
            crashed=container.get(Metrics).service_failed,
        )

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """The life of the services, around the life of the server."""
        async with self._container, self.supervisor:
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
        """Refuse new work, finish what was accepted, close the subscribers. Each part may take half of what is left of the
        shutdown deadline, so that something is left for the services' end."""
        if self.draining:
            return
        self.draining = True
        if self._stop_by is None:  # else a second signal came already, and asked for less
            self._stop_by = anyio.current_time() + self._deadline
        with self._draining:
            for name, drain in self._drains:
                budget = max(0.1, (self._stop_by - anyio.current_time()) / 2)
                with anyio.move_on_after(budget) as scope:
                    try:
                        await drain(budget)
                    except Exception:  # a failing drain must not keep the rest from stopping
                        log.exception("drain failed", part=name)
                if scope.cancelled_caught:
                    log.warning("drain cut short", part=name, seconds=round(budget, 3))

    def hurry(self) -> None:
        """Give up what a stop still waits for; the services end at once."""
        self._draining.cancel()
        self._stop_by = anyio.current_time()

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
