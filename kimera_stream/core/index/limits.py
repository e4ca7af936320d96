"""How much the index may hold, and what is told when it holds that much."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import structlog

from kimera_stream.core.index.values import ENTRY_BYTES, INLINE_BYTES
from kimera_stream.core.interfaces import StoredGeoid
from kimera_stream.protocol.errors import LimitExceededError
from kimera_stream.protocol.objects import Scalar

ID_BYTES = 49 + 42 + 32 + 8
"""Per id besides its characters: the string's head, its dictionary entry, the slot's integer, the list entry."""
_NEAR = 16 << 20
"""Bytes from the bound at which every geoid is measured: larger than any of them."""
_WORDS_BESIDES = 5
"""Of a record, besides its keys and values: head, subject, moment, window."""

log = structlog.get_logger(__name__)


def most_state_bytes(symbols: Mapping[str, Scalar], layers: Collection[str]) -> int:
    """Bytes that the record of a geoid's states takes at most, with the values that are kept for it."""
    if not symbols and not layers:
        return 0
    kept = sum(
        ENTRY_BYTES + len(str(value))
        for value in symbols.values()
        if not isinstance(value, bool | float | None) and len(str(value)) > INLINE_BYTES
    )
    return 8 * (_WORDS_BESIDES + 2 * len(symbols) + len(layers)) + kept


@dataclass(slots=True)
class Limits:
    """Bounds of the index and how often they were met.

    Attributes:
        geoids: Live ones at most.
        bytes: Of live geoids at most; 0: as many as those geoids take.
        policy: What happens to one more.
    """

    geoids: int
    bytes: int
    policy: Literal["refuse", "evict_oldest"]
    evicted: int = 0
    refused: int = 0
    short: int = 0
    """Bytes of the last geoid that there was no room for; 0 once there was for one."""
    _told: bool = field(default=False, repr=False)

    def lack(self, geoids: int, bytes: int) -> str | None:
        """Why an index of that many does not fit, in words for whoever sent the last one; None where it does."""
        if geoids > self.geoids:
            what, setting = f"{self.geoids:,} geoids", "MAX_GEOIDS"
        elif self.bytes and bytes > self.bytes:
            what, setting = f"{self.bytes:,} bytes", "MAX_INDEX_BYTES"
        else:
            return None
        return (
            f"the index is full ({what}, KIMERA_PERFORMANCE__{setting}); "
            "delete some, raise the limit, or set KIMERA_PERFORMANCE__INDEX_FULL=evict_oldest"
        )

    def may_lack(self, geoids: int, bytes: int) -> bool:
        """Whether an index of that many is near enough to a bound to look closely before another one is put."""
        return geoids >= self.geoids or (self.bytes > 0 and bytes > self.bytes - _NEAR)

    def met(self, geoids: int, bytes: int, growth: int) -> None:
        """A geoid of ``growth`` bytes did not fit: say once that the index is full."""
        self.short = growth
        if not self._told:
            self._told = True
            log.warning("index full", policy=self.policy, geoids=geoids, bytes=bytes)

    def eased(self) -> None:
        """There is room again."""
        self._told, self.short = False, 0


class Measured(Protocol):
    """What an index says of its size."""

    @property
    def size(self) -> int: ...

    @property
    def live_bytes(self) -> int: ...

    def growth(self, stored: StoredGeoid) -> tuple[int, int]: ...

    def most_bytes(self, stored: StoredGeoid) -> int: ...


class Room:
    """What is left in an index for a group of geoids that is put later: asked for each of them in turn."""

    def __init__(self, limits: Limits, index: Measured) -> None:
        self._limits = limits
        self._index = index
        self._geoids = index.size
        self._bytes = index.live_bytes

    def refusal(self, stored: StoredGeoid) -> LimitExceededError | None:
        """Why it has no room; None keeps it for this one. Where the oldest are evicted, only what never fits has none."""
        limits = self._limits
        geoids, growth = self._index.growth(stored)
        if limits.policy == "evict_oldest":
            lack = limits.lack(1, self._index.most_bytes(stored))
        else:
            lack = limits.lack(self._geoids + geoids, self._bytes + growth)
        if lack is not None:
            limits.refused += 1
            limits.met(self._geoids, self._bytes, growth)
            return LimitExceededError(lack)
        self._geoids += geoids
        self._bytes += growth
        return None
