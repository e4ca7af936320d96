"""The bus keeps its promises, in memory and on Redis alike. What it does in the face of faults is in ``test_bus_faults.py``."""

import contextlib
import os
import random
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable
from functools import partial
from urllib.parse import urlsplit

import anyio
import pytest
from prometheus_client import CollectorRegistry

from kimera_stream.infrastructure.bus.interface import LOG, NUDGE, Bus, Follower, Lost, Message, Work, Worker, replies
from kimera_stream.infrastructure.bus.memory import MemoryBroker, MemoryBus
from kimera_stream.infrastructure.bus.metrics import BusCollector
from kimera_stream.infrastructure.bus.redis import RedisBus
from kimera_stream.infrastructure.settings_model import BusSettings
from kimera_stream.infrastructure.tasks import Service, ServiceSpec
from kimera_stream.protocol.errors import NotFoundError, OverloadedError, UnavailableError

pytestmark = pytest.mark.anyio

REDIS = os.environ.get("KIMERA_TEST_REDIS_URL", "redis://127.0.0.1:6379/0")
Start = Callable[..., contextlib.AbstractAsyncContextManager[Bus]]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what is waited for sets no event
        await anyio.sleep(0.005)


@contextlib.asynccontextmanager
async def serving(bus: Bus) -> AsyncIterator[Bus]:
    """``bus`` at work, in contact if it can be."""
    async with anyio.create_task_group() as group:
        service = Service(ServiceSpec("bus", bus.serve))
        group.start_soon(bus.serve, service, name="serve")
        try:
            with anyio.fail_after(10):
                await service.became_ready.wait()
                await until(lambda: bus.connected)
            yield bus
        finally:
            group.cancel_scope.cancel()


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.redis)])
async def start(request: pytest.FixtureRequest) -> AsyncIterator[Start]:
    """Starts a node's bus; those of one test hear each other."""
    if request.param == "memory":
        broker = MemoryBroker()
        yield lambda node, **settings: serving(MemoryBus(broker, node, BusSettings(**settings)))
        return
    address = urlsplit(REDIS)
    try:
        async with await anyio.connect_tcp(address.hostname or "", address.port or 6379):
            pass
    except OSError:
        pytest.skip("needs a Redis server")
    prefix = f"test-{uuid.uuid4().hex}:"
    yield lambda node, **settings: serving(RedisBus(BusSettings(url=REDIS, prefix=prefix, **settings), node))
    listed = await anyio.run_process(["redis-cli", "-u", REDIS, "--scan", "--pattern", f"{prefix}*"])
    if keys := listed.stdout.decode().split():
        await anyio.run_process(["redis-cli", "-u", REDIS, "DEL", *keys])


async def take(worker: Worker, count: int) -> list[Work]:
    works: list[Work] = []
    with anyio.fail_after(20):
        while len(works) < count:
            works += await worker.receive()
    return works


async def hear(follower: Follower, count: int) -> list[Message | Lost]:
    heard: list[Message | Lost] = []
    with anyio.fail_after(20):
        while len(heard) < count:
            heard += await follower.receive()
    return heard


def messages(heard: list[Message | Lost]) -> list[Message]:
    """Without the ``Lost`` with which a topic begins that nobody had used."""
    return [item for item in heard if isinstance(item, Message)]


# work


async def test_work_arrives_once_in_the_order_of_the_calls_and_is_gone_when_done(start: Start) -> None:
    async with start("edge") as edge, start("engine") as engine, engine.worker() as worker:
        worker.take(3)
        for number in range(300):
            await edge.add(3, f"r{number}", f"p{number}".encode())
        works = await take(worker, 300)
        assert [work.request for work in works] == [f"r{number}" for number in range(300)]
        assert [work.payload for work in works] == [f"p{number}".encode() for number in range(300)]
        assert {(work.partition, work.reply_to, work.again) for work in works} == {(3, "edge", False)}
        assert sorted({work.id for work in works}) is not None
        assert await edge.depth(3) == 300
        await worker.done(works[:100])
        assert await edge.depth(3) == 200
        await worker.done(works[100:])
        assert await edge.depth(3) == 0


