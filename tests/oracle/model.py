"""What clients were promised, written down as they see it: what was asked and answered, what was heard, what the log says.

Nothing here knows how the server works. ``checks`` compares these records with each other.
"""

from array import array
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Any, Literal

import msgspec

Kind = Literal["publish", "delete", "resolve"]
Outcome = Literal["open", "acked", "refused", "unknown"]
"""open: no answer yet. refused: it must never show. unknown: it may show, once."""

SURE_REFUSALS = {"bad_request", "not_found", "conflict", "too_large", "limit_exceeded", "rate_limited", "overloaded"}
"""Codes after which nothing was done. After the others (``unavailable``, ``internal``) it may have been."""

_canonical = msgspec.json.Encoder(order="sorted").encode


def digest(value: Any) -> int:
    """64 bits of an object, the same for every encoding that it came in."""
    return int.from_bytes(blake2b(_canonical(value), digest_size=8).digest(), "little")


# -- what was asked ------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Op:
    """One thing that a publisher asks for, however often it has to.

    Attributes:
        mark: Its name, kept in the geoid's metadata: how it is recognised in the log.
        target: Id of the geoid, or of the contradiction to resolve; None: the server names the geoid.
        sent: (connection, number on that connection) of each time it was sent.
        offset, version, said: Of the first answer: log offset, geoid's version, digest of the geoid or scar.
        found: Contradictions in that answer: digest by offset.
        news, repeats: Answers that say that it is new, which one alone may, and answers after the first. Of copies that are under way
            together any may be answered first.
        codes: Errors that it was answered with.
    """

    mark: str
    kind: Kind
    session: str
    target: str | None = None
    body: dict[str, Any] = field(default_factory=dict)
    key: str | None = None
    sent: list[tuple[int, int]] = field(default_factory=list)
    outcome: Outcome = "open"
    offset: int = 0
    version: int = 0
    said: int = 0
    geoid_id: str | None = None
    found: dict[int, int] = field(default_factory=dict)
    news: int = 0
    repeats: int = 0
    codes: list[str] = field(default_factory=list)
    era: int = 0

    @property
    def retried(self) -> bool:
        return len(self.sent) > 1


class Ledger:
    """Every operation of every publisher. An era ends where a backup is restored: what came after it is then void."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.era = 0
        self.broken: list[str] = []
        """Promises broken in an answer itself."""

    def add(self, op: Op) -> Op:
        op.era = self.era
        self.ops.append(op)
        return op

    def published(self, op: Op, reply: dict[str, Any]) -> None:
        """An answer ``published`` to ``op``, the first or another one."""
        said = digest(reply["geoid"])
        found = {each["offset"]: digest(each) for each in reply["contradictions"]}
        op.news += not reply["duplicate"]
        if op.news > 1:
            self.broken.append(f"{op.mark}: answered as new once more at {reply['offset']}, sent at {op.sent}")
        if op.outcome == "acked":
            op.repeats += 1
            if (op.offset, op.said, op.found) != (reply["offset"], said, found):
                self.broken.append(
                    f"{op.mark}: a repeated key was answered with another result: offset {reply['offset']} after {op.offset}"
                )
            return
        if reply["duplicate"] and not op.retried:
            self.broken.append(f"{op.mark}: answered as a duplicate though it was sent once, at {op.sent}")
        if reply["duplicate"] and op.key is None:
            self.broken.append(f"{op.mark}: answered as a duplicate though it has no key")
        geoid = reply["geoid"]
        if op.target is not None and geoid["id"] != op.target:
            self.broken.append(f"{op.mark}: published {op.target}, answered with {geoid['id']}")
        if reply["offset"] != geoid["offset"]:
            self.broken.append(f"{op.mark}: the answer is at {reply['offset']}, its geoid at {geoid['offset']}")
        op.outcome, op.offset, op.version, op.said, op.found = "acked", reply["offset"], geoid["version"], said, found
        op.geoid_id = geoid["id"]

    def done(self, op: Op, offset: int, said: Any = None) -> None:
        """An answer ``deleted`` or ``resolved``."""
        if op.outcome == "acked":
            self.broken.append(
                f"{op.mark}: {op.kind} of {op.target} was acknowledged twice, at {op.offset} and {offset}"
            )
            return
        op.outcome, op.offset, op.said = "acked", offset, 0 if said is None else digest(said)

    def refused(self, op: Op, code: str) -> None:
        """An error. Whether it may be asked again is the publisher's to know."""
        op.codes.append(code)
        if op.outcome == "acked":
            if code in SURE_REFUSALS - {"rate_limited", "overloaded"} and op.kind == "publish":
                self.broken.append(f"{op.mark}: refused with {code} after it had been acknowledged")
            return
        if op.kind == "publish" and code in SURE_REFUSALS - {"rate_limited", "overloaded"}:
            self.broken.append(f"{op.mark}: a valid statement was refused with {code}")

    def count(self) -> Counter[str]:
        return Counter(op.outcome for op in self.ops)

    def restored(self, head: int) -> None:
        """A backup that ends at ``head`` was restored: of what is newer nothing may be there any more."""
        for op in self.ops:
            if op.era == self.era and op.outcome == "acked" and op.offset <= head:
                op.era = self.era + 1
        self.era += 1


