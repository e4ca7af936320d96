"""Redis flushed, killed, frozen, absent, full: the bus refuses in time, comes back by itself, and no follower misses anything without being told."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import anyio
import pytest
from structlog.testing import capture_logs

from kimera_stream.infrastructure.bus import following, working
from kimera_stream.infrastructure.bus.following import RedisFollower
from kimera_stream.infrastructure.bus.interface import (
    LOG,
    NUDGE,
    PROGRESS,
    Follower,
    Lost,
    Message,
    Work,
    Worker,
    replies,
)
from kimera_stream.infrastructure.bus.redis import RedisBus
from kimera_stream.infrastructure.settings_model import BusSettings
from kimera_stream.infrastructure.tasks import Service, ServiceSpec
from kimera_stream.protocol.errors import OverloadedError, UnavailableError
from tests.infrastructure.redis_servers import HAS_SERVER, OwnRedis

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.redis,
    pytest.mark.skipif(not HAS_SERVER, reason="needs the redis-server binary"),
]
TIMEOUT = 0.5
T = TypeVar("T")


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[OwnRedis]:
    server = OwnRedis(tmp_path)
    await server.start()
    yield server
    await server.stop()


@contextlib.asynccontextmanager
async def serving(redis: OwnRedis, node: str, *, contact: bool = True, **settings: object) -> AsyncIterator[RedisBus]:
    bus = RedisBus(BusSettings(url=redis.url, timeout=TIMEOUT, **settings), node)  # type: ignore[arg-type]
    async with anyio.create_task_group() as group:
        service = Service(ServiceSpec("bus", bus.serve))
        group.start_soon(bus.serve, service, name="serve")
        try:
            with anyio.fail_after(20):
                await service.became_ready.wait()
                await until(lambda: bus.connected is contact)
            yield bus
        finally:
            group.cancel_scope.cancel()


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(30):
        while not condition():  # noqa: ASYNC110 - what is waited for sets no event
            await anyio.sleep(0.005)


async def retried(operation: Callable[[], Awaitable[T]]) -> T:
    """Tries again while Redis is away, as an edge does."""
    with anyio.fail_after(30):
        while True:
            try:
                return await operation()
            except UnavailableError:
                await anyio.sleep(0.01)


async def take(worker: Worker, count: int) -> list[Work]:
    works: list[Work] = []
    with anyio.fail_after(30):
        while len(works) < count:
            works += await worker.receive()
    return works


async def emptied(bus: RedisBus, *partitions: int) -> None:
    """Waits until nothing is left there. What was done while Redis was away is acknowledged a moment after it is back, and
    a bus that said nothing meanwhile may notice only now that it was away."""
    with anyio.fail_after(30):
        while any([await retried(partial(bus.depth, partition)) for partition in partitions]):  # noqa: ASYNC110 - in another process
            await anyio.sleep(0.01)


async def hear_until(follower: Follower, last: Message | Lost) -> list[Message | Lost]:
    heard: list[Message | Lost] = []
    with anyio.fail_after(30):
        while not heard or heard[-1] != last:
            heard += await follower.receive()
    return heard


async def told_lost(follower: Follower, *topics: str) -> None:
    """Waits until ``follower`` was told of a loss on each topic."""
    missing = set(topics)
    with anyio.fail_after(30):
        while missing:
            missing -= {item.topic for item in await follower.receive() if isinstance(item, Lost)}


# flushed and killed


async def flush(redis: OwnRedis) -> None:
    await redis.command("FLUSHALL")


async def restart(redis: OwnRedis) -> None:
    await redis.stop()
    await redis.start()


@pytest.fixture(params=[flush, restart])
def lose_all(request: pytest.FixtureRequest) -> Callable[[OwnRedis], Awaitable[None]]:
    lose: Callable[[OwnRedis], Awaitable[None]] = request.param
    return lose


async def test_work_goes_on_after_redis_lost_everything(
    redis: OwnRedis, lose_all: Callable[[OwnRedis], Awaitable[None]]
) -> None:
    async with serving(redis, "edge") as edge, serving(redis, "engine") as engine, engine.worker() as worker:
        worker.take(0)
        worker.take(1)
        await edge.add(0, "before", b"x")
        under_way = await take(worker, 1)
        for round_ in range(3):
            await lose_all(redis)
            for number in range(10):  # at once, whether or not the groups are there again
                await retried(lambda n=number, r=round_: edge.add(n % 2, f"{r}-{n}", b"x"))  # type: ignore[misc]
            requests: set[str] = set()
            with anyio.fail_after(30):
                while len(requests) < 10:
                    works = await worker.receive()
                    requests |= {work.request for work in works}
                    await worker.done(works)
            assert requests == {f"{round_}-{number}" for number in range(10)}
        await worker.done(under_way)  # long gone there: nothing happens
        await emptied(edge, 0, 1)


async def test_followers_of_quiet_topics_are_told_that_redis_lost_everything(
    redis: OwnRedis, lose_all: Callable[[OwnRedis], Awaitable[None]]
) -> None:
    async with serving(redis, "one") as one, one.follow(LOG, PROGRESS, replies("one")) as follower:
        one.publish(LOG, b"said")
        await hear_until(follower, Message(LOG, b"said"))
        await lose_all(redis)
        await told_lost(follower, LOG, PROGRESS, replies("one"))  # one was used, two never were
        await until(lambda: one.connected)
        one.publish(PROGRESS, b"after")
        await hear_until(follower, Message(PROGRESS, b"after"))


async def test_nothing_is_missing_without_a_word(
    redis: OwnRedis, lose_all: Callable[[OwnRedis], Awaitable[None]]
) -> None:
    """Numbers are said while Redis loses everything again and again: wherever one is not the next, ``Lost`` stands before it."""
    async with (
        serving(redis, "one") as one,
        serving(redis, "two") as two,
        two.follow(LOG) as follower,
        anyio.create_task_group() as group,
    ):
        done, heard_end = anyio.Event(), anyio.Event()
        said = 0

        async def say() -> None:
            nonlocal said
            while not done.is_set():
                one.publish(LOG, b"%d" % said)
                said += 1
                await anyio.sleep(0.0005)
            while not heard_end.is_set():  # the other's contact may come back later
                one.publish(LOG, b"end")
                await anyio.sleep(0.02)

        heard: list[Message | Lost] = []
        fresh = 0
        enough = anyio.Event()

        async def trouble() -> None:
            nonlocal fresh, enough
            for _ in range(4):
                await enough.wait()
                await lose_all(redis)
                fresh, enough = 0, anyio.Event()
            done.set()

        async def listen() -> None:  # each loss waits until fifty numbers have come since the one before
            nonlocal fresh
            while not heard or heard[-1] != Message(LOG, b"end"):
                items = await follower.receive()
                heard.extend(items)
                fresh += sum(isinstance(item, Message) for item in items)
                if fresh >= 50:
                    enough.set()

        group.start_soon(say)
        group.start_soon(trouble)
        with anyio.fail_after(60):
            await listen()
        heard_end.set()
    expected, told, numbers = 0, True, 0
    for item in heard:
        if isinstance(item, Lost):
            told = True
        elif item.payload != b"end":
            number = int(item.payload)
            assert number == expected or (told and number > expected)
            expected, told, numbers = number + 1, False, numbers + 1
    assert expected == said or told
    assert numbers > 100


async def test_shared_values_come_back(redis: OwnRedis, lose_all: Callable[[OwnRedis], Awaitable[None]]) -> None:
    async with serving(redis, "one", presence_ttl=3.0) as one, serving(redis, "two", presence_ttl=3.0) as two:
        for number in range(600):
            one.share("presence", str(number), b"%d" % number)
        await lose_all(redis)
        seen: dict[str, bytes] = {}
        with anyio.fail_after(30):
            while seen != {"one": b"599"}:
                with contextlib.suppress(UnavailableError):
                    seen = await two.gather("presence", "599")
                await anyio.sleep(0.01)
            assert await two.gather("presence", "0") == {"one": b"0"}


async def test_questions_are_answered_again(redis: OwnRedis) -> None:
    async with serving(redis, "one") as one, serving(redis, "two") as two:

        async def answer(payload: bytes) -> bytes:
            return payload

        two.answer_with("echo", answer)
        assert await one.ask("two", "echo", b"1", within=5) == b"1"
        await restart(redis)

        async def ask() -> None:
            assert await one.ask("two", "echo", b"2", within=1) == b"2"

        await retried(ask)


# frozen


async def test_a_frozen_redis_refuses_in_time_and_its_followers_are_told(redis: OwnRedis) -> None:
    async with serving(redis, "one") as one, serving(redis, "two") as two, two.follow(LOG, NUDGE) as follower:
        one.publish(LOG, b"before")
        one.publish(NUDGE, b"before")
        await one.depth(0)
        redis.freeze()
        try:
            with anyio.fail_after(20 * TIMEOUT), pytest.raises(UnavailableError):
                await one.add(0, "r", b"x")
            await until(lambda: not one.connected)
            assert one.numbers.state == "away"
            with pytest.raises(UnavailableError):  # at once now
                await one.add(0, "r", b"x")
            with pytest.raises(UnavailableError):
                await one.gather("presence", "room")
            with pytest.raises(UnavailableError):
                await one.ask("two", "anything", b"", within=100)
            one.publish(LOG, b"dropped")
        finally:
            redis.thaw()
        await told_lost(follower, LOG)  # with nothing said after it
        await until(lambda: one.connected and two.connected)
        one.publish(LOG, b"after")
        await hear_until(follower, Message(LOG, b"after"))
        assert one.numbers.dropped >= 1
        assert one.numbers.reconnects >= 1


async def test_what_is_not_confirmed_is_bounded(redis: OwnRedis) -> None:
    async with serving(redis, "one", outbox_items=100, outbox_bytes=100_000) as one:
        redis.freeze()
        try:
            for _ in range(1_000):
                one.publish(LOG, b"x" * 10)
            assert one.numbers.outbox_items <= 100
            with pytest.raises(OverloadedError):
                await one.add(0, "r", b"x")
        finally:
            redis.thaw()
        await until(lambda: one.connected and one.numbers.outbox_items == 0)
        async with one.follow(LOG) as follower:
            for _ in range(1_000):
                one.publish(LOG, b"x" * 2_000)
            assert one.numbers.outbox_bytes <= 100_000
            assert one.numbers.dropped >= 900
            await told_lost(follower, LOG)  # though nothing is said after those that were dropped


async def test_a_waiting_worker_and_follower_survive_a_freeze(redis: OwnRedis) -> None:
    async with serving(redis, "one") as one, one.worker() as worker, one.follow(LOG) as follower:
        worker.take(0)
        redis.freeze()
        await until(lambda: not one.connected)
        worker.take(1)
        with anyio.fail_after(20 * TIMEOUT):
            await worker.give(0)
        redis.thaw()
        await retried(lambda: one.add(1, "r", b"x"))
        assert {work.request for work in await take(worker, 1)} == {"r"}
        one.publish(LOG, b"after")
        await hear_until(follower, Message(LOG, b"after"))


async def test_what_is_done_while_redis_is_away_is_not_work_for_ever(redis: OwnRedis) -> None:
    async with serving(redis, "edge") as edge, serving(redis, "engine") as engine, engine.worker() as worker:
        worker.take(0)
        worker.take(1)
        for number in range(10):
            await edge.add(number % 2, str(number), b"x")
        works = await take(worker, 10)
        redis.freeze()
        try:
            await until(lambda: not engine.connected)
            await worker.done(works)
            await worker.give(1)
        finally:
            redis.thaw()
        await until(lambda: edge.connected)
        await emptied(edge, 0, 1)  # though nobody works here any more
        await retried(lambda: edge.add(0, "next", b"x"))
        assert [work.request for work in await take(worker, 1)] == ["next"]


# absent


async def test_a_node_starts_without_redis_and_finds_it_later(tmp_path: Path) -> None:
    redis = OwnRedis(tmp_path)
    with capture_logs() as logs:
        async with serving(redis, "one", contact=False) as one:
            assert one.numbers.state == "connecting"
            one.share("presence", "room", b"1")
            one.publish(LOG, b"dropped")
            with pytest.raises(UnavailableError):
                await one.add(0, "r", b"x")
            async with one.follow(LOG) as follower, one.worker() as worker:
                worker.take(0)
                await told_lost(follower, LOG)
                await redis.start()
                try:
                    await told_lost(follower, LOG)  # again: something may have been said since
                    await until(lambda: one.connected)
                    await one.add(0, "r", b"x")
                    await worker.done(await take(worker, 1))
                    one.publish(LOG, b"after")
                    await hear_until(follower, Message(LOG, b"after"))
                    assert await one.gather("presence", "room") == {"one": b"1"}
                finally:
                    await redis.stop()
    away = [entry for entry in logs if entry["event"] == "the bus has no contact with Redis"]
    assert 1 <= len(away) <= 2  # at the start and after the stop: one line a loss, not one an attempt


# refusing


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        (["CONFIG", "SET", "maxmemory", "1"], ["CONFIG", "SET", "maxmemory", "0"]),
        (["REPLICAOF", "127.0.0.1", "1"], ["REPLICAOF", "NO", "ONE"]),
    ],
    ids=["out of memory", "read-only"],
)
async def test_a_redis_that_cannot_be_written_to_is_away_until_it_can(
    redis: OwnRedis, begin: list[str], end: list[str]
) -> None:
    with capture_logs() as logs:
        async with serving(redis, "one") as one, one.worker() as worker, one.follow(LOG) as follower:
            worker.take(0)
            await one.add(0, "before", b"x")
            await worker.done(await take(worker, 1))
            await redis.command(*begin)
            one.publish(LOG, b"dropped")
            with pytest.raises(UnavailableError):
                await one.add(0, "refused", b"x")
            await until(lambda: not one.connected)
            await redis.command(*end)
            await until(lambda: one.connected)
            await told_lost(follower, LOG)
            await retried(lambda: one.add(0, "after", b"x"))
            with anyio.fail_after(30):
                while (await take(worker, 1))[0].request != "after":
                    pass
    assert len([entry for entry in logs if entry["log_level"] == "warning"]) <= 3


async def test_an_operation_that_redis_refuses_breaks_no_other(redis: OwnRedis) -> None:
    async with serving(redis, "one") as one:
        await redis.command("SET", "kimera:work:7", "a key of another kind")
        with capture_logs() as logs:
            for _ in range(20):
                with pytest.raises(UnavailableError, match="refused"):
                    await one.add(7, "r", b"x")
                await one.add(0, "r", b"x")
        assert len(logs) == 1
        assert one.numbers.reconnects == 0


async def test_a_wrong_password_is_no_contact(redis: OwnRedis) -> None:
    await redis.command("CONFIG", "SET", "requirepass", "secret")
    with capture_logs() as logs:
        async with serving(redis, "one", contact=False) as one:
            with pytest.raises(UnavailableError):
                await one.depth(0)
    assert any(entry["event"] == "the bus has no contact with Redis" for entry in logs)
    assert "secret" not in str(logs)


# behind


async def test_topics_are_trimmed_and_who_was_too_slow_is_told(redis: OwnRedis) -> None:
    async with serving(redis, "one", topic_items=200, topic_bytes=20_000) as one, one.follow(LOG) as follower:
        one.publish(LOG, b"first")
        await hear_until(follower, Message(LOG, b"first"))
        for number in range(5_000):
            one.publish(LOG, b"%d" % number)
            if number % 100 == 0:
                await one.depth(0)
        one.publish(LOG, b"end")
        await one.depth(0)
        assert 100 <= int(await redis.command("XLEN", "kimera:topic:log")) <= 200
        heard = await hear_until(follower, Message(LOG, b"end"))
        numbers = [int(item.payload) for item in heard[:-1] if isinstance(item, Message)]
        assert Lost(LOG) in heard
        assert len(numbers) < 5_000
        for _ in range(100):
            one.publish(LOG, b"x" * 1_000)
        await one.depth(0)
        assert int(await redis.command("XLEN", "kimera:topic:log")) <= 20


async def test_large_messages_wait_in_redis_while_nobody_receives(
    redis: OwnRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, held, at_once = 50_000, 1_000_000, 200_000
    monkeypatch.setattr(following, "HELD_BYTES", held)
    monkeypatch.setattr(following, "READ_BYTES", at_once)
    told = [Message(LOG, b"%04d" % number + b"x" * size) for number in range(100)]
    async with serving(redis, "one") as one, one.follow(LOG) as follower:
        assert isinstance(follower, RedisFollower)
        one.publish(LOG, b"first")
        await hear_until(follower, Message(LOG, b"first"))
        reads: list[int] = []
        pace = follower._pace
        monkeypatch.setattr(follower, "_pace", lambda sizes: (reads.append(sum(sizes)), pace(sizes)))
        for message in told[:-1]:
            one.publish(LOG, message.payload)
            await one.depth(0)
        await until(lambda: follower.held_bytes >= held)
        await one.depth(0)
        assert follower.held_bytes <= held + max(reads)
        one.publish(LOG, told[-1].payload)
        assert await hear_until(follower, told[-1]) == told, "nothing is missing, and nothing was told as lost"
        assert follower.held_bytes == 0
        assert max(reads[1:]) <= at_once, "the first large one came without a warning"


async def test_consumers_of_former_runs_are_forgotten(redis: OwnRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(redis, "edge") as edge:
        for run in range(5):
            async with serving(redis, f"engine~{run}") as engine, engine.worker() as worker:
                worker.take(0)
                await edge.add(0, "r", b"x")
                works = await take(worker, 1)
                if run != 2:  # this one leaves something behind
                    await worker.done(works)
        monkeypatch.setattr(working, "TIDY_AFTER", 0.0)
        async with serving(redis, "engine~5") as engine, engine.worker() as worker:
            worker.take(0)
            await edge.add(0, "last", b"x")
            await worker.done(await take(worker, 1))
            consumers = (await redis.command("XINFO", "CONSUMERS", "kimera:work:0", "engines")).split()
            assert [name for name in consumers if name.startswith("engine~")] == ["engine~5"]


async def test_topics_of_one_node_expire_when_it_is_gone(redis: OwnRedis) -> None:
    async with serving(redis, "one") as one:
        one.publish(replies("gone"), b"x")
        one.publish(LOG, b"x")
        await one.depth(0)
        assert 0 < int(await redis.command("PTTL", "kimera:topic:reply:gone")) <= 60_000
        assert int(await redis.command("PTTL", "kimera:topic:log")) == -1