async def test_concurrent_calls_of_one_task_group_keep_their_order(start: Start) -> None:
    async with start("edge") as edge, edge.worker() as worker:
        worker.take(0)
        async with anyio.create_task_group() as group:
            for number in range(200):
                group.start_soon(edge.add, 0, f"r{number}", b"x")
        assert [work.request for work in await take(worker, 200)] == [f"r{number}" for number in range(200)]


async def test_a_worker_reads_only_what_it_took(start: Start) -> None:
    async with (
        start("edge") as edge,
        start("one") as one,
        start("two") as two,
        one.worker() as first,
        two.worker() as second,
    ):
        first.take(0)
        first.take(1)
        second.take(2)
        assert first.partitions == {0, 1}
        for partition in (0, 1, 2):
            await edge.add(partition, f"r{partition}", b"x")
        assert {work.request for work in await take(first, 2)} == {"r0", "r1"}
        assert [work.request for work in await take(second, 1)] == ["r2"]


async def test_the_next_owner_gets_what_was_left_first_and_in_order(start: Start) -> None:
    async with (
        start("edge") as edge,
        start("one") as one,
        start("two") as two,
        one.worker() as first,
        two.worker() as second,
    ):
        first.take(0)
        for number in range(20):
            await edge.add(0, f"r{number}", b"x")
        works = await take(first, 20)
        await first.done(works[::2])
        await first.give(0)
        assert first.partitions == frozenset()
        await edge.add(0, "new", b"x")
        second.take(0)
        taken = await take(second, 11)
        assert [work.request for work in taken] == [f"r{number}" for number in range(1, 20, 2)] + ["new"]
        assert [work.again for work in taken[:10]] == [True] * 10
        await second.done(taken)
        assert await edge.depth(0) == 0


async def test_a_given_partition_is_not_read_any_more(start: Start) -> None:
    async with (
        start("edge") as edge,
        start("one") as one,
        start("two") as two,
        one.worker() as first,
        two.worker() as second,
    ):
        for number in range(30):  # the worker is in the midst of a waiting read each time
            first.take(0)
            await edge.add(0, f"a{number}", b"x")
            await first.done(await take(first, 1))
            await first.give(0)
            await edge.add(0, f"b{number}", b"x")
            second.take(0)
            works = await take(second, 1)
            assert [(work.request, work.again) for work in works] == [(f"b{number}", False)]
            await second.done(works)
            await second.give(0)


@pytest.mark.parametrize("seed", [1, 2])
async def test_partitions_that_change_hands_under_load_lose_and_reorder_nothing(start: Start, seed: int) -> None:
    """Nothing is claimed later here: what is dropped on the way does not come at all."""
    dice = random.Random(seed)
    partitions, pieces = 8, 400
    owner: dict[int, str] = {}
    tenure = Counter[int]()
    seen: dict[int, list[int]] = {partition: [] for partition in range(partitions)}
    async with (
        start("edge") as edge,
        start("one", claim_after=10_000) as one,
        start("two", claim_after=10_000) as two,
        one.worker() as first,
        two.worker() as second,
        anyio.create_task_group() as group,
    ):
        workers = {"one": first, "two": second}

        async def consume(name: str) -> None:
            while True:
                works = await workers[name].receive()
                begun = {work.partition: tenure[work.partition] for work in works}
                for work in works:
                    if (
                        owner.get(work.partition) == name and tenure[work.partition] == begun[work.partition]
                    ):  # else it is handed out again
                        if int(work.request) not in seen[work.partition]:
                            seen[work.partition].append(int(work.request))
                        await workers[name].done([work])

        async def change_hands() -> None:
            while True:
                for partition in dice.sample(range(partitions), dice.randint(1, 4)):
                    before = owner.pop(partition, None)
                    if before is not None:
                        await workers[before].give(partition)
                    tenure[partition] += 1
                    owner[partition] = "two" if before == "one" else "one"
                    workers[owner[partition]].take(partition)
                await anyio.sleep(dice.random() * 0.03)

        for run in (partial(consume, "one"), partial(consume, "two"), change_hands):
            group.start_soon(run)
        for number in range(pieces):
            await edge.add(number % partitions, str(number), b"x")
            if number % 20 == 0:
                await anyio.sleep(dice.random() * 0.01)
        with anyio.fail_after(20):
            await until(lambda: sum(map(len, seen.values())) == pieces)
        group.cancel_scope.cancel()
    assert seen == {partition: list(range(partition, pieces, partitions)) for partition in range(partitions)}


