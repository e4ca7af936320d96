"""Pulling readers: the same guarantees at the reader's own pace, with a position for all memory."""

import anyio
import msgspec
import pytest
from anyio import wait_all_tasks_blocked

from kimera_stream.infrastructure.settings import StreamSettings
from kimera_stream.protocol.close_codes import CloseCode
from kimera_stream.protocol.errors import BadPositionError, Disconnect
from kimera_stream.protocol.filters import compile_filter
from kimera_stream.protocol.objects import Position
from kimera_stream.streaming.hub import Hub
from kimera_stream.streaming.reader import Reader
from tests.streaming.fakes import MemoryLog

pytestmark = pytest.mark.anyio


def hub_of(entries: int = 0, **settings: int) -> tuple[Hub, MemoryLog]:
    log = MemoryLog()
    for _ in range(entries):
        log.append("geoids")
    return Hub(log, StreamSettings(**settings)), log


def commit(hub: Hub, log: MemoryLog, count: int = 1, *channels: str) -> None:
    hub.deliver([log.append(*(channels or ("geoids",))) for _ in range(count)])
    hub.flush()


async def test_old_and_new_events_exactly_once() -> None:
    hub, log = hub_of(300)
    async with hub.reader("geoids", since=Position("E1", 0), principal="ann") as (start, events):
        assert (start.was_recovering, start.recovered, start.offset) == (True, True, 0)
        assert hub.presence("geoids") == (1, {"ann": 1})
        seen = []
        async for event in events:
            seen.append(event.offset)
            if len(seen) % 7 == 0 and log.head < 500:
                commit(hub, log)
            if event.offset == log.head and log.head >= 320:
                break
        assert seen == list(range(1, log.head + 1))
    assert hub.presence("geoids") == (0, {})
    assert hub.statistics()["readers"] == 0


async def test_a_sleeping_reader_wakes_for_what_passes_its_filter() -> None:
    hub, log = hub_of()
    got: list[int] = []

    async def read() -> None:
        filter = compile_filter({"field": "data.n", "op": "in", "value": [3, 50, 51]})
        async with hub.reader("geoids", filter=filter) as (_, events):
            started.set()
            async for event in events:
                got.append(event.offset)
                if event.offset == 51:
                    return

    started = anyio.Event()
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await started.wait()
            for _ in range(60):
                await anyio.lowlevel.checkpoint()
                commit(hub, log)
    assert got == [3, 50, 51]
    assert log.reads == 0


async def test_after_a_defect_in_a_tick_no_reader_says_that_it_has_what_it_was_not_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub, log = hub_of(1)

    async def read() -> None:
        async with hub.reader("geoids") as (_, events):
            readers.append(events)
            assert [event async for event in events] == []

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    readers: list[Reader] = []
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await wait_all_tasks_blocked()
            assert readers[0].reached == 1
            monkeypatch.setattr(hub._joiner, "write", broken)
            with pytest.raises(ZeroDivisionError):
                commit(hub, log)
            assert (hub.flushed, readers[0].reached) == (2, None), "a heartbeat may be due at this moment"


async def test_a_slow_reader_goes_to_the_log_for_what_the_tail_has_lost() -> None:
    hub, log = hub_of(tail_bytes=2048)
    async with hub.reader("geoids") as (_, events):
        commit(hub, log, 1)
        assert (await anext(events)).offset == 1
        for _ in range(100):
            commit(hub, log, 3)
        assert [(await anext(events)).offset for _ in range(300)] == list(range(2, 302))
    assert log.reads > 0


async def test_payloads_are_event_objects() -> None:
    hub, log = hub_of()
    async with hub.reader("geoid:x", since=Position("E1", 0)) as (_, events):
        commit(hub, log, 1, "geoids", "geoid:x")
        event = await anext(events)
    assert event.type == "geoid.created"
    assert msgspec.json.decode(event.payload) == {
        "op": "event", "channel": "geoid:x", "epoch": "E1", "offset": 1, "type": "geoid.created", "ts": 1_700_000_000_001,
        "data": {"n": 1},
    }  # fmt: skip


async def test_rewind_and_unrecovered_starts() -> None:
    hub, _ = hub_of(10)
    async with hub.reader("geoids", rewind=2) as (start, events):
        assert start.offset == 8
        assert [(await anext(events)).offset for _ in range(2)] == [9, 10]
    async with hub.reader("geoids", since=Position("E0", 2)) as (start, _):
        assert (start.was_recovering, start.recovered, start.offset) == (True, False, 10)
    with pytest.raises(BadPositionError):
        async with hub.reader("geoids", since=Position("E1", 11)):
            pass
    assert hub.presence("geoids") == (0, {})


async def test_latest_channels_give_the_newest_value_only() -> None:
    hub, _ = hub_of()
    hub.latest("stats", "stats.updated", b'{"v":1}', offset=0)
    hub.flush()
    async with hub.reader("stats") as (_, events):
        assert msgspec.json.decode((await anext(events)).payload)["data"] == {"v": 1}
        for v in (2, 3, 4):
            hub.latest("stats", "stats.updated", b'{"v":%d}' % v, offset=0)
            hub.flush()
        assert msgspec.json.decode((await anext(events)).payload)["data"] == {"v": 4}


async def test_the_end_of_the_hub_ends_readers() -> None:
    hub, log = hub_of()
    async with anyio.create_task_group() as group:

        async def read() -> None:
            async with hub.reader("geoids") as (_, events):
                assert [event.offset async for event in events] == [1]

        group.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        commit(hub, log)
        await anyio.wait_all_tasks_blocked()
        await hub.shutdown(1)
    async with hub.reader("geoids") as (_, events):
        assert [event async for event in events] == []


async def test_a_trimmed_log_surfaces() -> None:
    hub, log = hub_of(3_000)
    async with hub.reader("geoids", since=Position("E1", 0)) as (_, events):
        assert (await anext(events)).offset == 1
        log.trim(2_000)
        with pytest.raises(Disconnect) as caught:
            async for _ in events:
                pass
        assert caught.value.code == CloseCode.POSITION_LOST


async def test_a_cancelled_reader_leaves_nothing_behind() -> None:
    hub, _ = hub_of()
    with anyio.move_on_after(0.01):
        async with hub.reader("geoids") as (_, events):
            await anext(events)
    assert hub.statistics()["readers"] == 0
    assert hub.statistics()["channels"] == 0
