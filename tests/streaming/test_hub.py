"""The hub over a fake log and fake handles: fan-out, catching up, stalls, latest channels, presence, heartbeats, shutdown."""

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import msgspec
import pytest
from anyio import wait_all_tasks_blocked

from kimera_stream.infrastructure.settings import StreamSettings
from kimera_stream.protocol.close_codes import CloseCode
from kimera_stream.protocol.codec import CODECS
from kimera_stream.protocol.errors import (
    AlreadySubscribedError,
    BadChannelError,
    BadPositionError,
    BadRequestError,
    NotSubscribedError,
)
from kimera_stream.protocol.objects import Position
from kimera_stream.streaming.hub import Hub
from kimera_stream.streaming.outlet import Outlet
from kimera_stream.streaming.selections import Channel, Group, Selection
from tests.garbage import uncollected
from tests.streaming.fakes import FakeEgress, MemoryLog, entry, until

pytestmark = pytest.mark.anyio


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A hub without its own task: ticks and timers happen when the test says so."""

    def __init__(self, group: anyio.abc.TaskGroup, log: MemoryLog, **settings: Any) -> None:
        self.log = log
        self.clock = Clock()
        self.hub = Hub(log, StreamSettings(**settings), clock=self.clock)
        self.group = group

    def connect(self, name: str = "p", encoding: str = "json", window: int = 1 << 30) -> tuple[Outlet, FakeEgress]:
        egress = FakeEgress(window=window)
        outlet = self.hub.connect(egress, CODECS[encoding], spawn=self.group.start_soon)
        outlet.principal = name
        return outlet, egress

    async def subscribe(
        self,
        outlet: Outlet,
        channel: str = "geoids",
        *,
        since: Any = None,
        rewind: int | None = None,
        filter: Any = None,
    ) -> Any:
        position = Position(*since) if since else None
        start = await self.hub.resolve(channel, position, rewind)
        subscription, reply = self.hub.open(outlet, channel, start, self.hub.compile(filter))
        self.hub.begin(subscription)
        return reply

    def commit(self, count: int = 1, *channels: str, **data: Any) -> None:
        self.hub.deliver([self.log.append(*(channels or ("geoids",)), **data) for _ in range(count)])

    def later(self, seconds: float) -> None:
        self.clock.now += seconds
        self.hub.deadlines.fire()


@asynccontextmanager
async def bench(before: int = 0, **settings: Any) -> AsyncIterator[Bench]:
    log = MemoryLog()
    for _ in range(before):
        log.append("geoids")
    async with anyio.create_task_group() as group:
        yield Bench(group, log, **settings)
        group.cancel_scope.cancel()


async def test_one_write_per_connection_per_tick_with_the_same_bytes() -> None:
    async with bench() as b:
        pairs = [b.connect() for _ in range(3)]
        for outlet, _ in pairs:
            await b.subscribe(outlet)
        b.commit(5)
        assert all(egress.writes == 0 for _, egress in pairs)
        b.hub.flush()
        assert {egress.writes for _, egress in pairs} == {1}
        assert len({bytes(egress.unread) for _, egress in pairs}) == 1
        assert pairs[0][1].offsets() == [1, 2, 3, 4, 5]


async def test_several_channels_still_one_write() -> None:
    async with bench() as b:
        outlet, egress = b.connect()
        for channel in ("geoids", "scars", "geoid:x"):
            await b.subscribe(outlet, channel)
        other, alone = b.connect()
        await b.subscribe(other, "geoids")
        b.commit(2, "geoids", "geoid:x")
        b.commit(1, "scars")
        b.hub.flush()
        assert egress.writes == 1
        got = [(m["channel"], m["offset"]) for m in egress.messages()]
        assert sorted(got) == [("geoid:x", 1), ("geoid:x", 2), ("geoids", 1), ("geoids", 2), ("scars", 3)]
        assert alone.offsets() == [1, 2]


async def test_both_encodings_and_filters_are_selections_of_their_own() -> None:
    async with bench() as b:
        plain, json = b.connect()
        await b.subscribe(plain)
        binary, msgpack = b.connect(encoding="msgpack")
        await b.subscribe(binary, filter={"field": "data.n", "op": "gt", "value": 2})
        b.commit(1, n=1)
        b.commit(1, n=3)
        b.hub.flush()
        assert json.offsets() == [1, 2]
        (event,) = msgpack.messages()
        assert (event["offset"], event["data"]) == (2, {"n": 3})


async def test_recovery_from_the_tail_and_from_the_log() -> None:
    async with bench(before=10) as b:
        b.commit(5)
        b.hub.flush()
        outlet, egress = b.connect()
        reply = await b.subscribe(outlet, since=("E1", 12))
        assert (reply.was_recovering, reply.recovered, reply.offset) == (True, True, 12)
        assert b.log.reads == 0
        assert egress.offsets() == [13, 14, 15]
        older, behind = b.connect()
        await b.subscribe(older, since=("E1", 3))
        await wait_all_tasks_blocked()
        assert b.log.reads > 0
        assert behind.offsets() == list(range(4, 16))
        b.commit(1)
        b.hub.flush()
        assert egress.offsets() == behind.offsets() == [16]


async def test_events_published_while_the_log_is_read_come_once_and_in_order() -> None:
    async with bench(before=200) as b:
        b.log.gate = anyio.Event()
        outlet, egress = b.connect()
        await b.subscribe(outlet, since=("E1", 0))
        await wait_all_tasks_blocked()
        for _ in range(3):
            b.commit(50)
            b.hub.flush()
        b.log.gate.set()
        await wait_all_tasks_blocked()
        b.commit(1)
        b.hub.flush()
        assert egress.offsets() == list(range(1, 352))


async def test_another_epoch_or_a_trimmed_log_is_not_recovered_in_part() -> None:
    async with bench(before=10) as b:
        b.log.trim(5)
        outlet, egress = b.connect()
        reply = await b.subscribe(outlet, since=("E0", 8))
        assert (reply.was_recovering, reply.recovered, reply.epoch, reply.offset) == (True, False, "E1", 10)
        b.hub.close(outlet, "geoids")
        reply = await b.subscribe(outlet, since=("E1", 4))
        assert (reply.was_recovering, reply.recovered, reply.offset) == (True, False, 10)
        b.hub.close(outlet, "geoids")
        reply = await b.subscribe(outlet, since=("E1", 5))
        assert reply.recovered
        await wait_all_tasks_blocked()
        assert egress.offsets() == [6, 7, 8, 9, 10]


async def test_a_position_ahead_is_refused() -> None:
    async with bench(before=3) as b:
        outlet, _ = b.connect()
        with pytest.raises(BadPositionError, match="ahead"):
            await b.subscribe(outlet, since=("E1", 4))
        with pytest.raises(BadPositionError):
            await b.subscribe(outlet, since=("E1", -1))
        assert b.hub.presence("geoids") == (0, {})


async def test_a_position_committed_but_not_yet_delivered_is_no_hole() -> None:
    """A publisher knows the offset of its ack before the hub has seen the entry."""
    async with bench(before=3) as b:
        committed = [b.log.append("geoids"), b.log.append("geoids")]
        outlet, egress = b.connect()
        reply = await b.subscribe(outlet, since=("E1", 4))
        assert reply.recovered
        b.hub.deliver(committed)
        b.hub.flush()
        assert egress.offsets() == [5]
        b.commit(1)
        b.hub.flush()
        assert egress.offsets() == [6]


async def test_entries_lost_while_catching_up_close_the_connection() -> None:
    async with bench(before=400, tail_bytes=1024) as b:
        b.log.gate = anyio.Event()
        outlet, egress = b.connect()
        await b.subscribe(outlet, since=("E1", 0))
        await wait_all_tasks_blocked()
        b.log.trim(300)
        b.log.gate.set()
        await wait_all_tasks_blocked()
        assert egress.closed == (CloseCode.POSITION_LOST, "position_lost")
        assert egress.offsets() == []
        assert b.hub.presence("geoids") == (0, {})


async def test_a_log_that_does_not_answer_is_asked_again() -> None:
    async with bench(before=10) as b:
        b.log.fail_next = 1
        outlet, egress = b.connect()
        await b.subscribe(outlet, since=("E1", 0))
        await until(lambda: b.log.reads >= 2)
        await wait_all_tasks_blocked()
        assert egress.offsets() == list(range(1, 11))


async def test_rewind() -> None:
    async with bench(before=10) as b:
        b.commit(2, "scars")
        b.hub.flush()
        outlet, egress = b.connect()
        reply = await b.subscribe(outlet, rewind=3)
        assert (reply.was_recovering, reply.recovered, reply.offset) == (False, False, 7)
        await wait_all_tasks_blocked()
        assert egress.offsets() == [8, 9, 10]
        b.hub.close(outlet, "geoids")
        await b.subscribe(outlet, rewind=100)
        await wait_all_tasks_blocked()
        assert egress.offsets() == list(range(1, 11))
        with pytest.raises(BadRequestError, match="rewind"):
            await b.subscribe(b.connect()[0], rewind=1001)
        with pytest.raises(BadRequestError, match="not both"):
            await b.subscribe(b.connect()[0], rewind=1, since=("E1", 1))


async def test_rewind_over_pages_that_end_early(monkeypatch: pytest.MonkeyPatch) -> None:
    read = MemoryLog.read

    async def few(self: MemoryLog, channel: str, **asked: Any) -> Any:
        return await read(self, channel, **{**asked, "limit": min(3, asked["limit"])})

    async with bench(before=10) as b:
        b.log.append("scars")
        b.hub.deliver(b.log.entries[-1:])
        b.hub.flush()
        monkeypatch.setattr(MemoryLog, "read", few)
        for count, first in ((8, 3), (10, 1), (50, 1)):
            outlet, egress = b.connect()
            assert (await b.subscribe(outlet, rewind=count)).offset == first - 1
            await wait_all_tasks_blocked()
            assert egress.offsets() == list(range(first, 11))


async def test_a_stalled_peer_costs_its_buffer_only_and_reads_on_where_it_stood() -> None:
    async with bench() as b:
        slow, stuck = b.connect(window=500)
        quick, free = b.connect()
        for outlet in (slow, quick):
            await b.subscribe(outlet)
        stuck.stuck = True
        for _ in range(20):
            b.commit(10)
            b.hub.flush()
        assert free.offsets() == list(range(1, 201))
        assert stuck.paused
        assert stuck.buffered < 4000
        assert b.hub.statistics()["stalled"] == b.hub.statistics()["lagging"] == 1
        stuck.resume()
        await wait_all_tasks_blocked()
        b.commit(1)
        b.hub.flush()
        assert stuck.offsets() == list(range(1, 202))
        assert free.offsets() == [201]
        assert b.hub.statistics()["lagging"] == 0


async def test_a_stall_between_ticks_loses_nothing_that_is_pending() -> None:
    """One subscription catches up and fills the buffer, while entries for another wait for the tick."""
    async with bench() as b:
        b.commit(3, "scars")
        b.hub.flush()
        outlet, egress = b.connect(window=0)
        await b.subscribe(outlet, "geoids")
        b.commit(2, "geoids")
        egress.stuck = True
        await b.subscribe(outlet, "scars", since=("E1", 0))
        assert egress.paused
        b.hub.flush()
        b.commit(1, "geoids")
        b.hub.flush()
        egress.resume()
        await wait_all_tasks_blocked()
        messages = egress.messages()
        assert [m["offset"] for m in messages if m["channel"] == "scars"] == [1, 2, 3]
        assert [m["offset"] for m in messages if m["channel"] == "geoids"] == [4, 5, 6]


async def test_a_peer_that_stays_stalled_is_closed_with_4001() -> None:
    async with bench(outbox_age=30) as b:
        outlet, egress = b.connect(window=10)
        await b.subscribe(outlet)
        egress.stuck = True
        b.commit(1)
        b.hub.flush()
        b.later(29)
        assert egress.closed is None
        b.later(2)
        assert egress.closed == (CloseCode.SLOW_CONSUMER, "slow_consumer")
        assert b.hub.statistics()["connections"] == 0


async def test_a_peer_that_drains_in_time_is_kept() -> None:
    async with bench(outbox_age=30) as b:
        outlet, egress = b.connect(window=10)
        await b.subscribe(outlet)
        for _ in range(3):
            egress.stuck = True
            b.commit(1)
            b.hub.flush()
            b.later(29)
            egress.resume()
            await wait_all_tasks_blocked()
        assert egress.closed is None


async def test_the_disconnect_policy_drops_after_the_byte_budget() -> None:
    async with bench(slow_consumer="disconnect", outbox_bytes=4096) as b:
        outlet, egress = b.connect(window=10)
        await b.subscribe(outlet)
        egress.stuck = True
        b.commit(1)
        b.hub.flush()
        assert egress.closed is None
        for _ in range(20):
            b.commit(1)
            b.hub.flush()
        assert egress.closed == (CloseCode.SLOW_CONSUMER, "slow_consumer")


async def test_the_disconnect_policy_leaves_who_is_owed_one_value_only() -> None:
    """A latest channel is conflated whatever the policy: its slow reader is behind by one value, not by the log."""
    async with bench(slow_consumer="disconnect", outbox_bytes=4096) as b:
        outlet, egress = b.connect(window=10)
        await b.subscribe(outlet, "stats")
        egress.stuck = True
        for v in range(1, 5):
            b.hub.latest("stats", "stats.updated", b'{"v":%d}' % v, offset=v)
            b.hub.flush()
        for _ in range(20):
            b.commit(1)
            b.hub.flush()
        assert egress.closed is None
        egress.resume()
        await wait_all_tasks_blocked()
        values = [message["data"]["v"] for message in egress.messages() if message["op"] == "event"]
        assert values == [1, 4]


async def test_replies_beyond_the_budget_close_with_4001() -> None:
    from kimera_stream.protocol.messages import Pong

    async with bench(outbox_bytes=2048) as b:
        outlet, egress = b.connect(window=100)
        egress.stuck = True
        for _ in range(100):
            outlet.send(Pong(id=1, epoch="E1", offset=1))
        assert egress.closed == (CloseCode.SLOW_CONSUMER, "slow_consumer")
        assert egress.buffered < 4096


async def test_a_batch_too_large_to_push_is_read_in_chunks() -> None:
    async with bench() as b:
        outlet, egress = b.connect(window=100_000)
        await b.subscribe(outlet)
        egress.stuck = True
        b.commit(400, pad="x" * 2000)
        b.hub.flush()
        assert egress.paused
        assert egress.buffered < 250_000
        for _ in range(20):
            egress.resume()
            await wait_all_tasks_blocked()
        b.commit(1)
        b.hub.flush()
        assert egress.offsets() == list(range(1, 402))


async def test_batches_too_large_together_are_read_in_chunks() -> None:
    async with bench() as b:
        outlet, egress = b.connect(window=100_000)
        channels = [f"session:{n}" for n in range(10)]
        for channel in channels:
            await b.subscribe(outlet, channel)
        await b.subscribe(outlet, "stats")
        other, whole = b.connect()
        await b.subscribe(other, channels[0])
        await b.subscribe(other, "stats")
        egress.stuck = True
        for channel in channels:
            b.commit(50, channel, pad="x" * 2000)
        b.hub.latest("stats", "stats.updated", b"1", offset=500)
        b.hub.flush()
        assert (whole.writes, len(whole.messages())) == (1, 51)
        assert egress.paused
        assert egress.buffered < 250_000, "a connection has its bound, however many channels it is on"
        for _ in range(20):
            egress.resume()
            await wait_all_tasks_blocked()
        b.commit(1, *channels)
        b.hub.flush()
        events = egress.messages()
        assert [m["offset"] for m in events if m["channel"] == "stats"] == [500]
        for n, channel in enumerate(channels):
            mine = [m["offset"] for m in events if m["channel"] == channel]
            assert mine == [*range(50 * n + 1, 50 * n + 51), 501]


async def test_a_gap_in_delivery_sends_everyone_to_the_log() -> None:
    async with bench() as b:
        outlet, egress = b.connect()
        await b.subscribe(outlet)
        b.commit(2)
        b.log.append("geoids")
        b.log.append("geoids")
        b.commit(1)
        b.hub.flush()
        await wait_all_tasks_blocked()
        b.hub.deliver([entry(5, "geoids")])
        b.hub.flush()
        assert egress.offsets() == [1, 2, 3, 4, 5]


async def test_latest_channels_send_the_newest_and_conflate_for_the_slow() -> None:
    async with bench() as b:
        b.hub.latest("stats", "stats.updated", b'{"v":1}', offset=0)
        b.hub.flush()
        outlet, egress = b.connect(window=10)
        await b.subscribe(outlet, "stats")
        assert [m["data"] for m in egress.messages()] == [{"v": 1}]
        egress.stuck = True
        for v in range(2, 7):
            b.hub.latest("stats", "stats.updated", b'{"v":%d}' % v, offset=v)
            b.hub.flush()
        egress.resume()
        await wait_all_tasks_blocked()
        messages = egress.messages()
        assert [m.get("data") for m in messages] == [{"v": 2}, None, {"v": 6}]
        assert messages[1] == {"op": "resync", "channel": "stats", "epoch": "E1", "offset": 6, "dropped": 3}
        b.hub.latest("stats", "stats.updated", b'{"v":7}', offset=7)
        b.hub.flush()
        assert [m["data"] for m in egress.messages()] == [{"v": 7}]
        assert b.hub.newest("stats") == b'{"v":7}'


async def test_a_position_ahead_of_the_log_is_refused_on_a_latest_channel_too() -> None:
    async with bench(before=10) as b:
        b.hub.latest("stats", "stats.updated", b'{"v":1}', offset=10)
        b.hub.flush()
        with pytest.raises(BadPositionError, match="ahead"):
            await b.subscribe(b.connect()[0], "stats", since=("E1", 11))
        outlet, egress = b.connect()
        reply = await b.subscribe(outlet, "stats", since=("E1", 3))
        assert (reply.was_recovering, reply.recovered) == (False, False)
        assert [m["data"] for m in egress.messages()] == [{"v": 1}]


async def test_a_filter_on_a_latest_channel() -> None:
    async with bench() as b:
        outlet, egress = b.connect()
        b.hub.latest("field", "field.updated", b'{"v":1}', offset=0)
        await b.subscribe(outlet, "field", filter={"field": "data.v", "op": "gt", "value": 1})
        b.hub.latest("field", "field.updated", b'{"v":2}', offset=0)
        b.hub.latest("field", "field.updated", b'{"v":0}', offset=0)
        b.hub.flush()
        assert [m["data"] for m in egress.messages()] == [{"v": 2}]


async def test_a_filter_that_names_no_value_harms_nobody() -> None:
    none = {"field": "data.n", "op": "in", "value": []}
    async with bench() as b:
        outlets = [b.connect()[0] for _ in range(3)]
        trees = [none, {"field": "data.n", "op": "eq", "value": 1}, {"all": [none, {"field": "type", "op": "exists"}]}]
        for outlet, tree in zip(outlets, trees, strict=True):
            await b.subscribe(outlet, filter=tree)
        b.commit(1)
        b.hub.flush()
        for outlet in reversed(outlets):
            outlet.detach()
        assert (b.hub.statistics()["connections"], b.hub.presence("geoids")) == (0, (0, {}))


async def test_presence_counts_as_it_changes() -> None:
    async with bench() as b:
        ann, _ = b.connect("ann")
        ann2, _ = b.connect("ann")
        bob, _ = b.connect("bob", "msgpack")
        for outlet in (ann, ann2, bob):
            await b.subscribe(outlet)
        assert b.hub.presence("geoids") == (3, {"ann": 2, "bob": 1})
        b.hub.close(ann, "geoids")
        bob.detach()
        assert b.hub.presence("geoids") == (1, {"ann": 1})
        ann2.detach()
        assert b.hub.presence("geoids") == (0, {})
        assert b.hub.statistics()["channels"] == 0
        with pytest.raises(BadChannelError):
            b.hub.presence("nowhere")


async def test_subscribing_twice_and_leaving_twice() -> None:
    async with bench() as b:
        outlet, egress = b.connect()
        await b.subscribe(outlet)
        with pytest.raises(AlreadySubscribedError):
            await b.subscribe(outlet)
        b.hub.close(outlet, "geoids")
        with pytest.raises(NotSubscribedError):
            b.hub.close(outlet, "geoids")
        b.commit(1)
        b.hub.flush()
        assert egress.offsets() == []


async def test_heartbeats_go_to_quiet_connections_that_have_everything() -> None:
    async with bench(ping_interval=25) as b:
        quiet, silent = b.connect()
        busy, noisy = b.connect()
        for outlet in (quiet, busy):
            outlet.start_heartbeat()
        await b.subscribe(quiet, filter={"field": "data.n", "op": "lt", "value": 0})
        await b.subscribe(busy)
        b.commit(1)
        b.hub.flush()
        b.later(20)
        b.commit(1)
        b.hub.flush()
        b.later(5)
        assert silent.messages() == [{"op": "heartbeat", "epoch": "E1", "offset": 2}]
        assert [m["op"] for m in noisy.messages()] == ["event", "event"]
        b.later(20)
        assert [m["op"] for m in noisy.messages()] == ["heartbeat"]


async def test_no_heartbeat_to_one_that_lags() -> None:
    async with bench(before=300, ping_interval=25) as b:
        b.log.gate = anyio.Event()
        outlet, egress = b.connect()
        outlet.start_heartbeat()
        await b.subscribe(outlet, since=("E1", 0))
        await wait_all_tasks_blocked()
        b.later(30)
        assert egress.messages() == []


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
async def test_large_entries_of_the_log_wait_in_the_log_for_a_slow_peer(encoding: str) -> None:
    async with bench(tail_bytes=1024) as b:
        for _ in range(100):
            b.commit(pad="x" * 20_000)
        b.hub.flush()
        outlet, egress = b.connect(encoding=encoding, window=100_000)
        egress.stuck = True
        await b.subscribe(outlet, since=("E1", 0), filter={"field": "offset", "op": "gt", "value": 0})
        await wait_all_tasks_blocked()
        assert egress.paused
        assert egress.buffered < 250_000, "a page of the log may be larger than what a connection may have waiting"
        for _ in range(40):
            egress.stuck = True
            egress.resume()
            await wait_all_tasks_blocked()
        assert egress.offsets() == list(range(1, 101))


async def test_a_slow_peer_has_large_entries_read_about_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    read = MemoryLog.read

    async def counting(self: MemoryLog, channel: str, **asked: Any) -> Any:
        page = await read(self, channel, **asked)
        looked.append(len(page.entries))
        return page

    monkeypatch.setattr(MemoryLog, "read", counting)
    async with bench(tail_bytes=1024) as b:
        for _ in range(16):
            b.commit(pad="x" * 200_000)
        b.hub.flush()
        outlet, egress = b.connect(encoding="msgpack", window=100_000)
        egress.stuck = True
        await b.subscribe(outlet, since=("E1", 0))
        await wait_all_tasks_blocked()
        for _ in range(16):  # it has taken what there was, and is as slow with what comes next
            egress.buffered, egress.paused = 0, False
            outlet.egress_resumed()
            await wait_all_tasks_blocked()
        assert egress.offsets() == list(range(1, 17))
        assert looked[0] == 16, "how large they are is not known yet"
        assert sum(looked[1:]) < 24, "what a peer has no room for is read again"


async def test_a_channel_that_is_read_from_the_log_holds_up_no_other() -> None:
    async with bench(before=100, tail_bytes=1024) as b:
        outlet, egress = b.connect()
        b.log.gate = anyio.Event()
        b.hub.latest("stats", "stats.updated", b"1", offset=100)
        b.hub.flush()
        await b.subscribe(outlet, since=("E1", 0))
        await wait_all_tasks_blocked()
        await b.subscribe(outlet, "stats")
        await b.subscribe(outlet, "scars")
        b.commit(1, "geoids", "scars")
        b.hub.flush()
        assert [(m["channel"], m["offset"]) for m in egress.messages()] == [("stats", 100), ("scars", 101)]
        b.log.gate.set()
        await wait_all_tasks_blocked()
        assert egress.offsets() == list(range(1, 102))


async def test_after_a_stall_a_channel_that_is_read_from_the_log_holds_up_no_other() -> None:
    async with bench(tail_bytes=1024) as b:
        outlet, egress = b.connect(window=100)
        for channel in ("geoids", "scars", "stats"):
            await b.subscribe(outlet, channel)
        egress.stuck = True
        for _ in range(100):
            b.commit()
            b.hub.flush()
        b.commit(1, "scars")
        b.hub.latest("stats", "stats.updated", b"1", offset=101)
        b.hub.flush()
        had = egress.offsets()
        b.log.gate = anyio.Event()
        egress.resume()
        await wait_all_tasks_blocked()
        assert [m["offset"] for m in egress.messages() if m["channel"] == "stats"] == [101]
        b.log.gate.set()
        await wait_all_tasks_blocked()
        assert had + [m["offset"] for m in egress.messages() if m["channel"] == "geoids"] == list(range(1, 101))


async def test_equal_laggards_share_the_reading() -> None:
    async with bench(before=1000) as b:
        egresses = []
        for _ in range(20):
            outlet, egress = b.connect()
            await b.subscribe(outlet, since=("E1", 0))
            egresses.append(egress)
        await wait_all_tasks_blocked()
        assert all(egress.offsets() == list(range(1, 1001)) for egress in egresses)
        assert b.log.reads < 40
        assert b.hub.source.cached_bytes <= 8_388_608


async def test_the_tail_is_bounded() -> None:
    async with bench(tail_bytes=20_000) as b:
        outlet, _ = b.connect()
        await b.subscribe(outlet)
        for _ in range(50):
            b.commit(20, pad="x" * 100)
            b.hub.flush()
        assert b.hub.tail.bytes <= 20_000
        assert len(b.hub.tail) < 40
        assert len(b.hub.tail._records) < 80


async def test_run_ticks_at_once_when_quiet_and_joins_under_load() -> None:
    async with bench(tick=0.05) as b:
        b.group.start_soon(b.hub.run)
        outlet, egress = b.connect()
        await b.subscribe(outlet)
        b.commit(1)
        await until(lambda: egress.writes == 1)
        for _ in range(10):
            b.commit(1)
            await anyio.lowlevel.checkpoint()
        await until(lambda: b.hub.flushed == 11)
        assert egress.writes <= 3
        assert egress.offsets() == list(range(1, 12))


async def test_shutdown_flushes_closes_and_aborts_who_stays() -> None:
    async with bench() as b:
        outlet, egress = b.connect()
        await b.subscribe(outlet)
        kept = FakeEgress()

        class Owner:
            def outlet_ended(self) -> None: ...

            def outlet_draining(self, code: CloseCode) -> None: ...

            def outlet_doubted(self) -> None: ...

        b.hub.connect(kept, CODECS["json"], spawn=b.group.start_soon, owner=Owner())
        b.commit(1)
        assert await b.hub.shutdown(0.05) == 1
        assert egress.offsets() == [1]
        assert egress.closed == (CloseCode.SHUTDOWN, "shutdown")
        assert not egress.aborted
        assert kept.aborted
        assert b.hub.ended


async def test_one_that_finishes_before_it_goes_is_not_sent_away_again_in_the_place_of_another() -> None:
    class Owner:
        asked = 0

        def outlet_ended(self) -> None: ...

        def outlet_draining(self, code: CloseCode) -> None:
            self.asked += 1

        def outlet_doubted(self) -> None: ...

    async with bench() as b:
        busy, (other, egress) = Owner(), b.connect()
        first = b.hub.connect(FakeEgress(), CODECS["json"], spawn=b.group.start_soon, owner=busy)
        b.hub._outlets = {first: None, other: None}  # the oldest go first
        for outlet in (first, other):
            assert b.hub.identify(outlet, "ann", limit=9)
        b.hub.send_away(1)
        assert (busy.asked, egress.closed) == (1, None)
        assert b.hub.connections == 1, "it is no reason to send another away"
        b.hub.send_away(1)
        assert (busy.asked, egress.closed) == (1, (CloseCode.REBALANCE, "rebalance"))


def broken(handles: Any, data: bytes) -> None:
    """A fan-out with a defect."""
    raise ZeroDivisionError


async def test_a_defect_in_a_tick_closes_everyone_and_surfaces() -> None:
    async with bench() as b:
        outlet, egress = b.connect()
        await b.subscribe(outlet)

        b.hub._joiner._fan_out = broken
        b.commit(1)
        with pytest.raises(ExceptionGroup) as caught:
            await b.hub.run()
        assert caught.group_contains(ZeroDivisionError)
        assert egress.closed == (CloseCode.GOING_AWAY, "going_away")
        b.hub._joiner._fan_out = lambda handles, data: [h.write(data) for h in handles]
        again, fresh = b.connect()
        await b.subscribe(again, since=("E1", 0))
        b.commit(1)
        b.hub.flush()
        await wait_all_tasks_blocked()
        assert fresh.offsets() == [1, 2]


async def test_a_defect_while_a_gap_is_noticed_closes_everyone_too() -> None:
    async with bench() as b:
        outlet, egress = b.connect()
        await b.subscribe(outlet)

        works, b.hub._joiner._fan_out = b.hub._joiner._fan_out, broken
        b.commit(1)
        b.log.append("geoids")
        with pytest.raises(ZeroDivisionError):
            b.commit(1)
        b.hub._joiner._fan_out = works
        b.commit(1)
        b.hub.flush()
        await wait_all_tasks_blocked()
        assert egress.closed == (CloseCode.GOING_AWAY, "going_away"), f"1 is missing before {egress.offsets()}"


async def test_event_bytes_do_not_depend_on_who_reads_or_when() -> None:
    async with bench() as b:
        live, first = b.connect()
        await b.subscribe(live)
        b.commit(3)
        b.hub.flush()
        late, second = b.connect()
        await b.subscribe(late, since=("E1", 0))
        assert bytes(first.unread) == bytes(second.unread)
        assert msgspec.json.decode(b.log.entries[0].data) == {"n": 1}


async def test_channels_and_filters_that_nobody_is_on_any_more_leave_nothing_for_the_collector_of_garbage() -> None:
    def left() -> int:
        return sum(isinstance(each, Channel | Group | Selection | Outlet) for each in gc.get_objects())

    async with bench() as b:
        stays, _ = b.connect()
        await b.subscribe(stays)
        with uncollected():
            before = left()
            for number in range(5):
                outlet, egress = b.connect()
                await b.subscribe(outlet, f"session:s-{number}")
                await b.subscribe(outlet, filter={"field": "data.n", "op": "eq", "value": number})
                b.commit(1, "geoids", f"session:s-{number}")
                b.hub.flush()
                assert egress.writes
                outlet.detach()
                del outlet, egress
            b.commit()
            b.hub.flush()
            assert left() == before
