"""Memory under a limit: told of before it is reached, caches let go, new work refused, and taken up again when there is room.

What counts is memory that only this process can give back: pages of mapped files, the float32 rows of the index among them, are
resident while nobody else needs their place, and the system takes them by itself.

    ok ──85 %──> alert: told, caches emptied ──95 %──> shedding: new statements refused ──below 90 %──> alert ──below 80 %──> ok
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge

from kimera_stream.protocol.errors import OverloadedError

ALERT = 0.85
SHED = 0.95
EASE = 0.05
"""How far below its threshold a state ends, as a share of the limit: it does not come and go with every request."""
RETRY_AFTER = 5.0

Pressure = Literal["ok", "alert", "shedding"]
LEVELS: tuple[Pressure, ...] = ("ok", "alert", "shedding")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Cache:
    """Something that may be emptied at any time, on the event loop's thread."""

    name: str
    read: Callable[[], int]
    clear: Callable[[], None] | None


class MemoryGuard:
    """How near the process is to its limit, and what follows from that. Belongs to the event loop's thread.

    Args:
        limit: Bytes; 0: none.
        registry: Where the metrics go.
    """

    def __init__(self, limit: int, registry: CollectorRegistry) -> None:
        self._limit = limit
        self._caches: list[Cache] = []
        self._counted = 0
        self._state: Pressure = "ok"
        Gauge("kimera_memory_limit_bytes", "Limit of memory; 0: none", registry=registry).set(limit)
        Gauge("kimera_memory_counted_bytes", "Memory that counts against it", registry=registry).set_function(
            lambda: self._counted
        )
        Gauge(
            "kimera_memory_pressure", "0: below the alert; 1: alert; 2: new work is refused", registry=registry
        ).set_function(lambda: LEVELS.index(self._state))
        self._refusals = Counter("kimera_memory_refusals_total", "Statements refused for memory", registry=registry)
        self._sizes = Gauge("kimera_cache_bytes", "Bytes held by each cache, estimated", ["cache"], registry=registry)

    @property
    def limit(self) -> int:
        return self._limit

    @property
    def counted(self) -> int:
        """Bytes at the newest look."""
        return self._counted

    @property
    def state(self) -> Pressure:
        return self._state

    @property
    def trouble(self) -> str:
        """What is wrong, in words for a person; empty if nothing is."""
        if self._state == "ok":
            return ""
        told = f"memory: {self._counted / self._limit:.0%} of the limit of {self._limit:,} bytes (KIMERA_PERFORMANCE__MAX_MEMORY)"
        return f"{told}; new statements are refused" if self._state == "shedding" else told

    # -- caches ------------------------------------------------------------------------------------------------------

    def watch_cache(self, name: str, read: Callable[[], int], clear: Callable[[], None] | None = None) -> None:
        """Report the bytes of a cache; one with ``clear`` is emptied when memory is short."""
        self._caches.append(Cache(name, read, clear))
        self._sizes.labels(name).set_function(read)

    @property
    def caches(self) -> dict[str, int]:
        """Bytes of each."""
        return {cache.name: cache.read() for cache in self._caches}

    def empty_caches(self) -> int:
        """Let go of what can be had again; returns how many bytes that was."""
        emptied = 0
        for cache in self._caches:
            if cache.clear is not None:
                emptied += cache.read()
                cache.clear()
        return emptied

    # -- the limit ---------------------------------------------------------------------------------------------------

    def observe(self, counted: int) -> bool:
        """Take a look at memory into account; whether caches should be emptied now."""
        self._counted = counted
        if not self._limit:
            return False
        before, share = self._state, counted / self._limit
        if share >= SHED or (before == "shedding" and share >= SHED - EASE):
            self._state = "shedding"
        elif share >= ALERT or (before != "ok" and share >= ALERT - EASE):
            self._state = "alert"
        else:
            self._state = "ok"
        if self._state != before:
            tell = log.info if self._state == "ok" else log.warning
            tell("memory", state=self._state, before=before, counted=counted, limit=self._limit)
        return self._state != "ok" and share >= ALERT

    def admit(self) -> None:
        """Refuse new work while memory is short.

        Raises:
            OverloadedError: it is.
        """
        if self._state == "shedding":
            self._refusals.inc()
            raise OverloadedError(
                f"memory: {self._counted} bytes in use, of at most {self._limit}; try again later",
                retry_after=RETRY_AFTER,
            )


_STATM = Path("/proc/self/statm")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def memory_in_use() -> tuple[int, int]:
    """Resident bytes of this process, and of them those that are no pages of files (Linux); its peak twice elsewhere."""
    try:
        fields = _STATM.read_bytes().split()
    except FileNotFoundError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return peak, peak
    resident, shared = int(fields[1]) * _PAGE, int(fields[2]) * _PAGE
    return resident, resident - shared