async def test_work_left_by_a_worker_that_is_gone_is_claimed(start: Start) -> None:
    async with start("edge") as edge, start("two") as two:
        async with start("one") as one, one.worker() as first:
            first.take(0)
            for number in range(500):
                await edge.add(0, f"r{number}", b"x")
            await take(first, 200)
        async with two.worker() as second:
            second.take(0)
            assert [work.request for work in await take(second, 500)] == [f"r{number}" for number in range(500)]


async def test_a_restarted_worker_claims_its_own_work(start: Start) -> None:
    async with start("edge") as edge:
        async with start("one") as one, one.worker() as worker:
            worker.take(0)
            await edge.add(0, "r", b"x")
            await take(worker, 1)
        async with start("one") as one, one.worker() as worker:
            worker.take(0)
            assert [(work.request, work.again) for work in await take(worker, 1)] == [("r", True)]


async def test_released_work_comes_again(start: Start) -> None:
    async with start("edge", claim_after=0.2) as edge, edge.worker() as worker:
        worker.take(0)
        await edge.add(0, "r", b"x")
        worker.release(await take(worker, 1))
        works = await take(worker, 1)
        assert [(work.request, work.again) for work in works] == [("r", True)]
        await worker.done(works)
        assert await edge.depth(0) == 0


async def test_work_that_a_former_owner_took_in_between_is_claimed_after_a_while(start: Start) -> None:
    async with (
        start("edge") as edge,
        start("zombie") as zombie,
        start("two", claim_after=0.3) as two,
        zombie.worker() as first,
        two.worker() as second,
    ):
        second.take(0)
        first.take(0)  # it believes that it still owns it
        async with anyio.create_task_group() as group:
            for number in range(40):
                group.start_soon(edge.add, 0, f"r{number}", b"x")
        requests: set[str] = set()
        with anyio.fail_after(20):
            while len(requests) < 40:  # whatever the other one took, unless it finishes it
                works = await second.receive()
                requests |= {work.request for work in works}
                await second.done(works)
        assert await edge.depth(0) == 0


async def test_work_under_way_is_not_handed_out_twice(start: Start) -> None:
    async with start("edge", claim_after=0.02) as edge, edge.worker() as worker:
        worker.take(0)
        await edge.add(0, "r", b"x")
        works = await take(worker, 1)
        for number in range(10):  # each makes the worker look again
            await anyio.sleep(0.03)
            await edge.add(0, f"r{number}", b"x")
            works += await take(worker, 1)
        assert [work.request for work in works] == ["r", *(f"r{number}" for number in range(10))]
        await worker.done(works)
        assert await edge.depth(0) == 0


async def test_a_full_partition_refuses(start: Start) -> None:
    async with start("edge", work_items=10) as edge, edge.worker() as worker:
        for number in range(10):
            await edge.add(0, f"r{number}", b"x")
        with pytest.raises(OverloadedError) as refused:
            await edge.add(0, "r10", b"x")
        assert refused.value.retry_after
        await edge.add(1, "r", b"x")  # another partition has room
        worker.take(0)
        await worker.done(await take(worker, 1))
        await edge.add(0, "r11", b"x")


async def fill(bus: Bus, of: str, room: int) -> None:
    """Add what fits of a principal's, which is ``room``."""
    for number in range(room):
        await bus.add(0, f"{of}-{number}", b"x", of=of)
    with pytest.raises(OverloadedError) as refused:
        await bus.add(0, f"{of}-{room}", b"x", of=of)
    assert refused.value.retry_after


