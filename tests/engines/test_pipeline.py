"""The pipeline: batching changes nothing but the speed; keys, refusals, crashes and stops."""

import gc
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimera_stream.core.interfaces import PublishResult
from kimera_stream.engines.intake import Ticket
from kimera_stream.engines.retrying import NotBegunError
from kimera_stream.engines.symbolic import compare_states
from kimera_stream.engines.work import PublishWork, RequestId
from kimera_stream.protocol.errors import (
    BadRequestError,
    ConflictError,
    InternalError,
    LimitExceededError,
    NotFoundError,
    OperationalError,
    OverloadedError,
    UnavailableError,
)
from kimera_stream.protocol.objects import GeoidBody
from tests.engines.world import ANNA, BEN, DIMENSION, World, outcome, together
from tests.garbage import uncollected

pytestmark = pytest.mark.anyio

# -- the model ---------------------------------------------------------------------------------------------------------

IDS = ("a", "b", "c", "d", "e")
STATES = st.fixed_dictionaries(
    {"subject": st.sampled_from(["x", "y"])},
    optional={"p": st.integers(0, 1), "q": st.sampled_from([0, 0.0, 1, True])},
)


@dataclass(frozen=True)
class Op:
    kind: str
    geoid_id: str = ""
    state: tuple[tuple[str, Any], ...] = ()
    choice: int = 0


OPS = st.one_of(
    st.builds(Op, st.just("publish"), st.sampled_from(IDS), STATES.map(lambda each: tuple(each.items()))),
    st.builds(Op, st.just("patch"), st.sampled_from(IDS), STATES.map(lambda each: tuple(each.items()))),
    st.builds(Op, st.just("label"), st.sampled_from(IDS)),
    st.builds(Op, st.just("delete"), st.sampled_from(IDS)),
)
RESOLVES = st.builds(Op, st.just("resolve"), choice=st.integers(0, 20))
ROUNDS = st.lists(st.tuples(st.lists(RESOLVES, max_size=2), st.lists(OPS, max_size=10)), min_size=1, max_size=5)


@dataclass
class Model:
    """What must be true after each command, one after the other; knows nothing of batches, indexes or scores."""

    states: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    open: set[frozenset[str]] = field(default_factory=set)

    def publish(self, geoid_id: str, state: dict[str, Any]) -> str | int:
        self.versions[geoid_id] = self.versions.get(geoid_id, 0) + 1
        if _exactly(self.states.get(geoid_id)) != _exactly(state):
            self.states[geoid_id] = state
            for other, its in self.states.items():
                if other == geoid_id:
                    continue
                pair = frozenset((other, geoid_id))
                verdict = compare_states(its, state)
                if verdict.conflicts and verdict.same_subject:
                    self.open.add(pair)
                else:
                    self.open.discard(pair)
        return self.versions[geoid_id]

    def apply(self, op: Op) -> str | int:
        """The code of the error, or the version."""
        if op.kind == "publish":
            return self.publish(op.geoid_id, dict(op.state))
        if op.geoid_id not in self.states:
            return "not_found"
        if op.kind == "label":
            self.versions[op.geoid_id] += 1
            return self.versions[op.geoid_id]
        if op.kind == "patch":
            return self.publish(op.geoid_id, dict(op.state))
        del self.states[op.geoid_id], self.versions[op.geoid_id]
        self.open = {pair for pair in self.open if op.geoid_id not in pair}
        return 0


def _exactly(state: dict[str, Any] | None) -> bytes | None:
    """1, 1.0 and true are different statements, if not different values."""
    return None if state is None else msgspec.json.encode(state, order="sorted")


def _call(world: World, op: Op) -> Any:
    state = dict(op.state)
    match op.kind:
        case "publish":
            return world.pipeline.publish(GeoidBody(id=op.geoid_id, symbolic_state=state), principal=ANNA)
        case "patch":
            body = GeoidBody(id=op.geoid_id, symbolic_state=state)
            return world.pipeline.publish(body, principal=ANNA, merge=True, must_exist=True)
        case "label":
            body = GeoidBody(id=op.geoid_id, purpose="labelled")
            return world.pipeline.publish(body, principal=ANNA, merge=True, must_exist=True)
        case _:
            return world.pipeline.delete(op.geoid_id, principal=ANNA)


