"""What a publish leads to in the log: entries, channels, contradictions in versions, dissolutions."""

from typing import Any

import pytest

from kimera_stream.protocol.objects import Contradiction, Geoid, GeoidBody
from tests.engines.world import ANNA, World, together

pytestmark = pytest.mark.anyio


def body(geoid_id: str, n: int, *, subject: str = "s", **changes: Any) -> GeoidBody:
    return GeoidBody(id=geoid_id, symbolic_state={"subject": subject, "n": n}, **changes)


async def test_entries_carry_what_they_tell_and_show_where_they_concern() -> None:
    world = World()
    async with world.running() as pipeline:
        await pipeline.publish(body("a", 1, originator_agent_id="sensor"), principal=ANNA, session_id="s1")
        result = await pipeline.publish(body("b", 2, session_id="s2"), principal=ANNA, session_id="not this")
    created, second, found = world.vault.log
    assert created.channels == ("geoids", "geoid:a", "session:s1", "agent:sensor")
    assert second.channels == ("geoids", "geoid:b", "session:s2")
    assert found.channels == (
        "contradictions",
        "geoid:a",
        "geoid:b",
        "session:s1",
        "agent:sensor",
        "session:s2",
    )
    assert Geoid(**created.value()) == world.vault.stored["a"].geoid
    assert found.value()["id"] == result.contradictions[0].id
    (contradiction,) = world.vault.contradictions.values()
    assert contradiction == result.contradictions[0]
    assert (contradiction.a, contradiction.b, contradiction.offset, contradiction.version) == ("a", "b", 3, 1)
    assert 0 <= contradiction.pulse_strength <= 1
    assert contradiction.decision in ("collapse", "surge", "buffer")
    assert world.conversation is not None


async def test_a_contradiction_that_still_holds_keeps_its_id() -> None:
    world = World()
    async with world.running() as pipeline:
        await pipeline.publish(body("a", 1), principal=ANNA)
        first = await pipeline.publish(body("b", 2), principal=ANNA)
        again = await pipeline.publish(body("b", 3), principal=ANNA)
        turned = await pipeline.publish(body("a", 4), principal=ANNA)
    assert {each.contradictions[0].id for each in (first, again, turned)} == {first.contradictions[0].id}
    assert [each.contradictions[0].version for each in (first, again, turned)] == [1, 2, 3]
    assert "contradiction.dissolved" not in world.vault.types()
    # The statement that was there first is the older one, by what it says now.
    assert (turned.contradictions[0].a, turned.contradictions[0].b) == ("b", "a")


async def test_both_sides_updated_in_one_batch_end_nothing_that_goes_on() -> None:
    world = World()
    async with world.running() as pipeline:
        await pipeline.publish(body("a", 1), principal=ANNA)
        (found,) = (await pipeline.publish(body("b", 2), principal=ANNA)).contradictions
        await together(pipeline.publish(body("a", 3), principal=ANNA), pipeline.publish(body("b", 4), principal=ANNA))
        assert len(world.vault.commits) == 3
        assert "contradiction.dissolved" not in world.vault.types()
        (kept,) = world.vault.contradictions.values()
        assert (kept.id, kept.version, kept.a, kept.b) == (found.id, 2, "a", "b")
        await together(pipeline.publish(body("a", 5), principal=ANNA), pipeline.publish(body("b", 5), principal=ANNA))
    assert world.vault.types()[-1] == "contradiction.dissolved"
    assert world.vault.open_pairs() == set()


async def test_only_labels_changed_is_an_update_that_judges_nothing() -> None:
    world = World()
    async with world.running() as pipeline:
        await pipeline.publish(body("a", 1), principal=ANNA)
        await pipeline.publish(body("b", 2), principal=ANNA)
        before = world.vault.contradictions.copy()
        result = await pipeline.publish(body("b", 2, metadata={"seen": True}), principal=ANNA)
    assert (result.geoid.version, result.contradictions) == (2, [])
    assert world.vault.contradictions == before
    assert world.vault.types()[-1] == "geoid.updated"


async def test_what_the_scan_leaves_out_is_not_dissolved_unseen() -> None:
    """A scan ends at its top k. A contradiction beyond it ends when it no longer holds, not when it is not found."""
    world = World()
    async with world.running() as pipeline:
        for n in range(5):
            await pipeline.publish(body(f"up{n}", 1), principal=ANNA)
        await pipeline.publish(body("down", 2), principal=ANNA)
        assert len(world.vault.open_pairs()) == 5
        world.index.most = 2
        still = await pipeline.publish(body("down", 3), principal=ANNA)
        assert len(world.vault.open_pairs()) == 5
        assert {each.version for each in still.contradictions} == {2}
        await pipeline.publish(body("down", 1), principal=ANNA)
    assert world.vault.open_pairs() == set()


async def test_a_dissolved_one_that_comes_back_is_a_new_one() -> None:
    world = World()
    async with world.running() as pipeline:
        await pipeline.publish(body("a", 1), principal=ANNA)
        (first,) = (await pipeline.publish(body("b", 2), principal=ANNA)).contradictions
        await pipeline.publish(body("b", 1), principal=ANNA)
        (second,) = (await pipeline.publish(body("b", 2), principal=ANNA)).contradictions
    assert first.id != second.id
    assert _state(world, first) == "dissolved"
    assert _state(world, second) == "open"


async def test_a_resolved_one_stays_resolved_until_something_else_is_said() -> None:
    world = World()
    async with world.running() as pipeline:
        await pipeline.publish(body("a", 1), principal=ANNA)
        (found,) = (await pipeline.publish(body("b", 2), principal=ANNA)).contradictions
        await pipeline.resolve(found.id, "buffer", None, principal=ANNA)
        same = await pipeline.publish(body("b", 2, purpose="again"), principal=ANNA)
        assert same.contradictions == []
        other = await pipeline.publish(body("b", 3), principal=ANNA)
        assert len(other.contradictions) == 1
        assert other.contradictions[0].id != found.id
        fixed = await pipeline.publish(body("b", 1), principal=ANNA)
        assert fixed.contradictions == []
    assert _state(world, found) == "resolved", "an update does not rewrite what was settled"


async def test_times_of_the_log_never_go_back() -> None:
    world = World()
    async with world.running() as pipeline:
        for step in (0, 10, -3_600, 5, -1):
            world.now += step
            await pipeline.publish(GeoidBody(symbolic_state={f"k{step}": 1}), principal=ANNA)
    times = [entry.ts for entry in world.vault.log]
    assert times == sorted(times)


async def test_an_idempotency_record_is_what_was_answered() -> None:
    world = World()
    async with world.running() as pipeline:
        await pipeline.publish(body("a", 1), principal=ANNA)
        first = await pipeline.publish(body("b", 2), principal=ANNA, key="k")
        await pipeline.publish(body("b", 1), principal=ANNA)
        again = await pipeline.publish(body("b", 2), principal=ANNA, key="k")
    assert again.duplicate
    assert (again.geoid, again.offset, again.contradictions) == (first.geoid, first.offset, first.contradictions)


def _state(world: World, contradiction: Contradiction) -> str:
    return world.vault.contradictions[contradiction.id].state