async def test_no_principal_starves_the_others_of_a_partition(start: Start) -> None:
    """Wherever it adds: each may hold as much as it leaves free."""
    async with start("one", work_items=12) as one, start("two", work_items=12) as two, two.worker() as worker:
        await fill(one, "greedy", 6)
        await fill(two, "greedy", 0)
        await fill(one, "ben", 3)
        await fill(two, "ann", 2)
        await fill(one, "cyd", 1)
        worker.take(0)
        works = await take(worker, 12)
        assert [work.of for work in works] == [*["greedy"] * 6, *["ben"] * 3, "ann", "ann", "cyd"]
        await worker.done(works[:6])  # their share is theirs again, and no more than that
        await worker.done(works[:6])
        await fill(one, "greedy", 3)
        await worker.done(works[6:])
        await worker.done(await take(worker, 3))
        for bus in (one, two):
            assert await bus.depth(0) == 0
        await fill(two, "greedy", 6)


async def test_what_one_principal_is_refused_is_not_refused_to_others(start: Start) -> None:
    """Though all of it is on its way before the node knows of the refusal."""
    kept: list[str] = []

    async def add(of: str, number: int) -> None:
        with contextlib.suppress(OverloadedError):
            await edge.add(0, f"{of}-{number}", b"x", of=of)
            kept.append(of)

    async with start("edge", work_items=12) as edge, anyio.create_task_group() as group:
        for number in range(8):
            group.start_soon(add, "greedy", number)
        for number in range(2):
            group.start_soon(add, "ben", number)
    assert kept == [*["greedy"] * 6, *["ben"] * 2]


async def test_what_is_added_behind_something_that_found_no_room_is_refused_as_well(start: Start) -> None:
    refused: set[str] = set()

    async def add(request: str) -> None:
        try:
            await edge.add(0, request, b"x")
        except OverloadedError:
            refused.add(request)

    async with start("edge", work_items=2) as edge, edge.worker() as worker:
        worker.take(0)
        for request in ("a", "b"):
            await edge.add(0, request, b"x")
        works = await take(worker, 2)
        async with (
            anyio.create_task_group() as group
        ):  # sent in one go: the answer to the first comes after all of them
            group.start_soon(add, "c")
            group.start_soon(worker.done, works)
            group.start_soon(add, "d")
            group.start_soon(add, "e")
        assert refused == ({"c"} if isinstance(edge, MemoryBus) else {"c", "d", "e"}), (
            "calls in memory are over at once"
        )
        await worker.done(await take(worker, 3 - len(refused)))
        await edge.add(0, "f", b"x")
        assert [work.request for work in await take(worker, 1)] == ["f"]


# topics


async def test_every_follower_hears_every_message_in_order(start: Start) -> None:
    async with (
        start("one") as one,
        start("two") as two,
        one.follow(LOG) as here,
        two.follow(LOG, replies("two")) as there,
    ):
        for number in range(500):
            one.publish(LOG, f"m{number}".encode())
            one.publish(replies("two"), f"a{number}".encode())
            one.publish(replies("one"), b"not for two")
        spoken = [f"m{number}".encode() for number in range(500)]
        heard = messages(await hear(here, 501 if isinstance(one, RedisBus) else 500))
        assert [message.payload for message in heard] == spoken
        heard = messages(await hear(there, 1002 if isinstance(one, RedisBus) else 1000))
        assert [message.payload for message in heard if message.topic == LOG] == spoken
        answers = [message.payload for message in heard if message.topic == replies("two")]
        assert answers == [f"a{number}".encode() for number in range(500)]


async def test_a_follower_begins_with_what_comes(start: Start) -> None:
    async with start("one") as one:
        one.publish(LOG, b"before")
        await one.depth(0)  # operations are in order: the message is there
        async with one.follow(LOG) as follower:
            one.publish(LOG, b"after")
            assert await hear(follower, 1) == [Message(LOG, b"after")]


async def test_a_message_too_large_is_told_as_lost(start: Start) -> None:
    async with start("one", message_bytes=1024) as one, start("two") as two:
        one.publish(LOG, b"before")
        await one.depth(0)
        async with two.follow(LOG, NUDGE) as follower:
            one.publish(LOG, b"x" * 2000)
            assert await hear(follower, 1) == [Lost(LOG)]
            one.publish(LOG, b"y")
            assert await hear(follower, 1) == [Message(LOG, b"y")]