def _told(result: Any) -> str | int:
    if isinstance(result, OperationalError):
        return result.code
    return result.geoid.version if isinstance(result, PublishResult) else 0


async def _play(rounds: list[tuple[list[Op], list[Op]]], *, at_once: bool, group: int) -> World:
    world, model = World(database={"group_commit_max": group}), Model()
    async with world.running() as pipeline:
        for resolves, ops in rounds:
            found = sorted(
                (each for each in world.vault.contradictions.values() if each.state == "open"),
                key=lambda each: (each.a, each.b),
            )
            chosen = {op.choice % len(found): found[op.choice % len(found)] for op in resolves if found}
            calls = [pipeline.resolve(each.id, "collapse", None, principal=ANNA) for each in chosen.values()]
            calls += [_call(world, op) for op in ops]
            results = await together(*calls) if at_once else [await outcome(call) for call in calls]
            for each in chosen.values():
                model.open.discard(frozenset((each.a, each.b)))
            assert not any(isinstance(each, OperationalError) for each in results[: len(chosen)])
            expected = [model.apply(op) for op in ops]
            assert [_told(each) for each in results[len(chosen) :]] == expected
            assert world.vault.open_pairs() == model.open
            assert {each.geoid.id: each.geoid.version for each in world.vault.stored.values()} == model.versions
            _check_consistent(world)
    assert not world.crashes
    return world


def _check_consistent(world: World) -> None:
    """What follows from the commits agrees with them: index, sink, field, log."""
    vault = world.vault
    assert world.index.held.keys() == vault.stored.keys()
    for geoid_id, stored in vault.stored.items():
        assert world.index.held[geoid_id].geoid == stored.geoid
    assert [entry.offset for entry in world.sink.entries] == list(range(1, vault.head + 1))
    state = world.field.state()
    assert (state.geoids, state.open_contradictions) == (len(vault.stored), len(vault.open_pairs()))
    # Replaying the log gives the same open contradictions as the entities: a subscriber knows what the vault knows.
    heard: dict[str, frozenset[str]] = {}
    for entry in vault.log:
        if entry.type.startswith("contradiction."):
            data = entry.value()
            assert data["offset"] == entry.offset
            if entry.type == "contradiction.found":
                heard[data["id"]] = frozenset((data["a"], data["b"]))
            else:
                assert data["id"] in heard, "it ended without having begun, or twice"
                del heard[data["id"]]
    assert len(set(heard.values())) == len(heard), "a pair is open twice"
    assert set(heard.values()) == vault.open_pairs()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ROUNDS, st.sampled_from([1, 2, 3, 512]))
def test_batches_do_what_one_after_the_other_does(rounds: list[tuple[list[Op], list[Op]]], group: int) -> None:
    anyio.run(lambda: _play(rounds, at_once=True, group=group))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ROUNDS)
def test_the_model_is_right_one_after_the_other(rounds: list[tuple[list[Op], list[Op]]]) -> None:
    anyio.run(lambda: _play(rounds, at_once=False, group=512))


async def test_what_is_under_way_together_is_committed_together() -> None:
    world = World()
    async with world.running() as pipeline:
        results = await together(
            *[pipeline.publish(GeoidBody(symbolic_state={f"k{n}": n}), principal=ANNA) for n in range(50)]
        )
    assert [each.offset for each in results] == list(range(1, 51))
    assert len(world.vault.commits) <= 2


async def test_a_label_in_the_same_batch_hides_no_contradiction() -> None:
    """The index has the other statement in its old version; that it is labelled meanwhile changes nothing it says."""
    world = World()
    async with world.running() as pipeline:
        await pipeline.publish(GeoidBody(id="old", symbolic_state={"subject": "s", "n": 1}), principal=ANNA)
        for order in (0, 1):
            calls = [
                pipeline.publish(GeoidBody(id=f"new{order}", symbolic_state={"subject": "s", "n": 2}), principal=ANNA),
                pipeline.publish(GeoidBody(id="old", purpose=f"label{order}"), principal=ANNA, merge=True),
            ]
            await together(*(calls if order == 0 else reversed(calls)))
    assert world.vault.open_pairs() == {frozenset(("old", "new0")), frozenset(("old", "new1"))}


