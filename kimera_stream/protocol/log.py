"""The log entry: one thing that happened, in the one total order."""

from typing import Any, Literal

import msgspec

EventType = Literal[
    "geoid.created",
    "geoid.updated",
    "geoid.deleted",
    "contradiction.found",
    "contradiction.resolved",
    "contradiction.dissolved",
    "scar.formed",
    "scar.crystallized",
    "vault.rebalanced",
    "watch.matched",
]

CHANNEL_OF_TYPE: dict[str, str | None] = {
    "geoid": "geoids",
    "contradiction": "contradictions",
    "scar": "scars",
    "vault": "scars",
    "watch": None,
}
"""The main channel by the first word of an event type; ``watch.matched`` shows on its watch's channel alone."""

LATEST_CHANNELS = frozenset({"field", "stats"})
LOG_CHANNELS = frozenset({"geoids", "contradictions", "scars"})
ENTITY_CHANNEL_PREFIXES = ("geoid:", "session:", "agent:", "watch:")


class LogEntry(msgspec.Struct, frozen=True):
    """One committed entry.

    Attributes:
        offset: Position in the log, 1-based, without holes within an epoch.
        type: What happened.
        ts: When it was committed, unix ms.
        channels: Every channel the entry shows on; the main channel first where it has one.
        data: The public object as JSON bytes, encoded once at commit.
    """

    offset: int
    type: str
    ts: int
    channels: tuple[str, ...]
    data: msgspec.Raw

    def value(self) -> Any:
        """``data`` as builtins, decoded anew at each call: callers that need it often keep it."""
        return msgspec.json.decode(self.data)