async def test_a_loss_on_a_quiet_topic_is_told_while_another_topic_is_busy(start: Start) -> None:
    async with start("one", message_bytes=1024) as one, start("two") as two:
        one.publish(NUDGE, b"before")
        await one.depth(0)
        async with two.follow(LOG, NUDGE) as follower:
            one.publish(NUDGE, b"x" * 2000)
            heard: list[Message | Lost] = []
            with anyio.fail_after(10):
                while Lost(NUDGE) not in heard:
                    one.publish(LOG, b"m")
                    heard += await follower.receive()


# questions


async def test_questions_are_answered_by_the_named_node(start: Start) -> None:
    async with start("one") as one, start("two") as two, start("three") as three:

        def answer(name: str) -> None:
            async def answerer(payload: bytes) -> bytes:
                return name.encode() + payload

            buses[name].answer_with("name", answerer)

        buses = {"one": one, "two": two, "three": three}
        for name in buses:
            answer(name)
        for name in buses:
            assert await one.ask(name, "name", b"!", within=10) == name.encode() + b"!"
        async with anyio.create_task_group() as group:  # many at once, each gets its own answer

            async def ask(number: int) -> None:
                assert await one.ask("two", "name", str(number).encode(), within=10) == b"two%d" % number

            for number in range(50):
                group.start_soon(ask, number)


async def test_errors_travel_with_answers(start: Start) -> None:
    async with start("one") as one, start("two") as two:

        async def missing(_payload: bytes) -> bytes:
            raise NotFoundError("no such geoid", field="id", retry_after=3.0)

        two.answer_with("find", missing)
        with pytest.raises(NotFoundError, match="no such geoid") as found:
            await one.ask("two", "find", b"", within=10)
        assert (found.value.field, found.value.retry_after) == ("id", 3.0)
        with pytest.raises(UnavailableError, match="does not answer"):
            await one.ask("two", "sing", b"", within=10)
        with pytest.raises(UnavailableError, match="did not answer within"):
            await one.ask("nobody", "find", b"", within=0.1)


async def test_too_many_questions_are_refused(start: Start) -> None:
    async with start("one") as one, start("two", questions=2) as two:
        go_on, under_way = anyio.Event(), 0

        async def slow(payload: bytes) -> bytes:
            nonlocal under_way
            under_way += 1
            await go_on.wait()
            return payload

        two.answer_with("slow", slow)
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: one.ask("two", "slow", b"", within=10))
            group.start_soon(lambda: one.ask("two", "slow", b"", within=10))
            with anyio.fail_after(10):
                await until(lambda: under_way == 2)
            with pytest.raises(OverloadedError):
                await one.ask("two", "slow", b"", within=10)
            go_on.set()
        assert await one.ask("two", "slow", b"again", within=10) == b"again"


# shared values


async def gathered(bus: Bus, wanted: dict[str, bytes], space: str = "presence", key: str = "room") -> None:
    """Waits until ``bus`` sees ``wanted``."""
    seen: dict[str, bytes] | None = None
    with anyio.move_on_after(20):
        while (seen := await bus.gather(space, key)) != wanted:  # noqa: ASYNC110 - another node's doing
            await anyio.sleep(0.01)
    assert seen == wanted


async def test_shared_values_are_seen_by_all_and_vanish_with_their_node(start: Start) -> None:
    async with start("one") as one:
        one.share("presence", "room", b"1")
        one.share("connections", "room", b"other space")
        assert await one.gather("presence", "room") == {"one": b"1"}
        async with start("two") as two:
            two.share("presence", "room", b"2")
            await gathered(one, {"one": b"1", "two": b"2"})
            await gathered(two, {"one": b"1", "two": b"2"})
            two.share("presence", "room", b"3")
            await gathered(one, {"one": b"1", "two": b"3"})
            one.share("presence", "room", None)
            await gathered(two, {"two": b"3"})
        await gathered(one, {})


async def test_the_numbers_are_metrics(start: Start) -> None:
    registry = CollectorRegistry()
    async with start("one") as one:
        BusCollector(one, registry)
        assert registry.get_sample_value("kimera_bus_connected") == 1.0
        if isinstance(one, RedisBus):
            before = registry.get_sample_value("kimera_bus_sent_total") or 0.0
            await one.add(0, "r", b"x")
            assert (registry.get_sample_value("kimera_bus_sent_total") or 0.0) > before
