"""Deletes and resolutions: what they end, what they leave, and what they refuse."""

import pytest

from kimera_stream.protocol.errors import ConflictError, NotFoundError
from kimera_stream.protocol.objects import GeoidBody
from tests.engines.world import ANNA, BEN, World, outcome, together

pytestmark = pytest.mark.anyio


def body(geoid_id: str, n: int, **weights: float) -> GeoidBody:
    return GeoidBody(id=geoid_id, symbolic_state={"subject": "s", "n": n}, semantic_state=weights or None)


async def test_a_delete_ends_every_contradiction_of_the_statement_once() -> None:
    world = World()
    async with world.running() as pipeline:
        for n, geoid_id in enumerate("abc"):
            await pipeline.publish(body(geoid_id, n), principal=ANNA)
        assert len(world.vault.open_pairs()) == 3
        before = world.vault.head
        results = await together(pipeline.delete("a", principal=ANNA), pipeline.delete("b", principal=BEN))
        types = world.vault.types()[before:]
    assert types == [
        "geoid.deleted",
        "contradiction.dissolved",
        "contradiction.dissolved",
        "geoid.deleted",
        "contradiction.dissolved",
    ] or sorted(types) == sorted(["geoid.deleted"] * 2 + ["contradiction.dissolved"] * 3)
    assert all(isinstance(each, int) for each in results)
    assert world.vault.open_pairs() == set()
    assert set(world.vault.stored) == {"c"}
    deleted = next(entry for entry in world.vault.log if entry.type == "geoid.deleted")
    assert deleted.value()["symbolic_state"] == {"subject": "s", "n": 0}, "the last version is told"
    assert {(who, what, target) for _, who, what, target in world.vault.audit} == {
        ("anna", "delete", "a"),
        ("ben", "delete", "b"),
    }


async def test_what_is_not_there_is_not_deleted() -> None:
    world = World()
    async with world.running() as pipeline:
        await pipeline.publish(body("a", 1), principal=ANNA)
        first, second = await together(pipeline.delete("a", principal=ANNA), pipeline.delete("a", principal=ANNA))
        assert first == 2
        assert isinstance(second, NotFoundError)
        assert isinstance(await outcome(pipeline.delete("never", principal=ANNA)), NotFoundError)
        assert (await pipeline.publish(body("a", 1), principal=ANNA)).geoid.version == 1


async def test_a_resolution_leaves_one_scar_in_the_lighter_vault() -> None:
    world = World()
    async with world.running() as pipeline:
        await pipeline.publish(body("a", 0, x=1.0), principal=ANNA)
        found = []
        for n in range(1, 5):
            found += (await pipeline.publish(body(f"b{n}", n, y=1.0), principal=ANNA)).contradictions
        mine = [each for each in found if each.a == "a"]
        results = await together(*[pipeline.resolve(each.id, "collapse", "counted", principal=ANNA) for each in mine])
    scars = [scar for scar, _ in results]
    assert [scar.vault for scar in scars] == ["a", "b", "a", "b"]
    assert world.vault.scars == scars
    for scar, offset in results:
        assert (scar.offset, scar.resolved_by, scar.reason) == (offset, "anna", "counted")
        assert scar.delta_entropy == pytest.approx(scar.post_entropy - scar.pre_entropy)
        formed, resolved = world.vault.log[offset - 1], world.vault.log[offset - 2]
        assert (resolved.type, formed.type) == ("contradiction.resolved", "scar.formed")
        assert resolved.value()["state"] == "resolved"
        assert formed.channels[0] == "scars"
        assert set(formed.channels[1:]) == set(resolved.channels[1:])


async def test_only_what_is_open_can_be_resolved() -> None:
    world = World()
    async with world.running() as pipeline:
        await pipeline.publish(body("a", 0), principal=ANNA)
        (found,) = (await pipeline.publish(body("b", 1), principal=ANNA)).contradictions
        first, second = await together(
            pipeline.resolve(found.id, "surge", None, principal=ANNA),
            pipeline.resolve(found.id, "buffer", None, principal=BEN),
        )
        assert first[0].decision == "surge"
        assert isinstance(second, ConflictError)
        assert "resolved" in second.message
        assert isinstance(await outcome(pipeline.resolve("none", "surge", None, principal=ANNA)), NotFoundError)
        (other,) = (await pipeline.publish(body("c", 0), principal=ANNA)).contradictions
        await pipeline.delete("c", principal=ANNA)
        gone = await outcome(pipeline.resolve(other.id, "surge", None, principal=ANNA))
        assert isinstance(gone, ConflictError)
        assert "dissolved" in gone.message
    assert len(world.vault.scars) == 1
