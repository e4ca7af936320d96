"""The contradiction that the match of a watch names, where slices are other engines' and are scored later.

A statement that contradicts a watch contradicts what says the same as the watch. Who says that is asked of the database, and these
pairs are judged before the statement is committed: so the contradiction is there when the match is told, and in the same
transaction. To whoever owns the slice it is written already (``findings``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from kimera_stream.core.coverage import ClusterVault, LockedLog
from kimera_stream.core.geoid_cache import GeoidCache
from kimera_stream.core.interfaces import Judgement, StoredGeoid
from kimera_stream.engines.planning import Planner
from kimera_stream.engines.publishing import Item
from kimera_stream.engines.watches import WatchRegistry
from kimera_stream.protocol.objects import Contradiction, WatchMatch

MOST_SAYING = 8
"""Statements that say the same as a watch, of which the one contradicted most is named: the newest."""


@dataclass(slots=True)
class Matched:
    """A publish and the watches that it matches.

    Attributes:
        matches: (watch id, match).
        texts: By id of a watch that it contradicts, what the watch says.
        hits: What it contradicts of that which says the same, stored or earlier in the same group.
    """

    item: Item
    matches: list[tuple[str, WatchMatch]]
    texts: dict[str, str] = field(default_factory=dict)
    hits: list[tuple[StoredGeoid, Judgement]] = field(default_factory=list)


class Naming:
    """Looks, without the lock, for what matches may name."""

    def __init__(self, vault: ClusterVault, cache: GeoidCache, watches: WatchRegistry) -> None:
        self._vault = vault
        self._cache = cache
        self._watches = watches

    async def look(self, group: Sequence[Matched]) -> None:
        """Fill in ``texts`` and ``hits``. No id occurs twice in the group.

        Raises:
            UnavailableError: the vault or the encoder behind the engine cannot answer.
        """
        for each in group:
            asked = [(watch_id, match.watch) for watch_id, match in each.matches if match.kind == "contradicts"]
            texts = {watch_id: self._watches.text_of(watch_id, name) for watch_id, name in asked}
            each.texts = {watch_id: text for watch_id, text in texts.items() if text is not None}
        wanted = sorted({text for each in group for text in each.texts.values()})
        if not wanted:
            return
        stored = await self._saying(wanted)
        replaced = {each.item.stored.geoid.id for each in group}
        there = [other for other in stored.values() if other.geoid.id not in replaced]
        for each in group:
            if each.texts:
                said = set(each.texts.values())
                others = [other for other in there if other.geoid.text in said]
                each.hits = await self._watches.contradicted(each.item.stored, others)
            if each.item.stored.geoid.text in wanted:
                there.append(each.item.stored)

    async def _saying(self, wanted: Sequence[str]) -> Mapping[str, StoredGeoid]:
        """Some of what says these texts, by id. What others have said may be newer than what the cache keeps."""
        saying = await self._vault.saying(wanted, limit=MOST_SAYING)
        said = {id_: text for text, ids in saying.items() for id_ in ids}
        stored = dict(await self._cache.get_many(list(said)))
        outdated = [id_ for id_, each in stored.items() if each.geoid.text != said[id_]]
        for id_ in outdated:
            self._cache.forget(id_)
            del stored[id_]
        return {**stored, **await self._cache.get_many(outdated)} if outdated else stored


def outdated_hits(group: Sequence[Matched], locked: LockedLog) -> list[str]:
    """Ids of stored statements that were judged and state something else by now."""
    own = {each.item.stored.geoid.id for each in group}
    judged = {older.geoid.id: older for each in group for older, _ in each.hits if older.geoid.id not in own}
    marks = locked.marks(list(judged)) if judged else {}
    return [id_ for id_, older in judged.items() if (mark := marks.get(id_)) is None or mark.stated != older.stated]


def known_pairs(group: Sequence[Matched], locked: LockedLog) -> dict[frozenset[str], Contradiction]:
    """Open contradictions of statements that are being replaced, by pair."""
    updated = [each.item.stored.geoid.id for each in group if each.hits and each.item.previous is not None]
    found = locked.contradictions_of(updated, state="open") if updated else []
    return {frozenset((each.a, each.b)): each for each in found}


def write_matches(
    each: Matched,
    stored: StoredGeoid,
    written: Mapping[str, StoredGeoid],
    known: Mapping[frozenset[str], Contradiction],
    planner: Planner,
) -> None:
    """Write what was found, and the matches, which name it.

    Args:
        stored: The publish as it was written.
        written: What the group has written so far, by id.
        known: See ``known_pairs``.
    """
    found = [
        planner.found(
            written.get(older.geoid.id, older),
            stored,
            judgement,
            known.get(frozenset((older.geoid.id, stored.geoid.id))),
        )
        for older, judgement in each.hits
    ]
    for watch_id, match in each.matches:
        same = [one for one in found if match.kind == "contradicts" and one.a_text == each.texts.get(watch_id)]
        named = max(same, key=lambda one: one.score, default=None)
        told = msgspec.structs.replace(match, geoid=stored.geoid, contradiction=named)
        planner.entry("watch.matched", told, [f"watch:{watch_id}"])
