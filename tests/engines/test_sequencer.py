"""The one writer: how it cuts its work, and that nothing committed goes untold."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimera_stream.engines.intake import Ticket
from kimera_stream.engines.sequencer import segments
from kimera_stream.engines.work import DeleteWork, PublishWork, ResolveWork, Work
from kimera_stream.protocol.objects import GeoidBody
from tests.engines.world import ANNA, World, together


def work(kind: str, target: str | None) -> Work:
    ticket: Ticket[Any] = Ticket(("anna", ""), priority=5, cost=1, admitted_at=0.0)
    if kind == "delete":
        return DeleteWork(ticket, target or "x", ANNA)
    if kind == "resolve":
        return ResolveWork(ticket, target or "x", "surge", None, ANNA)
    return PublishWork(ticket, GeoidBody(id=target, text="t"), ANNA, None, None, False, False)


def target_of(each: Work) -> str | None:
    if isinstance(each, PublishWork):
        return each.body.id
    return each.geoid_id if isinstance(each, DeleteWork) else each.contradiction_id


@given(
    st.lists(
        st.builds(work, st.sampled_from(["publish", "delete", "resolve"]), st.none() | st.sampled_from(["x", "y", "z"]))
    )
)
def test_segments_keep_the_order_and_hold_each_target_once(group: list[Work]) -> None:
    cut = list(segments(group))
    assert [each for segment in cut for each in segment] == group
    for segment in cut:
        assert segment
        assert len({type(each) for each in segment}) == 1
        named = [target for each in segment if (target := target_of(each)) is not None]
        assert len(named) == len(set(named))
    for before, after in pairwise(cut):  # no cut without need
        joined = [*before, after[0]]
        named = [target for each in joined if (target := target_of(each)) is not None]
        assert type(before[0]) is not type(after[0]) or len(named) > len(set(named))


@pytest.mark.anyio
async def test_catching_up_tells_all_that_another_node_committed() -> None:
    world = World()
    async with world.running() as pipeline:
        await together(
            *[pipeline.publish(GeoidBody(id=f"g{n}", symbolic_state={f"k{n}": n}), principal=ANNA) for n in range(3)]
        )
    other = World()
    other.vault = world.vault
    other.sequencer._vault = world.vault  # type: ignore[assignment]
    other.cache._source = world.vault
    assert await other.sequencer.catch_up() == 3
    assert set(other.index.held) == {"g0", "g1", "g2"}
    assert other.field.state().geoids == 3
    assert [entry.offset for entry in other.sink.entries] == [1, 2, 3]
    assert await other.sequencer.catch_up() == 0


@pytest.mark.anyio
async def test_catching_up_over_pages_ends_at_the_newest_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kimera_stream.engines.sequencer.PAGE", 2)
    world = World()
    async with world.running() as pipeline:
        for n in (1, 2, 3):
            await pipeline.publish(GeoidBody(id="same", symbolic_state={"subject": "s", "n": n}), principal=ANNA)
        await pipeline.publish(GeoidBody(id="gone", symbolic_state={"subject": "s", "n": 9}), principal=ANNA)
        await pipeline.delete("gone", principal=ANNA)
    other = World()
    other.vault = world.vault
    other.sequencer._vault = world.vault  # type: ignore[assignment]
    other.cache._source = world.vault
    assert await other.sequencer.catch_up() == world.vault.head
    assert {geoid_id: stored.geoid.version for geoid_id, stored in other.index.held.items()} == {"same": 3}
    state = other.field.state()
    assert (state.geoids, state.open_contradictions) == (1, 0)
    assert other.sequencer.applied == world.vault.head


@pytest.mark.anyio
async def test_a_clock_that_was_set_back_before_a_restart_makes_nothing_older_than_what_is_there() -> None:
    world = World()
    async with world.running() as pipeline:
        await pipeline.publish(GeoidBody(id="before", symbolic_state={"a": 1}), principal=ANNA)
    again = World(vault=world.vault)
    again.now = world.now - 3_600
    async with again.running() as pipeline:
        await pipeline.publish(GeoidBody(id="after", symbolic_state={"b": 1}), principal=ANNA)
    before, after = (entry.ts for entry in world.vault.log)
    assert before <= after