async def test_work_that_is_done_leaves_nothing_to_the_collector_of_garbage() -> None:
    world = World()
    async with world.running() as pipeline:
        with uncollected():
            for n in range(20):
                await pipeline.publish(GeoidBody(text=f"Gate {n} is open."), principal=ANNA)
            left = sum(isinstance(each, (PublishWork, Ticket)) for each in gc.get_objects())
    assert left <= 6, "what the loops of the pipeline have in hand"


# -- texts ---------------------------------------------------------------------------------------------------------------


async def test_statements_of_one_batch_are_compared_with_each_other() -> None:
    world = World()
    async with world.running() as pipeline:
        first, second, other = await together(
            pipeline.publish(GeoidBody(text="The gate at the pier is open."), principal=ANNA),
            pipeline.publish(GeoidBody(text="The gate at the pier is not open."), principal=ANNA),
            pipeline.publish(GeoidBody(text="Onions grow in any soil."), principal=ANNA),
        )
    assert first.contradictions == []
    assert [each.a for each in second.contradictions] == [first.geoid.id]
    assert other.contradictions == []
    assert len(world.encoder.calls) == 1


async def test_a_vector_that_was_brought_along_is_not_encoded() -> None:
    world = World()
    vector = np.random.default_rng(1).standard_normal(128).tolist()
    async with world.running() as pipeline:
        result = await pipeline.publish(GeoidBody(text="Any text.", vector=vector), principal=ANNA)
    assert world.encoder.calls == []
    assert result.geoid.vector is None
    kept = world.vault.stored[result.geoid.id].vector
    assert kept is not None
    assert float(np.linalg.norm(kept)) == pytest.approx(1.0, abs=1e-5)


async def test_a_merge_without_a_text_keeps_the_vector() -> None:
    world = World()
    async with world.running() as pipeline:
        await pipeline.publish(GeoidBody(id="m", text="The tram stops here."), principal=ANNA)
        before = world.vault.stored["m"].vector
        body = GeoidBody(id="m", symbolic_state={"line": 4})
        result = await pipeline.publish(body, principal=ANNA, merge=True)
        assert result.geoid.text == "The tram stops here."
        assert np.array_equal(world.vault.stored["m"].vector, before)  # type: ignore[arg-type]
        whole = await pipeline.publish(GeoidBody(id="m", symbolic_state={"line": 5}), principal=ANNA)
        assert whole.geoid.text is None
        assert world.vault.stored["m"].vector is None


# -- keys ----------------------------------------------------------------------------------------------------------------


async def test_a_key_gives_the_first_result_also_while_the_first_is_under_way() -> None:
    world = World()
    async with world.running() as pipeline:
        results = await together(
            *[pipeline.publish(GeoidBody(text=f"Said {n}."), principal=ANNA, key="k") for n in range(3)]
        )
        later = await pipeline.publish(GeoidBody(text="Said later."), principal=ANNA, key="k")
        of_ben = await pipeline.publish(GeoidBody(text="Ben says."), principal=BEN, key="k")
        assert [each.duplicate for each in [*results, later, of_ben]] == [False, True, True, True, False]
        assert {each.geoid.text for each in [*results, later]} == {"Said 0."}
        world.now += world.settings.performance.idempotency_window + 1
        fresh = await pipeline.publish(GeoidBody(text="After the window."), principal=ANNA, key="k")
        assert (fresh.duplicate, fresh.geoid.text) == (False, "After the window.")


async def test_a_refused_key_can_be_used_again() -> None:
    world = World()
    async with world.running() as pipeline:
        missing = await outcome(
            pipeline.publish(GeoidBody(id="x", purpose="p"), principal=ANNA, key="k", merge=True, must_exist=True)
        )
        assert isinstance(missing, NotFoundError)
        world.vault.faults = [UnavailableError("disk full")]
        failed = await together(*[pipeline.publish(GeoidBody(text="Said."), principal=ANNA, key="k") for _ in range(2)])
        assert [each.code for each in failed] == ["unavailable", "unavailable"]
        result = await pipeline.publish(GeoidBody(text="Said."), principal=ANNA, key="k")
        assert not result.duplicate


# -- refusals --------------------------------------------------------------------------------------------------------------


