"""Questions: searches and scores, which store nothing."""

from typing import Any

import pytest

from kimera_stream.protocol.errors import BadFilterError, BadRequestError
from kimera_stream.protocol.objects import GeoidBody
from tests.engines.world import ANNA, World

pytestmark = pytest.mark.anyio


async def search(world: World, text: str, **changes: Any) -> list[tuple[str, float]]:
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
