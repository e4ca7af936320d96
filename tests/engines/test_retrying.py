"""Work that fails: tried again, singled out, kept, set aside."""

import random
from collections.abc import Sequence
from typing import Any

import anyio
import msgspec
import pytest

from kimera_stream.core.interfaces import Matrix, OutcomeUnknownError, PublishResult
from kimera_stream.core.kept import CheckpointRequest, DeadLetter
from kimera_stream.engines import retrying
from kimera_stream.engines.retrying import IN_A_ROW, DefectError, Patience
from kimera_stream.engines.work import PublishWork
from kimera_stream.protocol.errors import InternalError, NotFoundError, UnavailableError
from kimera_stream.protocol.objects import GeoidBody
from tests.engines.world import ANNA, World, outcome, together

pytestmark = pytest.mark.anyio

AWAY = UnavailableError("the database cannot be reached")
PATIENT = {"retry_within": 60.0, "retry_poll": 0.01}


def state(n: int, **fields: Any) -> GeoidBody:
    return GeoidBody(symbolic_state={f"k{n}": n}, **fields)


def request(n: int, **fields: Any) -> CheckpointRequest:
    body = fields.pop("body", msgspec.json.encode(state(n, id=f"g{n}")))
    return CheckpointRequest("anna", body, key=f"key-{n}", accepted_at=5, **fields)


async def until(condition: Any) -> None:
    while not condition():  # noqa: ASYNC110 - nobody tells when a vault in memory changes
        await anyio.sleep(0.005)


def poison(world: World, text: str) -> None:
    """The planner meets a defect over every batch with this text in it."""
    look = world.engine.look

    async def broken(fresh: Any, **how: Any) -> Any:
        if any(stored.geoid.text == text for stored in fresh):
            raise ZeroDivisionError("a defect")
        return await look(fresh, **how)

    world.engine.look = broken  # type: ignore[method-assign]


# -- tried again -------------------------------------------------------------------------------------------------------------


async def test_a_vault_that_comes_back_in_time_is_never_noticed() -> None:
    world = World(performance=PATIENT)
    world.vault.faults = [AWAY, None, AWAY, AWAY]
    async with world.running() as pipeline:
        first = await pipeline.publish(state(1), principal=ANNA)
        second = await pipeline.publish(state(2), principal=ANNA)
    assert (first.offset, second.offset) == (1, 2)
    assert world.metrics.numbers().retries == 3
    assert world.metrics.numbers().refused == 0


async def test_an_encoder_that_comes_back_in_time_is_never_noticed() -> None:
    world = World(performance=PATIENT)
    world.encoder.fault = UnavailableError("encoder: out of order")
    async with world.running() as pipeline:
        result = await pipeline.publish(GeoidBody(text="Needs the encoder."), principal=ANNA)
    assert world.vault.stored[result.geoid.id].vector is not None
    assert world.metrics.numbers().retries == 1


async def test_keys_that_cannot_be_looked_up_at_first_are_looked_up_again() -> None:
    world = World(performance=PATIENT)
    idempotent, failures = world.vault.idempotent, [AWAY]

    async def flaky(*args: Any, **named: Any) -> Any:
        if failures:
            raise failures.pop()
        return await idempotent(*args, **named)

    async with world.running() as pipeline:
        first = await pipeline.publish(state(1), principal=ANNA, key="k")
        world.vault.idempotent = flaky  # type: ignore[method-assign]
        again = await pipeline.publish(state(1), principal=ANNA, key="k")
    assert (again.duplicate, again.offset) == (True, first.offset)


async def test_what_comes_after_waits_so_that_order_is_kept() -> None:
    world = World(performance=PATIENT)
    world.vault.faults = [AWAY, AWAY]
    async with world.running() as pipeline:
        calls = [
            pipeline.publish(GeoidBody(id="x", symbolic_state={"n": n}), principal=ANNA, session_id="s")
            for n in range(4)
        ]
        results = await together(*calls)
    assert [each.geoid.version for each in results] == [1, 2, 3, 4]
    assert world.vault.stored["x"].geoid.symbolic_state == {"n": 3}


