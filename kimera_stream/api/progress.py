"""How the start goes, for the person at the console: one line per service as it becomes ready, with its progress."""

import time
from types import TracebackType
from typing import IO, Self

from kimera_stream.infrastructure.tasks import Service, ServiceState

LEAST_INTERVAL = 0.5
"""Seconds between two lines of progress of one service."""


class StartProgress:
    """Prints what the start waits for. Used as the observer of the services' changes; silent once all are ready."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out
        self._began = time.monotonic()
        self._said: dict[str, tuple[str, float]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._out.flush()

    def __call__(self, service: Service) -> None:
        now = time.monotonic()
        if service.state is ServiceState.STARTING and service.detail:
            line = service.detail
        elif service.state is ServiceState.READY and service.statistics.starts == 1:
            line = "ready"
        elif service.state in (ServiceState.BACKING_OFF, ServiceState.FAILED):
            line = f"{service.state.value}: {service.statistics.last_error}"
        else:
            return
        last, at = self._said.get(service.name, ("", -LEAST_INTERVAL))
        if line == last or (service.state is ServiceState.STARTING and now - at < LEAST_INTERVAL):
            return
        self._said[service.name] = (line, now)
        print(f"  {now - self._began:5.1f} s  {service.name:<10} {line}", file=self._out, flush=True)
