"""The demo's feed: statements of several interleaved stories, with labels for what contradicts what.

A statement that contradicts earlier ones names *all* of them. A near-miss names the earlier statement that a careless
detector would hold against it. No other pair of the feed is a contradiction.
"""

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Literal, get_args

import msgspec

from kimera_stream.protocol.objects import GeoidBody, Scalar

ContradictionKind = Literal["negation", "antonym", "number", "date", "entity", "quantifier", "common_sense", "symbolic"]
NearMissKind = Literal[
    "other_entity",
    "other_time",
    "paraphrase",
    "more_specific",
    "double_negation",
    "unit_conversion",
    "additive",
    "superseded",
    "hypothetical",
    "hedged",
    "plan",
]
CONTRADICTION_KINDS: tuple[str, ...] = get_args(ContradictionKind)
NEAR_MISS_KINDS: tuple[str, ...] = get_args(NearMissKind)
Pair = frozenset[str]


class FeedItem(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One statement of the feed.

    Attributes:
        id: Unique in the feed.
        story: Which story it belongs to.
        source: Who says it.
        text: The statement; None for one that consists of symbols alone.
        symbolic_state: Its hard assertions.
        contradicts: Every earlier statement that cannot hold together with it.
        near_miss_of: An earlier statement that it only seems to contradict, or merely resembles.
        kind: Kind of the contradiction or of the near-miss.
    """

    id: str
    story: str
    source: str
    text: str | None = None
    symbolic_state: dict[str, Scalar] | None = None
    contradicts: list[str] = []
    near_miss_of: str | None = None
    kind: ContradictionKind | NearMissKind | None = None

    def body(self, run: str) -> GeoidBody:
        """What is published for it; ``run`` keeps the ids of several runs on one server apart."""
        return GeoidBody(
            id=f"{run}-{self.id}",
            text=self.text,
            symbolic_state=self.symbolic_state,
            originator_agent_id=self.source,
            session_id=f"{run}-{self.story.replace(' ', '-')}",
        )


@cache
def load_feed() -> tuple[FeedItem, ...]:
    """The whole feed in its order."""
    data = (files(__package__) / "feed.jsonl").read_bytes()
    return tuple(msgspec.json.decode(line, type=FeedItem) for line in data.splitlines() if line.strip())


def labelled_pairs(feed: Sequence[FeedItem]) -> dict[Pair, str]:
    """Kind of every pair that is a contradiction."""
    return {frozenset((item.id, other)): str(item.kind) for item in feed for other in item.contradicts}


def near_miss_pairs(feed: Sequence[FeedItem]) -> dict[Pair, str]:
    """Kind of every pair that is labelled not to be one."""
    return {frozenset((item.id, item.near_miss_of)): str(item.kind) for item in feed if item.near_miss_of is not None}