async def test_bad_bodies_never_get_in() -> None:
    world = World()
    async with world.running() as pipeline:
        for body in (GeoidBody(), GeoidBody(text=" "), GeoidBody(vector=[1.0]), GeoidBody(text="a", id="a b")):
            assert isinstance(await outcome(pipeline.publish(body, principal=ANNA)), BadRequestError)
        for key in ("", "k" * 256, "a\0b", "\ud800"):
            refused = await outcome(pipeline.publish(GeoidBody(text="a"), principal=ANNA, key=key))
            assert isinstance(refused, BadRequestError)
        assert isinstance(await outcome(pipeline.delete("a b", principal=ANNA)), BadRequestError)
        refused = await outcome(pipeline.resolve("c", "maybe", None, principal=ANNA))  # type: ignore[arg-type]
        assert isinstance(refused, BadRequestError)
        for reason in ("r" * 2_001, "a\0b"):
            refused = await outcome(pipeline.resolve("c", "surge", reason, principal=ANNA))
            assert isinstance(refused, BadRequestError)
    assert world.vault.head == 0


async def test_a_full_intake_refuses_and_takes_again_later() -> None:
    world = World(performance={"queue_items": 2})
    world.encoder.gate = anyio.Event()
    async with world.running() as pipeline, anyio.create_task_group() as group:
        for text in ("Rain is near.", "Onions grow."):
            group.start_soon(partial(pipeline.publish, GeoidBody(text=text), principal=ANNA))
        await anyio.wait_all_tasks_blocked()
        assert pipeline.waiting == 2
        refused = await outcome(pipeline.publish(GeoidBody(text="Too much."), principal=BEN))
        assert isinstance(refused, OverloadedError)
        assert refused.retry_after
        world.encoder.gate.set()
        world.encoder.gate = None
        await anyio.wait_all_tasks_blocked()
        assert pipeline.waiting == 0
        assert (await pipeline.publish(GeoidBody(text="Now."), principal=BEN)).offset == 3


async def test_while_nothing_can_be_written_new_work_is_refused_and_what_was_accepted_waits() -> None:
    world = World()
    world.encoder.gate = anyio.Event()
    async with world.running() as pipeline, anyio.create_task_group() as group:
        answers: list[PublishResult] = []

        async def say() -> None:
            answers.append(await pipeline.publish(GeoidBody(text="Said before."), principal=ANNA, key="k"))

        group.start_soon(say)
        await anyio.wait_all_tasks_blocked()
        world.unwritable = UnavailableError("a commit hangs", retry_after=1.0)
        group.start_soon(say)  # again, with its key: it waits for the first
        for asked in (
            pipeline.publish(GeoidBody(text="New."), principal=ANNA),
            pipeline.delete("x", principal=ANNA),
            pipeline.resolve("c", "surge", None, principal=ANNA),
            pipeline.reread(["x"]),
        ):
            with anyio.fail_after(5):
                assert await outcome(asked) is world.unwritable
        await anyio.wait_all_tasks_blocked()
        assert (pipeline.waiting, answers) == (1, [])
        elsewhere = RequestId("r", 0, 1)  # it was accepted on another node, and may have been done
        group.start_soon(
            partial(pipeline.publish, GeoidBody(text="From another node."), principal=BEN, request=elsewhere)
        )
        await anyio.wait_all_tasks_blocked()
        assert pipeline.waiting == 2
        world.encoder.gate.set()
        world.encoder.gate = None
    assert sorted(each.duplicate for each in answers) == [False, True]
    assert world.vault.head == 2


async def test_an_encoder_that_fails_costs_only_what_needs_it() -> None:
    world = World()
    world.encoder.fault = UnavailableError("encoder: out of order")
    async with world.running() as pipeline:
        text, state = await together(
            pipeline.publish(GeoidBody(text="Needs the encoder."), principal=ANNA),
            pipeline.publish(GeoidBody(symbolic_state={"needs": "nothing"}), principal=ANNA),
        )
    assert text.code == "unavailable"
    assert state.offset == 1


async def test_a_full_index_refuses_new_statements_and_takes_updates() -> None:
    world = World(capacity=2)
    async with world.running() as pipeline:
        results = await together(
            *[pipeline.publish(GeoidBody(id=f"g{n}", symbolic_state={"n": n}), principal=ANNA) for n in range(4)]
        )
        assert [isinstance(each, PublishResult) for each in results] == [True, True, False, False]
        assert isinstance(results[2], LimitExceededError)
        assert "KIMERA_PERFORMANCE__MAX_GEOIDS" in results[2].message
        assert (await pipeline.publish(GeoidBody(id="g0", symbolic_state={"n": 9}), principal=ANNA)).geoid.version == 2
        await pipeline.delete("g1", principal=ANNA)
        assert (await pipeline.publish(GeoidBody(id="g3", symbolic_state={"n": 3}), principal=ANNA)).geoid.version == 1