# -- what the log says -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Entry:
    """One entry of the log as a reader of one of its channels got it."""

    offset: int
    type: str
    ts: int
    raw: bytes
    digest: int

    @property
    def data(self) -> dict[str, Any]:
        value: dict[str, Any] = msgspec.json.decode(self.raw)
        return value


def entry_of(event: dict[str, Any]) -> Entry:
    """The entry behind an event; what names the channel is left out."""
    raw = msgspec.json.encode(event["data"])
    return Entry(event["offset"], event["type"], event["ts"], raw, told(event))


def told(event: dict[str, Any]) -> int:
    """Digest of what an event tells, whatever the channel."""
    return digest([event["offset"], event["type"], event["ts"], event["data"]])


MAIN_CHANNELS = ("geoids", "contradictions", "scars")


@dataclass
class Log:
    """A whole log, read channel by channel.

    Attributes:
        channels: Entries of each channel that was read, in the order in which they came.
        listed: Live geoids by id: digest, from the list of geoids.
        open: Open contradictions by id: digest, from the list of open contradictions.
        closed: The same of those that are resolved or dissolved.
        scars: Scars by id: digest, from their list.
        keep: How many of the last entries are kept at least; None: all.
    """

    epoch: str
    head: int
    channels: dict[str, list[Entry]] = field(default_factory=dict)
    listed: dict[str, int] = field(default_factory=dict)
    open: dict[str, int] = field(default_factory=dict)
    closed: dict[str, int] = field(default_factory=dict)
    scars: dict[str, int] = field(default_factory=dict)
    keep: int | None = None

    @cached_property
    def entries(self) -> dict[int, Entry]:
        """All entries by offset, in order: of the channels of which each entry has one. The others show them once more."""
        owners = [name for name in self.channels if name in MAIN_CHANNELS or name.startswith("watch:")]
        found = {entry.offset: entry for name in owners for entry in self.channels[name]}
        return dict(sorted(found.items()))

    @cached_property
    def _offsets(self) -> dict[str, list[int]]:
        return {name: [entry.offset for entry in entries] for name, entries in self.channels.items()}

    def select(self, channel: str, after: int, upto: int) -> list[Entry]:
        """Entries of a channel in (after, upto]."""
        offsets = self._offsets[channel]
        return self.channels[channel][bisect_right(offsets, after) : bisect_right(offsets, upto)]

    def at(self, channel: str, offset: int) -> Entry | None:
        offsets = self._offsets[channel]
        place = bisect_left(offsets, offset)
        return self.channels[channel][place] if place < len(offsets) and offsets[place] == offset else None


# -- what was heard --------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Segment:
    """What one subscription heard.

    Attributes:
        asked: Position asked for; None: to begin with what comes next.
        start: Position that the server said it begins after.
        allowed: Starts that may be meant by a durable cursor: the offsets acknowledged under its name and not yet overtaken.
        beaten: Up to where a heartbeat said that nothing is missing.
    """

    epoch: str
    start: int
    asked: tuple[str, int] | None = None
    recovered: bool = False
    was_recovering: bool = False
    allowed: frozenset[int] | None = None
    offsets: "array[int]" = field(default_factory=lambda: array("Q"))
    digests: "array[int]" = field(default_factory=lambda: array("Q"))
    beaten: int = 0

    @property
    def last(self) -> int:
        """Where to go on."""
        return max(self.offsets[-1] if self.offsets else self.start, self.beaten)

    def hear(self, event: dict[str, Any]) -> None:
        self.offsets.append(event["offset"])
        self.digests.append(told(event))


Predicate = Callable[[Entry], bool]


@dataclass
class Heard:
    """Everything that one subscriber heard, subscription after subscription.

    Attributes:
        wanted: What its filter lets through, as we understand the filter; None: everything.
        skips: It does not always go on where it was, on purpose.
        until: Offset up to which it has to have heard everything in the end; by epoch.
    """

    name: str
    channel: str
    wanted: Predicate | None = None
    skips: bool = False
    segments: list[Segment] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    until: dict[str, int] = field(default_factory=dict)

    @property
    def events(self) -> int:
        return sum(len(segment.offsets) for segment in self.segments)

    @property
    def told_of_trimming(self) -> int:
        """Subscriptions that were told that not everything since their position is kept."""
        return sum(
            not each.recovered and (bool(each.allowed) or (each.asked is not None and each.asked[0] == each.epoch))
            for each in self.segments
        )

    @property
    def resumes(self) -> int:
        return sum(segment.recovered for segment in self.segments)


def by_type(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Entries by the first word of their type."""
    found: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        found[entry.type.partition(".")[0]].append(entry)
    return found
