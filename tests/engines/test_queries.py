"""Questions: searches and scores, which store nothing."""

from typing import Any

import numpy as np
import pytest

from kimera_stream.core.geoid import built
from kimera_stream.core.interfaces import StoredGeoid
from kimera_stream.engines import queries
from kimera_stream.protocol.errors import BadFilterError, BadRequestError
from kimera_stream.protocol.objects import GeoidBody
from tests.engines.world import ANNA, DIMENSION, PlainIndex, World

pytestmark = pytest.mark.anyio


async def search(world: World, text: str | None, **changes: Any) -> list[tuple[str, float]]:
    fields: dict[str, Any] = {"vector": None, "relation": "related", "k": 10, "filter": None}
    hits = await world.pipeline.search(text=text, **{**fields, **changes})
    return [(hit.geoid.id, hit.score) for hit in hits]


async def told(world: World) -> None:
    for geoid_id, text, kind in (
        ("open", "The north gate is open.", "gate"),
        ("shut", "The north gate is not open.", "gate"),
        ("corn", "Corn prices fell in Chicago.", "price"),
    ):
        body = GeoidBody(id=geoid_id, text=text, symbolic_state={"kind": kind})
        await world.pipeline.publish(body, principal=ANNA)


async def test_related_statements_the_best_first() -> None:
    world = World()
    async with world.running():
        await told(world)
        hits = await search(world, "The north gate is open.")
        assert hits[0][0] == "open"
        assert [score for _, score in hits] == sorted((score for _, score in hits), reverse=True)
        assert all(0 <= score <= 1 for _, score in hits)
        assert len(await search(world, "The north gate is open.", k=1)) == 1
        by_kind = {"field": "data.symbolic_state.kind", "op": "eq", "value": "price"}
        assert [each for each, _ in await search(world, "The north gate is open.", filter=by_kind)] == ["corn"]
        far = {"field": "score", "op": "lt", "value": 0.5}
        assert [each for each, _ in await search(world, "The north gate is open.", filter=far)] == ["corn"]
    assert world.vault.head == 4


AXIS = [1.0] + [0.0] * (DIMENSION - 1)
RARE = {"field": "data.symbolic_state.kind", "op": "eq", "value": "rare"}


def stand(world: World, count: int, kind: str, closest: float) -> None:
    """Statements of a kind, the first of them at that cosine to ``AXIS`` and each next one farther away."""
    for number in range(count):
        cosine = closest - number * 1e-4
        vector = np.zeros(DIMENSION, np.float32)
        vector[:2] = cosine, (1 - cosine**2) ** 0.5
        geoid = built(
            GeoidBody(id=f"{kind}{number}", symbolic_state={"kind": kind}),
            geoid_id=f"{kind}{number}", session_id=None, now=1, offset=1, previous=None,
        )  # fmt: skip
        world.vault.stored[geoid.id] = world.index.held[geoid.id] = StoredGeoid(geoid, vector, "anna")


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many statements each scan of the index was asked for."""
    asked: list[int] = []
    related = PlainIndex.related

    async def noting(self: PlainIndex, vectors: Any, *, k: int) -> Any:
        asked.append(k)
        return await related(self, vectors, k=k)

    monkeypatch.setattr(PlainIndex, "related", noting)
    return asked


async def test_a_search_looks_on_until_enough_pass_its_filter(scans: list[int]) -> None:
    world = World()
    async with world.running():
        stand(world, 1_500, "near", 0.9)
        stand(world, 7, "rare", 0.1)
        found = await search(world, None, vector=AXIS, k=5, filter=RARE)
        assert [each for each, _ in found] == [f"rare{number}" for number in range(5)]
        assert scans == [50, 500, 5_000]
        assert len(world.cache) == 50, "what the later scans found went past the cache"
        scans.clear()
        found = await search(world, None, vector=AXIS, k=20, filter=RARE)
        assert [each for each, _ in found] == [f"rare{number}" for number in range(7)], "all there are"
        assert scans == [200, 2_000]
        scans.clear()
        assert len(await search(world, None, vector=AXIS, k=5)) == 5
        common = {"not": RARE}
        assert len(await search(world, None, vector=AXIS, k=5, filter=common)) == 5
        assert scans == [5, 50], "no farther than needed"


async def test_a_search_looks_at_so_many_at_most(scans: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries, "MOST_LOOKED_AT", 300)
    world = World()
    async with world.running():
        stand(world, 298, "near", 0.9)
        stand(world, 7, "rare", 0.1)
        found = await search(world, None, vector=AXIS, k=5, filter=RARE)
    assert [each for each, _ in found] == ["rare0", "rare1"]
    assert scans == [50, 300]


async def test_statements_that_go_during_a_search_do_not_end_it(
    scans: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World()
    related = PlainIndex.related

    async def losing(self: PlainIndex, vectors: Any, *, k: int) -> Any:
        return [row[: k - 1] if len(scans) == 1 else row for row in await related(self, vectors, k=k)]

    monkeypatch.setattr(PlainIndex, "related", losing)
    async with world.running():
        stand(world, 60, "near", 0.9)
        stand(world, 2, "rare", 0.1)
        found = await search(world, None, vector=AXIS, k=5, filter=RARE)
    assert [each for each, _ in found] == ["rare0", "rare1"]


async def test_contradicting_statements() -> None:
    world = World()
    async with world.running():
        await told(world)
        hits = await search(world, "The north gate is open.", relation="contradicts")
        assert [each for each, _ in hits] == ["shut"]
        assert hits[0][1] >= world.engine.threshold


async def test_bad_questions() -> None:
    world = World()
    async with world.running() as pipeline:
        for changes in ({"k": 0}, {"k": 101}, {"vector": [0.1] * 128}):
            with pytest.raises(BadRequestError):
                await search(world, "Anything.", **changes)
        with pytest.raises(BadRequestError):
            await search(world, " ")
        with pytest.raises(BadFilterError):
            await search(world, "Anything.", filter={"some": []})
        with pytest.raises(BadRequestError, match=r"^a"):
            await pipeline.score(GeoidBody(), GeoidBody(text="x"))
        with pytest.raises(BadRequestError, match=r"^b"):
            await pipeline.score(GeoidBody(text="x"), GeoidBody(vector=[1.0]))


async def test_a_score_stores_nothing_and_takes_every_kind_of_statement() -> None:
    world = World()
    async with world.running() as pipeline:
        one, two = GeoidBody(text="The north gate is open."), GeoidBody(text="The north gate is not open.")
        assert (await pipeline.score(one, two)).score >= world.engine.threshold
        assert (await pipeline.score(one, one)).score < world.engine.threshold
        facts = await pipeline.score(
            GeoidBody(symbolic_state={"subject": "s", "n": 1}), GeoidBody(symbolic_state={"subject": "s", "n": 2})
        )
        assert facts.score > 0.9
        assert any("n" in why for why in facts.why)
        same_id = await pipeline.score(GeoidBody(id="x", text="Up."), GeoidBody(id="x", text="Down."))
        assert 0 <= same_id.score <= 1
    assert world.vault.head == 0
    assert len(world.index.held) == 0