async def test_a_faster_writer_means_planning_anew() -> None:
    world = World()
    async with world.running() as pipeline:
        mine = await pipeline.publish(GeoidBody(id="mine", symbolic_state={"subject": "s", "n": 1}), principal=ANNA)
        elsewhere = world.vault.stored["mine"]
        theirs = msgspec.structs.replace(
            elsewhere.geoid, id="theirs", symbolic_state={"subject": "s", "n": 2}, version=1
        )
        commit = world.vault.commit

        async def slower(batch: Any) -> None:
            world.vault.commit = commit  # type: ignore[method-assign]
            await world.vault.commit_elsewhere(type(elsewhere)(theirs, None, "other"))
            raise ConflictError("the log has moved on")

        world.vault.commit = slower  # type: ignore[method-assign]
        last = await pipeline.publish(GeoidBody(id="last", symbolic_state={"subject": "s", "n": 3}), principal=ANNA)
    assert mine.offset == 1
    assert last.offset == 3
    assert {each.a for each in last.contradictions} == {"mine", "theirs"}
    assert [entry.offset for entry in world.sink.entries] == list(range(1, world.vault.head + 1))


async def test_what_a_faster_writer_committed_is_told_although_it_could_not_be_read_at_first() -> None:
    world = World()
    async with world.running() as pipeline:
        await pipeline.publish(GeoidBody(id="mine", symbolic_state={"subject": "s", "n": 1}), principal=ANNA)
        stored = world.vault.stored["mine"]
        theirs = msgspec.structs.replace(stored.geoid, id="theirs", symbolic_state={"subject": "s", "n": 2})
        commit, read = world.vault.commit, world.vault.read

        async def slower(batch: Any) -> None:
            world.vault.commit = commit  # type: ignore[method-assign]
            await world.vault.commit_elsewhere(type(stored)(theirs, None, "other"))
            raise ConflictError("the log has moved on")

        async def broken(*_: Any, **__: Any) -> Any:
            world.vault.read = read  # type: ignore[method-assign]
            raise UnavailableError("the disk is away")

        world.vault.commit, world.vault.read = slower, broken  # type: ignore[method-assign]
        refused = await outcome(pipeline.publish(GeoidBody(symbolic_state={"a": 1}), principal=ANNA))
        assert isinstance(refused, UnavailableError)
        last = await pipeline.publish(GeoidBody(id="last", symbolic_state={"subject": "s", "n": 3}), principal=ANNA)
    assert {each.a for each in last.contradictions} == {"mine", "theirs"}
    assert [entry.offset for entry in world.sink.entries] == list(range(1, world.vault.head + 1))


async def test_a_writer_that_is_always_slower_gives_up_with_an_answer() -> None:
    world = World()
    world.vault.faults = [ConflictError("moved on")] * 5
    async with world.running() as pipeline:
        refused = await outcome(pipeline.publish(GeoidBody(symbolic_state={"a": 1}), principal=ANNA))
        assert isinstance(refused, UnavailableError)
        assert (await pipeline.publish(GeoidBody(symbolic_state={"a": 1}), principal=ANNA)).offset == 1


# -- crashes and stops -------------------------------------------------------------------------------------------------------


async def test_what_was_committed_before_a_crash_is_told_after_it() -> None:
    world = World()
    async with world.running() as pipeline:
        await pipeline.publish(GeoidBody(id="a", symbolic_state={"subject": "s", "n": 1}), principal=ANNA)
        await pipeline.publish(GeoidBody(id="gone", symbolic_state={"subject": "t", "n": 1}), principal=ANNA)
        world.sink.fault = RuntimeError("a defect")
        lost = await outcome(
            pipeline.publish(GeoidBody(id="b", symbolic_state={"subject": "s", "n": 2}), principal=ANNA, key="k")
        )
        assert isinstance(lost, InternalError)
        again = await pipeline.publish(
            GeoidBody(id="b", symbolic_state={"subject": "s", "n": 2}), principal=ANNA, key="k"
        )
        assert again.duplicate
        apply = world.sequencer._apply
        world.sequencer._apply = _raising  # type: ignore[method-assign]
        assert isinstance(await outcome(pipeline.delete("gone", principal=ANNA)), InternalError)
        world.sequencer._apply = apply  # type: ignore[method-assign]
        third = await pipeline.publish(GeoidBody(id="c", symbolic_state={"subject": "s", "n": 3}), principal=ANNA)
        assert {each.a for each in third.contradictions} == {"a", "b"}
        _check_consistent(world)
    assert len(world.crashes) >= 2


