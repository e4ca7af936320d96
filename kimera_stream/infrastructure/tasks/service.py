"""A supervised service: what it is (spec), how it stands (state) and what its code may ask of its owner."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum

import anyio
import structlog

from kimera_stream.infrastructure.tasks.policy import Backoff, Budget, OnEnd, OnFailure
from kimera_stream.protocol.errors import KimeraError

log = structlog.get_logger(__name__)

Cleanup = Callable[[], Awaitable[None]]


class ServiceFailed(KimeraError):  # noqa: N818 - reads as the event it reports
    """A service may not be restarted any more; the process has to end."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"service {name} failed for good: {reason}")
        self.name = name
        self.reason = reason


class Unrecoverable(KimeraError):  # noqa: N818 - says what a failure is
    """Raised by a service that another start would not help: it is not restarted, and the process ends with this message."""


class ServiceState(Enum):
    WAITING = "waiting"  # for the services it comes after
    STARTING = "starting"
    READY = "ready"
    BACKING_OFF = "backing off"
    ENDED = "ended"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """How one service runs.

    Attributes:
        name: Unique within a supervisor.
        run: Its code: sets up, calls ``service.ready()``, works until cancelled. Called again at each restart.
        after: Names of services that must be ready first.
        on_failure: What an exception out of ``run`` leads to.
        on_end: What a clean return of ``run`` leads to.
        drain: Awaited before cancelling at a stop: finish what was accepted. Bounded by the stop's deadline.
        stop_deadline: Seconds that ``run`` may take to end once cancelled, before it is aborted.
    """

    name: str
    run: Callable[["Service"], Awaitable[None]]
    after: tuple[str, ...] = ()
    on_failure: OnFailure = "restart"
    on_end: OnEnd = "escalate"
    backoff: Backoff = field(default_factory=Backoff)
    budget: Budget = field(default_factory=Budget)
    drain: Cleanup | None = None
    stop_deadline: float = 5.0


@dataclass(slots=True)
class ServiceStatistics:
    """Counted since the supervisor began. ``ready_after`` in seconds from the first start."""

    starts: int = 0
    crashes: int = 0
    operational_failures: int = 0
    last_error: str | None = None
    ready_after: float | None = None


class Service:
    """One service at run time: the face its code sees."""

    CLEANUP_DEADLINE = 5.0

    def __init__(self, spec: ServiceSpec) -> None:
        self.spec = spec
        self.state = ServiceState.WAITING
        self.detail = ""
        self.statistics = ServiceStatistics()
        self.became_ready = anyio.Event()
        self.finished = anyio.Event()
        self.scope = anyio.CancelScope()
        self._cleanups: list[tuple[str, Cleanup]] = []
        self._changed: Callable[[Service], None] = lambda _: None

    @property
    def name(self) -> str:
        return self.spec.name

    def ready(self) -> None:
        """Say that the service does its job now; those that come after it may start."""
        self.became_ready.set()
        self.enter(ServiceState.READY)

    def progress(self, detail: str) -> None:
        """Say how far the start has come, in words for a person (``120,000 of 500,000 geoids``)."""
        self.detail = detail
        self._changed(self)

    def on_cleanup(self, what: str, callback: Cleanup) -> None:
        """Run ``callback`` when this run of the service ends, however it ends; last registered first."""
        self._cleanups.append((what, callback))

    def observe(self, changed: Callable[["Service"], None]) -> None:
        """Be told of every change of state or progress."""
        self._changed = changed

    def enter(self, state: ServiceState, detail: str = "") -> None:
        """Used by the supervisor: move to ``state``. A start keeps the detail of what came before it until it has its own: what
        is waited for is told while it is tried, too."""
        self.state = state
        if state is not ServiceState.STARTING:
            self.detail = detail
        self._changed(self)

    async def clean_up(self) -> None:
        """Used by the supervisor: run the callbacks, each shielded and under a deadline; failures are logged, all run."""
        while self._cleanups:
            what, callback = self._cleanups.pop()
            with anyio.move_on_after(self.CLEANUP_DEADLINE, shield=True) as scope:
                try:
                    await callback()
                except Exception:  # one failing cleanup must not keep the others from running
                    log.exception("cleanup failed", service=self.name, cleanup=what)
            if scope.cancelled_caught:
                log.error("cleanup aborted", service=self.name, cleanup=what, deadline=self.CLEANUP_DEADLINE)