async def test_who_has_waited_long_enough_is_told_and_the_rest_goes_on() -> None:
    world = World(performance={"retry_within": 0.05})
    world.vault.faults = [AWAY] * 1_000
    async with world.running() as pipeline:
        refused = await outcome(pipeline.publish(state(1), principal=ANNA))
        assert isinstance(refused, UnavailableError)
        world.vault.faults.clear()
        assert (await pipeline.publish(state(2), principal=ANNA)).offset == 1
        assert pipeline.waiting == 0
    assert world.metrics.numbers().retries > 0
    assert world.metrics.numbers().refused == 1


async def test_what_may_have_been_done_is_not_tried_again() -> None:
    world = World(performance=PATIENT)
    world.vault.faults = [OutcomeUnknownError("the outcome is not known")]
    async with world.running() as pipeline:
        refused = await outcome(pipeline.publish(state(1), principal=ANNA))
    assert refused.message == "the outcome is not known"
    assert world.vault.commits == []


async def test_a_stop_keeps_what_is_between_two_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    async def pause(_patience: Patience, _tries: int) -> None:
        await anyio.sleep_forever()  # or the next try may begin while the stop looks

    monkeypatch.setattr(Patience, "pause", pause)
    world = World(performance=PATIENT)
    world.vault.faults = [AWAY]
    async with world.running() as pipeline, anyio.create_task_group() as group:
        results: list[Any] = []

        async def publish() -> None:
            results.append(await outcome(pipeline.publish(state(1), principal=ANNA, key="k")))

        group.start_soon(publish)
        await until(lambda: world.metrics.numbers().retries and not world.pipeline._processing)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await pipeline.drain()
    assert "it is kept" in results[0].message
    assert [item.key for item in world.vault.checkpointed] == ["k"]


