"""Planning: work in, one write batch out. Offsets are given here, in the order in which everything will be read for ever."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec.structs import replace

from kimera_stream.core.geoid import new_id
from kimera_stream.core.interfaces import Judgement, StoredGeoid, WriteBatch
from kimera_stream.engines.thermodynamics import advice, pulse_strength
from kimera_stream.protocol.log import CHANNEL_OF_TYPE, LogEntry
from kimera_stream.protocol.objects import Contradiction, Geoid

_encode = msgspec.json.Encoder().encode


def geoid_channels(*geoids: Geoid) -> list[str]:
    """Channels of the entities behind ``geoids``: each geoid's own, its session's, its agent's, each once."""
    names: dict[str, None] = {}
    for geoid in geoids:
        names[f"geoid:{geoid.id}"] = None
    for geoid in geoids:
        if geoid.session_id is not None:
            names[f"session:{geoid.session_id}"] = None
        if geoid.originator_agent_id is not None:
            names[f"agent:{geoid.originator_agent_id}"] = None
    return list(names)


@dataclass(slots=True)
class LateNumbers:
    """What the verifier's later word comes to."""

    read: int = 0
    confirmed: int = 0
    dissolved: int = 0
    found: int = 0


@dataclass(slots=True)
class Planner:
    """Builds one write batch.

    Attributes:
        head: The newest committed offset; the first entry gets the next.
        now: Unix ms of everything in the batch.
        sure: Score at which a clash counts as sure, for the advice.
        hurried: The verifier has fallen behind and is left out.
        unread: Statements in the batch whose texts it has not read.
        late: What its later word in the batch comes to; counted once the batch is committed.
    """

    head: int
    now: int
    sure: float
    hurried: bool = False
    unread: int = 0
    late: LateNumbers = field(default_factory=LateNumbers)
    batch: WriteBatch = field(default_factory=WriteBatch)

    @property
    def next_offset(self) -> int:
        return self.head + len(self.batch.entries) + 1

    def entry(self, type: str, data: Any, channels: Iterable[str]) -> int:
        """Append a log entry; returns its offset, which ``data`` must carry already."""
        offset = self.next_offset
        main = CHANNEL_OF_TYPE[type.partition(".")[0]]
        names = (main, *channels) if main is not None else tuple(channels)
        self.batch.entries.append(LogEntry(offset, type, self.now, names, msgspec.Raw(_encode(data))))
        return offset

    def geoid(self, stored: StoredGeoid) -> StoredGeoid:
        """Write a new version of a geoid; returns it with its offset."""
        geoid = replace(stored.geoid, offset=self.next_offset, vector=None)
        self.entry("geoid.created" if geoid.version == 1 else "geoid.updated", geoid, geoid_channels(geoid))
        stated = stored.stated or geoid.offset
        written = StoredGeoid(geoid, stored.vector, stored.principal, stored.tokens, stated, stored.own_vector)
        self.batch.geoids.append(written)
        return written

    def found(
        self, older: StoredGeoid, newer: StoredGeoid, judgement: Judgement, known: Contradiction | None
    ) -> Contradiction:
        """Write a contradiction; ``known``: the open one of the same pair, which this is a newer version of."""
        a, b, score = older.geoid, newer.geoid, judgement.score
        contradiction = Contradiction(
            id=known.id if known is not None else new_id(self.now),
            a=a.id,
            b=b.id,
            a_text=a.text,
            b_text=b.text,
            score=score,
            components=judgement.result.components,
            why=judgement.result.why,
            gradient_type=judgement.gradient_type,
            pulse_strength=pulse_strength(score, judgement.result.components.relatedness),
            decision=advice(a.semantic_state, b.semantic_state, score, sure=self.sure),
            state="open",
            model=judgement.model,
            detected_at=self.now,
            offset=self.next_offset,
            version=1 if known is None else known.version + 1,
            provisional=judgement.provisional,
        )
        self.entry("contradiction.found", contradiction, geoid_channels(a, b))
        self.batch.contradictions.append(contradiction)
        return contradiction

    def dissolved(self, contradiction: Contradiction, geoids: Sequence[Geoid]) -> Contradiction:
        """Write that a contradiction no longer holds. ``geoids``: those of its two that are at hand."""
        over = replace(contradiction, state="dissolved", offset=self.next_offset)
        self.entry("contradiction.dissolved", over, _pair_channels(contradiction, geoids))
        self.batch.contradictions.append(over)
        return over

    def deleted(self, geoid: Geoid) -> int:
        """Write that a geoid is gone; the entry carries its last version."""
        last = replace(geoid, offset=self.next_offset, updated_at=self.now)
        offset = self.entry("geoid.deleted", last, geoid_channels(geoid))
        self.batch.deleted.append((geoid.id, offset))
        return offset


def _pair_channels(contradiction: Contradiction, geoids: Sequence[Geoid]) -> list[str]:
    names = geoid_channels(*geoids)
    return [*names, *(name for name in (f"geoid:{contradiction.a}", f"geoid:{contradiction.b}") if name not in names)]