async def test_nothing_overtakes_what_a_crash_has_left_to_come_again() -> None:
    """The bus brings again what was under way; what waits behind it in its lane is brought again with it."""
    world = World()
    process, met, crash = world.sequencer.process, anyio.Event(), anyio.Event()

    async def crashing(group: Any) -> Any:
        world.sequencer.process = process  # type: ignore[method-assign]
        met.set()
        await crash.wait()
        raise RuntimeError("a defect")

    async with world.running() as pipeline:
        outcomes: dict[str, Any] = {}

        async def publish(name: str, lane: str = "lane") -> None:
            said = pipeline.publish(
                GeoidBody(id=name, text=name), principal=ANNA, session_id=lane, request=RequestId(name, 0)
            )
            outcomes[name] = await outcome(said)

        world.sequencer.process = crashing  # type: ignore[method-assign]
        async with anyio.create_task_group() as group:
            for number in range(8):  # more than can be taken
                group.start_soon(publish, f"n{number}")
                await anyio.wait_all_tasks_blocked()
            assert met.is_set()
            group.start_soon(publish, "other", "other")
            await anyio.wait_all_tasks_blocked()
            crash.set()
        assert [name for name, each in outcomes.items() if not isinstance(each, InternalError)] == ["other"]
        not_begun = {name for name, each in outcomes.items() if isinstance(each, NotBegunError)}
        assert 0 < len(not_begun) < 8, "the crash may be theirs who were under way, and of nobody who was still waiting"
        assert [entry.value()["id"] for entry in world.vault.log] == ["other"]
        for number in range(8):
            await publish(f"n{number}")
        assert [entry.value()["id"] for entry in world.vault.log if entry.type.startswith("geoid.")] == [
            "other",
            *(f"n{number}" for number in range(8)),
        ]
        assert pipeline.waiting == 0


async def test_nothing_overtakes_it_that_is_brought_before_it_is_known_to_be_left() -> None:
    """Who brings work hears of the crash a turn of the event loop later, and may bring what comes after it until then."""
    world = World()
    process, met, crash = world.sequencer.process, anyio.Event(), anyio.Event()
    outcomes: dict[str, Any] = {}

    async def crashing(group: Any) -> Any:
        world.sequencer.process = process  # type: ignore[method-assign]
        met.set()
        await crash.wait()
        raise RuntimeError("a defect")

    async with world.running() as pipeline, anyio.create_task_group() as group:

        async def publish(name: str) -> None:
            said = pipeline.publish(GeoidBody(id=name, text=name), principal=ANNA, request=RequestId(name, 0))
            outcomes[name] = await outcome(said)

        async def publish_unless_first_is_left() -> None:
            if "first" not in outcomes:
                await publish("second")

        refuse = Ticket.refuse

        def refuse_in_between(ticket: Ticket[Any], error: Any) -> None:
            group.start_soon(publish_unless_first_is_left)
            refuse(ticket, error)

        world.sequencer.process = crashing  # type: ignore[method-assign]
        group.start_soon(publish, "first")
        await met.wait()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Ticket, "refuse", refuse_in_between)
            crash.set()
            while "first" not in outcomes:
                await anyio.lowlevel.checkpoint()
        while len(outcomes) < 2:
            await anyio.lowlevel.checkpoint()
        assert isinstance(outcomes["second"], NotBegunError)
        assert not world.vault.log
        for name in ("first", "second"):
            await publish(name)
        assert [entry.value()["id"] for entry in world.vault.log] == ["first", "second"]
        assert pipeline.waiting == 0


def _raising(_batch: Any) -> None:
    raise RuntimeError("a defect")


