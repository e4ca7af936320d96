"""Planning of publishes: versions, detection, what is found, kept or dissolved, and the matches of watches."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from kimera_stream.core.geoid import built, merged, new_id, same_statement
from kimera_stream.core.geoid_cache import GeoidCache
from kimera_stream.core.interfaces import (
    ContradictionEngine,
    IdempotencyRecord,
    IndexRoom,
    Judgement,
    PublishResult,
    StoredGeoid,
    VaultService,
)
from kimera_stream.engines.planning import Planner
from kimera_stream.engines.watches import WatchRegistry
from kimera_stream.engines.work import PublishWork
from kimera_stream.protocol.errors import NotFoundError, OperationalError
from kimera_stream.protocol.messages import Published
from kimera_stream.protocol.objects import Contradiction

_encode = msgspec.json.Encoder().encode


@dataclass(slots=True)
class Item:
    """A publish on its way into the log.

    Attributes:
        stored: What will be stored; its offset is given when it is written.
        previous: The version that it replaces.
        changed: Whether it states something else than that.
        hits: What it contradicts.
    """

    work: PublishWork
    stored: StoredGeoid
    previous: StoredGeoid | None
    changed: bool
    hits: list[tuple[StoredGeoid, Judgement]]


async def read_items(
    works: Sequence[PublishWork],
    cache: GeoidCache,
    room: IndexRoom,
    outcomes: list[tuple[PublishWork, PublishResult | OperationalError]],
    *,
    now: int,
    head: int,
) -> list[Item]:
    """What the publishes make of what is stored; whoever is refused is among the ``outcomes``.

    Args:
        now: Unix ms.
        head: The newest committed offset.
    """
    ids = [work.body.id for work in works if work.body.id is not None]
    existing = await cache.get_many(ids) if ids else {}
    items: list[Item] = []
    for work in works:
        previous = existing.get(work.body.id) if work.body.id is not None else None
        if previous is None and work.must_exist:
            outcomes.append((work, NotFoundError(f"geoid {work.body.id} does not exist", field="id")))
            continue
        body, vector = work.body, work.vector
        if work.merge and previous is not None:
            if body.text is None and body.vector is None:
                vector = previous.vector
            body = merged(body, previous.geoid)
        geoid = built(
            body,
            geoid_id=body.id if body.id is not None else new_id(now),
            session_id=work.session_id,
            now=now,
            offset=head,
            previous=None if previous is None else previous.geoid,
        )
        stored = StoredGeoid(geoid, vector, work.principal.id, work.tokens, own_vector=work.body.vector is not None)
        refusal = room.refusal(stored)
        if refusal is not None:
            outcomes.append((work, refusal))
            continue
        changed = previous is None or not same_statement(stored, previous)
        if previous is not None and not changed:
            stored = replace(stored, stated=previous.stated or previous.geoid.offset)
        items.append(Item(work, stored, previous, changed, []))
    return items


class Publishing:
    """Plans a group of publishes in which every id occurs once."""

    def __init__(
        self, vault: VaultService, cache: GeoidCache, engine: ContradictionEngine, watches: WatchRegistry
    ) -> None:
        self._vault = vault
        self._cache = cache
        self._engine = engine
        self._watches = watches

    async def plan(
        self, works: Sequence[PublishWork], planner: Planner, room: IndexRoom
    ) -> list[tuple[PublishWork, PublishResult | OperationalError]]:
        """Write everything the publishes lead to into the planner's batch; returns each one's answer, to be given
        after the commit. What the index has no ``room`` for is refused before anything is written.

        Raises:
            UnavailableError: the vault or the encoder behind the engine cannot answer.
        """
        outcomes: list[tuple[PublishWork, PublishResult | OperationalError]] = []
        items = await read_items(works, self._cache, room, outcomes, now=planner.now, head=planner.head)
        changed = [item for item in items if item.changed]
        if changed:
            detected = await self._engine.look([item.stored for item in changed], hurried=planner.hurried)
            planner.unread += sum(detected.unread)
            for item, hits in zip(changed, detected.hits, strict=True):
                item.hits = hits
        known = await self._known(changed)
        await self._look_again(changed, known)
        await self._write(items, known, planner, outcomes)
        return outcomes

    async def _known(self, changed: Sequence[Item]) -> dict[frozenset[str], Contradiction]:
        """Open contradictions of the statements that are being replaced, by pair."""
        updated = [item.stored.geoid.id for item in changed if item.previous is not None]
        if not updated:
            return {}
        found = await self._vault.contradictions_of(updated, state="open")
        return {frozenset((each.a, each.b)): each for each in found}

    async def _look_again(self, changed: Sequence[Item], known: dict[frozenset[str], Contradiction]) -> None:
        """Judge the open contradictions of an updated statement that the scan did not bring: it ends at its top k, and what
        it passes over may hold all the same."""
        fresh = {item.stored.geoid.id for item in changed}
        pairs: list[tuple[StoredGeoid, StoredGeoid]] = []
        owners: list[Item] = []
        for item in changed:
            geoid_id = item.stored.geoid.id
            seen = {other.geoid.id for other, _ in item.hits}
            others = [other for pair in known if geoid_id in pair for other in pair - {geoid_id}]
            # Statements of the same batch are compared with each other without a scan.
            missing = [other for other in others if other not in seen and other not in fresh]
            loaded = await self._cache.get_many(missing) if missing else {}
            known_ones = [loaded[other] for other in missing if other in loaded]
            again = [other for other in known_ones if self._engine.comparable(other, item.stored)]
            pairs += [(other, item.stored) for other in again]
            owners += [item] * len(again)
        if not pairs:
            return
        for item, (older, _), judgement in zip(owners, pairs, await self._engine.judge_pairs(pairs), strict=True):
            if judgement.reported:
                item.hits.append((older, judgement))

    async def _write(
        self,
        items: Sequence[Item],
        known: dict[frozenset[str], Contradiction],
        planner: Planner,
        outcomes: list[tuple[PublishWork, PublishResult | OperationalError]],
    ) -> None:
        fresh = {item.stored.geoid.id: item for item in items}
        kept: set[frozenset[str]] = set()
        written: set[str] = set()
        for item in items:
            before = len(planner.batch.entries)
            item.stored = planner.geoid(item.stored)
            geoid_id = item.stored.geoid.id
            written.add(geoid_id)
            found: list[Contradiction] = []
            for other, judgement in item.hits:
                sibling = fresh.get(other.geoid.id)
                if sibling is not None and sibling.changed and other.geoid.version != sibling.stored.geoid.version:
                    continue  # the index still has the statement that this very batch replaces
                older = sibling.stored if sibling is not None and other.geoid.id in written else other
                pair = frozenset((older.geoid.id, geoid_id))
                kept.add(pair)
                found.append(planner.found(older, item.stored, judgement, known.get(pair)))
            if item.changed and item.previous is not None:
                await self._dissolve(item, known, kept, fresh, written, planner)
            result = PublishResult(item.stored.geoid, item.stored.geoid.offset, found, duplicate=False)
            await self._match_watches(item, found, planner)
            self._remember(item.work, result, planner)
            outcomes.append((item.work, result))
            assert len(planner.batch.entries) > before

    async def _dissolve(
        self,
        item: Item,
        known: dict[frozenset[str], Contradiction],
        kept: set[frozenset[str]],
        fresh: dict[str, Item],
        written: set[str],
        planner: Planner,
    ) -> None:
        geoid_id = item.stored.geoid.id
        for pair, contradiction in list(known.items()):
            if geoid_id not in pair or pair in kept:
                continue
            other_id = contradiction.b if contradiction.a == geoid_id else contradiction.a
            sibling = fresh.get(other_id)
            if sibling is not None and sibling.changed and other_id not in written:
                continue  # judged with the other one, which comes later in this batch
            other = sibling.stored if sibling is not None else await self._cache.get(other_id)
            planner.dissolved(contradiction, [item.stored.geoid] + ([other.geoid] if other is not None else []))
            del known[pair]

    async def _match_watches(self, item: Item, found: Sequence[Contradiction], planner: Planner) -> None:
        if not item.changed:
            return
        for watch_id, match in await self._watches.matches(item.stored, found):
            planner.entry("watch.matched", match, [f"watch:{watch_id}"])

    def _remember(self, work: PublishWork, result: PublishResult, planner: Planner) -> None:
        if work.kept is not None and work.kept.ref is not None:
            planner.batch.settled.append(work.kept.ref)
        if work.key is None:
            return
        published = Published(
            geoid=result.geoid, offset=result.offset, contradictions=result.contradictions, duplicate=False
        )
        planner.batch.idempotency.append(
            IdempotencyRecord(work.principal.id, work.key, _encode(published), planner.now)
        )