async def test_the_pauses_grow_and_nobody_pauses_as_long_as_another(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(retrying.anyio, "sleep", sleep)
    for tries, most in ((1, 0.05), (2, 0.1), (4, 0.4), (9, 1.0)):
        slept.clear()
        for seed in range(200):
            await Patience(1.0, rng=random.Random(seed)).pause(tries)
        assert most * 0.9 < max(slept) <= most
        assert min(slept) < most / 2
        assert len(set(slept)) > 100


async def test_each_failure_in_a_row_is_paused_after_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    paused: list[int] = []

    async def pause(_patience: Patience, tries: int) -> None:
        paused.append(tries)

    monkeypatch.setattr(Patience, "pause", pause)
    world = World(performance=PATIENT)
    embed, failures = world.encoder.embed_counted, [AWAY] * 3

    async def flaky(texts: Sequence[str]) -> tuple[Matrix, list[int]]:
        if failures:
            raise failures.pop()
        return await embed(texts)

    world.encoder.embed_counted = flaky  # type: ignore[method-assign]
    world.vault.faults = [AWAY] * 4
    async with world.running() as pipeline:
        await pipeline.publish(GeoidBody(text="Needs the encoder."), principal=ANNA)
        world.vault.faults = [AWAY]
        await pipeline.publish(state(1), principal=ANNA)
    assert paused == [1, 2, 3, 1, 2, 3, 4, 1]


# -- singled out -------------------------------------------------------------------------------------------------------------


async def test_a_statement_that_breaks_the_planner_goes_alone() -> None:
    world = World(performance=PATIENT)
    poison(world, "poison")
    bodies = [GeoidBody(text="poison" if n in (5, 13) else f"statement {n}") for n in range(20)]
    async with world.running() as pipeline:
        keys = [None if n == 5 else f"key-{n}" for n in range(20)]
        results = await together(
            *[pipeline.publish(body, principal=ANNA, key=key) for body, key in zip(bodies, keys, strict=True)]
        )
        again = await outcome(pipeline.publish(bodies[13], principal=ANNA, key="key-13"))
        await until(lambda: len(world.vault.letters) == 2)
        assert pipeline.waiting == 0
    assert [n for n, each in enumerate(results) if isinstance(each, InternalError)] == [5, 13]
    assert isinstance(again, InternalError)
    assert len({each.geoid.id for each in results if isinstance(each, PublishResult)} & set(world.vault.stored)) == 18
    assert world.crashes == []
    letter = world.vault.letters[0]
    assert (letter.request.key, letter.code, letter.request.attempts) == ("key-13", "internal", 1)
    assert msgspec.json.decode(letter.request.body)["text"] == "poison"
    assert abs(letter.request.accepted_at - world.now * 1000) < 60_000
    assert world.metrics.numbers().faults == 3


async def test_the_dead_letter_of_live_work_says_how_often_it_was_tried() -> None:
    world = World(performance=PATIENT)
    world.encoder.fault = AWAY
    look, failures = world.engine.look, [AWAY, AWAY, ZeroDivisionError("a defect")]

    async def broken(fresh: Any, **how: Any) -> Any:
        if any(stored.geoid.text == "poison" for stored in fresh):
            raise failures.pop(0)
        return await look(fresh, **how)

    world.engine.look = broken  # type: ignore[method-assign]
    async with world.running() as pipeline:
        await outcome(pipeline.publish(GeoidBody(text="poison"), principal=ANNA, key="k"))
        await until(lambda: world.vault.letters)
    assert failures == []
    (letter,) = world.vault.letters
    assert letter.request.attempts == 4, "once the encoder was away, twice the database, and then it met the defect"


async def test_a_statement_that_breaks_the_encoder_goes_alone() -> None:
    world = World(performance=PATIENT)
    embed = world.encoder.embed_counted

    async def broken(texts: Sequence[str]) -> tuple[Matrix, list[int]]:
        if "poison" in texts:
            raise ZeroDivisionError("a defect")
        if "refused" in texts:
            raise InternalError("the encoder has singled it out")
        return await embed(texts)

    world.encoder.embed_counted = broken  # type: ignore[method-assign]
    texts = ["a", "b", "poison", "c", "refused", "d"]
    async with world.running() as pipeline:
        results = await together(*[pipeline.publish(GeoidBody(text=text), principal=ANNA, key=text) for text in texts])
        await until(lambda: len(world.vault.letters) == 2)
    assert [getattr(each, "code", "") for each in results] == ["", "", "internal", "", "internal", ""]
    assert [each.offset for each in results if isinstance(each, PublishResult)] == [1, 2, 3, 4]
    assert sorted(each.request.key or "" for each in world.vault.letters) == ["poison", "refused"]
    assert world.crashes == []


async def test_a_key_that_breaks_the_look_up_goes_alone() -> None:
    world = World(performance=PATIENT)
    idempotent = world.vault.idempotent

    async def broken(principal: str, key: str, **named: Any) -> Any:
        if key == "poison":
            raise TypeError("no such type of column")
        return await idempotent(principal, key, **named)

    world.vault.idempotent = broken  # type: ignore[method-assign]
    async with world.running() as pipeline:
        keys = ["a", "poison", "b", None]
        results = await together(*[pipeline.publish(state(n), principal=ANNA, key=key) for n, key in enumerate(keys)])
        await until(lambda: world.vault.letters)
    assert [getattr(each, "code", "") for each in results] == ["", "internal", "", ""]
    assert world.crashes == []


async def test_a_statement_that_breaks_the_commit_goes_alone() -> None:
    world = World(performance=PATIENT)
    commit = world.vault.commit

    async def broken(batch: Any) -> None:
        if any(stored.geoid.text == "poison" for stored in batch.geoids):
            raise TypeError("no such type of column")
        await commit(batch)

    world.vault.commit = broken  # type: ignore[method-assign]
    async with world.running() as pipeline:
        results = await together(
            *[pipeline.publish(GeoidBody(text=text), principal=ANNA) for text in ("a", "poison", "b")]
        )
    assert [getattr(each, "offset", None) for each in results] == [1, None, 2]
    assert world.crashes == []


async def test_a_commit_that_fails_after_the_fact_is_not_repeated() -> None:
    world = World(performance=PATIENT)
    commit = world.vault.commit

    async def broken(batch: Any) -> None:
        world.vault.commit = commit  # type: ignore[method-assign]
        await commit(batch)
        raise TypeError("afterwards")

    world.vault.commit = broken  # type: ignore[method-assign]
    async with world.running() as pipeline:
        lost = await outcome(pipeline.publish(state(1), principal=ANNA, key="k"))
        assert isinstance(lost, InternalError)
        assert (await pipeline.publish(state(1), principal=ANNA, key="k")).duplicate
    assert len(world.crashes) == 1
    assert len(world.vault.stored) == 1


async def test_a_defect_that_lets_nothing_through_reaches_the_supervisor_and_answers_everyone() -> None:
    world = World()
    world.vault.faults = [RuntimeError("a defect")] * 1_000
    count = IN_A_ROW + 5
    async with world.running() as pipeline:
        results = await together(*[pipeline.publish(state(n), principal=ANNA, key=f"k{n}") for n in range(count)])
        assert [type(each) for each in results] == [DefectError] * IN_A_ROW + [InternalError] * 5
        world.vault.faults.clear()
        again = await together(*[pipeline.publish(state(n), principal=ANNA, key=f"k{n}") for n in range(count)])
        assert [each.offset for each in again] == list(range(1, count + 1))
        assert pipeline.waiting == 0
    assert len(world.crashes) == 1


# -- kept and set aside ------------------------------------------------------------------------------------------------------


async def test_kept_work_is_put_off_and_in_the_end_set_aside() -> None:
    world = World(performance={"retry_poll": 0.01, "max_attempts": 3})
    world.encoder.fault = UnavailableError("encoder: out of order")
    await world.vault.save_checkpoint([request(1, body=b'{"text":"needs the encoder"}'), request(2)])
    async with world.running():
        for tries in (1, 2):
            # Held for 60 s while it is worked on; once it is put off, for less.
            await until(
                lambda: [0 < held - world.now * 1000 < 59_000 for _, held in world.vault.kept.values()] == [True]
            )
            assert [each.attempts for each in world.vault.checkpointed] == [tries]
            assert world.vault.letters == []
            world.encoder.fault = UnavailableError("encoder: out of order")
            world.now += 200
            await until(lambda n=tries: len(world.encoder.calls) == n + 1)
        await until(lambda: world.vault.letters)
    assert set(world.vault.stored) == {"g2"}
    assert world.vault.checkpointed == []
    (letter,) = world.vault.letters
    assert (letter.request.key, letter.request.attempts, letter.code) == ("key-1", 3, "unavailable")
    assert letter.message == "encoder: out of order"


async def test_kept_work_is_put_off_the_longer_the_more_often_it_failed_and_not_all_of_it_alike() -> None:
    world = World(performance={"retry_poll": 0.01})

    async def away(texts: Sequence[str]) -> tuple[Matrix, list[int]]:
        raise AWAY

    world.encoder.embed_counted = away  # type: ignore[method-assign]
    bodies = [msgspec.json.encode(GeoidBody(text=f"text {n}")) for n in range(80)]
    # Every second one failed twice before: this is its third attempt.
    await world.vault.save_checkpoint([request(n, body=body, attempts=n % 2 * 2) for n, body in enumerate(bodies)])
    async with world.running():
        await until(lambda: all(0 < held - world.now * 1000 < 59_000 for _, held in world.vault.kept.values()))
    for attempts, most in ((1, 2_000), (3, 8_000)):
        delays = [held - world.now * 1000 for each, held in world.vault.kept.values() if each.attempts == attempts]
        assert len(delays) == 40
        assert 0.7 * most < max(delays) <= most
        assert 1_000 <= min(delays) < 0.8 * most
        assert len(set(delays)) > 20


async def test_kept_work_that_cannot_be_done_is_set_aside_at_once() -> None:
    world = World(performance=PATIENT)
    await world.vault.save_checkpoint(
        [
            request(1, must_exist=True),
            request(2, body=b'{"vector":[1,2,3]}'),
            request(3, body=b"{"),
            request(4, attempts=5),
            request(5),
        ]
    )
    async with world.running():
        await until(lambda: len(world.vault.letters) == 4 and not world.vault.checkpointed)
    assert {letter.request.key: letter.code for letter in world.vault.letters} == {
        "key-1": "not_found",
        "key-2": "bad_request",
        "key-3": "internal",
        "key-4": "internal",
    }
    assert set(world.vault.stored) == {"g5"}
    (hopeless,) = [letter for letter in world.vault.letters if letter.request.key == "key-4"]
    assert "none of 5 attempts" in hopeless.message
    assert hopeless.request.attempts == 5


async def test_kept_work_that_was_done_already_is_forgotten() -> None:
    world = World(performance=PATIENT)
    async with world.running() as pipeline:
        first = await pipeline.publish(state(1, id="g1"), principal=ANNA, key="key-1")
        await world.vault.save_checkpoint([request(1)])
        await until(lambda: not world.vault.checkpointed)
    assert world.vault.stored["g1"].geoid.offset == first.offset


async def test_kept_work_waits_for_the_same_key_and_for_room() -> None:
    world = World(performance={**PATIENT, "queue_items": 1})
    world.vault.gate = anyio.Event()
    results: list[Any] = []
    async with world.running() as pipeline, anyio.create_task_group() as group:

        async def publish() -> None:
            results.append(await pipeline.publish(state(1, id="g1"), principal=ANNA, key="key-1"))

        group.start_soon(publish)
        await anyio.wait_all_tasks_blocked()
        await world.vault.save_checkpoint([request(1), request(2)])
        await until(lambda: len([held for _, held in world.vault.kept.values() if held]) == 2)
        assert [each.attempts for each in world.vault.checkpointed] == [0, 0], "that was no attempt"
        world.vault.gate.set()
        while world.vault.checkpointed:
            world.now += 1
            await anyio.sleep(0.005)
    assert {each: stored.geoid.version for each, stored in world.vault.stored.items()} == {"g1": 1, "g2": 1}


async def test_a_stop_gives_back_kept_work_that_was_not_reached() -> None:
    world = World(database={"group_commit_max": 1}, performance=PATIENT)
    world.vault.gate = anyio.Event()
    await world.vault.save_checkpoint([request(n) for n in range(6)])
    async with world.running() as pipeline:
        await anyio.wait_all_tasks_blocked()
        with anyio.CancelScope() as scope:
            scope.cancel()
            await pipeline.drain()
        world.vault.gate.set()
        await until(lambda: world.vault.commits)
    assert [(item.key, item.attempts, held) for item, held in world.vault.kept.values()] == [
        (f"key-{n}", 0, 0) for n in range(1, 6)
    ]


async def test_a_crash_counts_as_an_attempt() -> None:
    world = World(performance=PATIENT)
    await world.vault.save_checkpoint([request(1)])
    world.sequencer.process = _raising(world.sequencer.process, 2)  # type: ignore[method-assign]
    async with world.running():
        await until(lambda: world.vault.stored)
    assert len(world.crashes) == 2
    assert world.vault.checkpointed == []


def _raising(process: Any, times: int) -> Any:
    left = [ZeroDivisionError("a defect")] * times

    async def broken(group: list[PublishWork]) -> Any:
        if left:
            raise left.pop()
        return await process(group)

    return broken


async def test_a_dead_letter_that_could_not_be_kept_is_kept_once_the_vault_is_back() -> None:
    world = World(performance=PATIENT)
    poison(world, "poison")
    world.vault.away = AWAY
    async with world.running() as pipeline:
        refused = await outcome(pipeline.publish(GeoidBody(text="poison"), principal=ANNA, key="k"))
        assert isinstance(refused, InternalError)
        await anyio.sleep(0.03)
        assert world.vault.letters == []
        world.vault.away = None
        await until(lambda: world.vault.letters)


async def test_dead_letters_are_bounded_and_counted() -> None:
    world = World(performance={**PATIENT, "dead_letters": 2})
    poison(world, "poison")
    async with world.running() as pipeline:
        for n in range(4):
            await outcome(pipeline.publish(GeoidBody(text="poison"), principal=ANNA, key=f"k{n}"))
            await until(lambda n=n: any(letter.request.key == f"k{n}" for letter in world.vault.letters))
        await until(lambda: world.metrics.numbers().dead_letters == 2)
    assert [letter.request.key for letter in world.vault.letters] == ["k2", "k3"]
    assert world.metrics.numbers().dead_letters_dropped == 2


def test_the_answers_of_a_ticket_can_be_looked_at() -> None:
    world = World()
    ticket = world.pipeline._ticket(ANNA, None)
    assert (ticket.result, ticket.error) == (None, None)
    ticket.refuse(NotFoundError("no"))
    assert isinstance(ticket.error, NotFoundError)
    assert DeadLetter(request(1), 1, "internal", "m").id == 0
