"""Planning of deletes and resolutions."""

from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from kimera_stream.core.geoid import new_id
from kimera_stream.core.geoid_cache import GeoidCache
from kimera_stream.core.interfaces import VaultService
from kimera_stream.engines import thermodynamics
from kimera_stream.engines.planning import Planner, geoid_channels
from kimera_stream.engines.work import DeleteWork, ResolveWork
from kimera_stream.protocol.errors import ConflictError, NotFoundError, OperationalError
from kimera_stream.protocol.objects import Contradiction, Geoid, Scar


class Removals:
    """Plans what takes something away: statements, and contradictions that are settled."""

    def __init__(self, vault: VaultService, cache: GeoidCache) -> None:
        self._vault = vault
        self._cache = cache

    async def delete(
        self, works: Sequence[DeleteWork], planner: Planner
    ) -> list[tuple[DeleteWork, int | OperationalError]]:
        """Delete geoids, each id once in ``works``; their open contradictions are dissolved."""
        existing = await self._cache.get_many([work.geoid_id for work in works])
        gone = [geoid_id for geoid_id in (work.geoid_id for work in works) if geoid_id in existing]
        open_ones = await self._vault.contradictions_of(gone, state="open") if gone else []
        return write_deletes(works, planner, open_ones, await self._geoids(open_ones, gone))

    async def resolve(
        self, works: Sequence[ResolveWork], planner: Planner
    ) -> list[tuple[ResolveWork, tuple[Scar, int] | OperationalError]]:
        """Resolve contradictions, each id once in ``works``: state, scar and its vault."""
        weights = await self._vault.scar_weights()
        found: dict[str, Contradiction] = {}
        for work in works:
            contradiction = await self._vault.contradiction(work.contradiction_id)
            if contradiction is not None:
                found[contradiction.id] = contradiction
        return write_resolves(works, planner, found, await self._geoids(list(found.values())), weights)

    async def _geoids(self, contradictions: Sequence[Contradiction], besides: Sequence[str] = ()) -> dict[str, Geoid]:
        stored = await self._cache.get_many([*besides, *parties(contradictions)])
        return {geoid_id: each.geoid for geoid_id, each in stored.items()}


def parties(contradictions: Sequence[Contradiction]) -> list[str]:
    """Ids of the geoids that take part."""
    return [geoid_id for each in contradictions for geoid_id in (each.a, each.b)]


def write_deletes(
    works: Sequence[DeleteWork],
    planner: Planner,
    open_ones: Sequence[Contradiction],
    geoids: Mapping[str, Geoid],
) -> list[tuple[DeleteWork, int | OperationalError]]:
    """Write deletions into the planner's batch, each id once in ``works``.

    Args:
        open_ones: Open contradictions of the geoids that go.
        geoids: These, and those that they contradict, as far as they exist.
    """
    outcomes: list[tuple[DeleteWork, int | OperationalError]] = []
    dissolved: set[str] = set()
    for work in works:
        geoid = geoids.get(work.geoid_id)
        if geoid is None:
            outcomes.append((work, NotFoundError(f"geoid {work.geoid_id} does not exist", field="geoid_id")))
            continue
        offset = planner.deleted(geoid)
        for contradiction in open_ones:
            if work.geoid_id in (contradiction.a, contradiction.b) and contradiction.id not in dissolved:
                dissolved.add(contradiction.id)
                planner.dissolved(contradiction, _pair(contradiction, geoids))
        planner.batch.audit.append((planner.now, work.principal.id, "delete", work.geoid_id))
        outcomes.append((work, offset))
    return outcomes


def write_resolves(
    works: Sequence[ResolveWork],
    planner: Planner,
    contradictions: Mapping[str, Contradiction],
    geoids: Mapping[str, Geoid],
    weights: tuple[float, float],
) -> list[tuple[ResolveWork, tuple[Scar, int] | OperationalError]]:
    """Write resolutions into the planner's batch, each id once in ``works``.

    Args:
        contradictions: By id, as far as they exist.
        geoids: Their geoids, as far as they exist.
        weights: Of the two vaults.
    """
    outcomes: list[tuple[ResolveWork, tuple[Scar, int] | OperationalError]] = []
    heavy = list(weights)
    for work in works:
        contradiction = contradictions.get(work.contradiction_id)
        if contradiction is None:
            message = f"contradiction {work.contradiction_id} does not exist"
            outcomes.append((work, NotFoundError(message, field="contradiction_id")))
            continue
        if contradiction.state != "open":
            message = f"contradiction {contradiction.id} is {contradiction.state}; only an open one can be resolved"
            outcomes.append((work, ConflictError(message, field="contradiction_id")))
            continue
        pair = _pair(contradiction, geoids)
        states = {geoid.id: geoid.semantic_state for geoid in pair}
        heat = thermodynamics.scar(
            states.get(contradiction.a, {}), states.get(contradiction.b, {}), contradiction.score, work.decision
        )
        resolved = replace(contradiction, state="resolved", offset=planner.next_offset)
        channels = geoid_channels(*pair)
        channels += [f"geoid:{each}" for each in (contradiction.a, contradiction.b) if f"geoid:{each}" not in channels]
        planner.entry("contradiction.resolved", resolved, channels)
        planner.batch.contradictions.append(resolved)
        lighter = 0 if heavy[0] <= heavy[1] else 1
        heavy[lighter] += heat.weight
        scar = Scar(
            id=new_id(planner.now),
            contradiction_id=contradiction.id,
            geoids=(contradiction.a, contradiction.b),
            decision=work.decision,
            reason=work.reason,
            resolved_by=work.principal.id,
            vault="b" if lighter else "a",
            pre_entropy=heat.pre_entropy,
            post_entropy=heat.post_entropy,
            delta_entropy=heat.delta_entropy,
            weight=heat.weight,
            created_at=planner.now,
            offset=planner.next_offset,
        )
        offset = planner.entry("scar.formed", scar, channels)
        planner.batch.scars.append(scar)
        planner.batch.audit.append((planner.now, work.principal.id, f"resolve:{work.decision}", contradiction.id))
        outcomes.append((work, (scar, offset)))
    return outcomes


def _pair(contradiction: Contradiction, geoids: Mapping[str, Geoid]) -> list[Geoid]:
    return [geoids[each] for each in (contradiction.a, contradiction.b) if each in geoids]