async def test_a_caller_that_leaves_does_not_tear_its_statement() -> None:
    world = World()
    world.vault.gate = anyio.Event()
    async with world.running() as pipeline:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: pipeline.publish(GeoidBody(id="left", text="Said and gone."), principal=ANNA))
            await anyio.wait_all_tasks_blocked()
            group.cancel_scope.cancel()
        world.vault.gate.set()
        result = await pipeline.publish(GeoidBody(id="left", text="Said again."), principal=ANNA)
        assert result.geoid.version == 2


async def test_a_drain_finishes_what_was_accepted_and_refuses_the_rest() -> None:
    world = World()
    world.vault.gate = anyio.Event()
    results: list[Any] = []
    async with world.running() as pipeline:
        async with anyio.create_task_group() as group:

            async def publish(n: int) -> None:
                results.append(await outcome(pipeline.publish(GeoidBody(symbolic_state={f"k{n}": n}), principal=ANNA)))

            for n in range(5):
                group.start_soon(publish, n)
            await anyio.wait_all_tasks_blocked()
            group.start_soon(pipeline.drain)
            await anyio.wait_all_tasks_blocked()
            refused = await outcome(pipeline.publish(GeoidBody(text="Too late."), principal=ANNA))
            assert isinstance(refused, UnavailableError)
            assert not results
            world.vault.gate.set()
        assert sorted(each.offset for each in results) == [1, 2, 3, 4, 5]


async def test_keyed_work_that_a_stop_leaves_undone_is_taken_up_by_the_next_start() -> None:
    world = World(database={"group_commit_max": 2})
    world.vault.gate = anyio.Event()
    results: dict[int, Any] = {}

    async def publish(n: int) -> None:
        body = GeoidBody(id=f"g{n}", symbolic_state={f"k{n}": n}, vector=[1.0] * DIMENSION if n == 12 else None)
        key = None if n % 5 == 4 else f"key-{n}"
        session = f"session-{n % 2}"
        results[n] = await outcome(
            world.pipeline.publish(body, principal=ANNA, key=key, session_id=session, priority=n % 10)
        )

    async with world.running() as pipeline, anyio.create_task_group() as group:
        for n in range(20):
            group.start_soon(publish, n)
        await anyio.wait_all_tasks_blocked()
        with anyio.CancelScope() as scope:
            scope.cancel()
            await pipeline.drain()
        await anyio.wait_all_tasks_blocked()
        assert [each.code for each in results.values()] == ["unavailable"] * 20
        world.vault.gate.set()
        await anyio.wait_all_tasks_blocked()
    committed = set(world.vault.stored)
    assert len(committed) == 2, "the group that was being committed, and nothing after it"
    kept = {request.key for request in world.vault.checkpointed}
    assert kept == {f"key-{n}" for n in range(20) if n % 5 != 4 and f"g{n}" not in committed}
    assert all(("it is kept" in each.message) == (f"key-{n}" in kept) for n, each in results.items())

    world = World(vault=world.vault)
    async with world.running() as pipeline:
        await anyio.wait_all_tasks_blocked()
        assert set(world.vault.stored) == committed | {key.replace("key-", "g") for key in kept if key}
        assert world.vault.checkpointed == []
        again = await pipeline.publish(GeoidBody(text="whatever"), principal=ANNA, key="key-12")
        assert (again.duplicate, again.geoid.id) == (True, "g12")
        assert all(stored.geoid.version == 1 for stored in world.vault.stored.values())
        stored = world.vault.stored["g12"]
        assert stored.vector is not None
        assert (stored.geoid.session_id, stored.principal) == ("session-0", "anna")


async def test_a_drain_cut_short_leaves_nobody_without_an_answer() -> None:
    world = World(database={"group_commit_max": 2})
    world.vault.gate = anyio.Event()
    results: list[Any] = []
    async with world.running() as pipeline, anyio.create_task_group() as group:

        async def publish(n: int) -> None:
            results.append(await outcome(pipeline.publish(GeoidBody(symbolic_state={f"k{n}": n}), principal=ANNA)))

        for n in range(20):
            group.start_soon(publish, n)
        await anyio.wait_all_tasks_blocked()
        with anyio.CancelScope() as scope:
            scope.cancel()
            await pipeline.drain()
        await anyio.wait_all_tasks_blocked()
        assert [each.code for each in results] == ["unavailable"] * 20
        world.vault.gate.set()
