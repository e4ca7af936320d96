"""Exactly once, in order, without a gap: random histories of everything that can happen to a subscriber at once.

The oracle is a list: what a subscriber received must be the matching entries after its start, up to some point, and all of
them once everything has settled.
"""

from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimera_stream.infrastructure.settings import StreamSettings
from kimera_stream.protocol.codec import CODECS
from kimera_stream.protocol.objects import Position
from kimera_stream.streaming import catchup, joiner
from kimera_stream.streaming.hub import Hub
from kimera_stream.streaming.outlet import Outlet
from tests.streaming.fakes import FakeEgress, MemoryLog

CHANNELS = ["geoids", "scars", "geoid:a"]
FILTERS: list[Any] = [None, {"field": "data.n", "op": "in", "value": [0, 2]}]


@dataclass
class Peer:
    outlet: Outlet
    egress: FakeEgress
    starts: dict[str, tuple[int, Any]] = field(default_factory=dict)
    got: dict[str, list[int]] = field(default_factory=dict)

    beaten: int = 0
    """Where the newest heartbeat is, as far as it has not been looked at."""

    def read(self) -> None:
        for message in self.egress.messages():
            if message["op"] == "heartbeat":
                self.beaten = message["offset"]
            else:
                self.got[message["channel"]].append(message["offset"])


def passes(filter: Any, n: int) -> bool:
    return filter is None or n in (0, 2)


class History:
    def __init__(self, group: anyio.abc.TaskGroup, tail_bytes: int) -> None:
        self.group = group
        self.log = MemoryLog()
        self.log.append("geoids", n=0)
        self.log.append("scars", n=1)
        self.now = 1_000.0
        self.hub = Hub(self.log, StreamSettings(tail_bytes=tail_bytes, outbox_age=1e6), clock=lambda: self.now)
        self.undelivered: list[Any] = []
        self.peers: list[Peer] = []
        self.facts: list[tuple[tuple[str, ...], int]] = [(("geoids",), 0), (("scars",), 1)]

    def peer(self, index: int) -> Peer | None:
        return self.peers[index % len(self.peers)] if self.peers else None

    async def step(self, action: tuple[Any, ...]) -> None:
        match action:
            case ("commit", channels, n, pad):
                self.undelivered.append(self.log.append(*channels, n=n, pad="x" * pad))
                self.facts.append((channels, n))
            case ("deliver",):
                self.hub.deliver(self.undelivered)
                self.undelivered = []
            case ("lose",):
                # Deliveries that never come, as after a bus that skipped: the next one shows the gap.
                self.undelivered = []
            case ("flush",):
                self.hub.flush()
            case ("connect", window):
                egress = FakeEgress(window=window)
                outlet = self.hub.connect(egress, CODECS["json"], spawn=self.group.start_soon)
                outlet.start_heartbeat()
                self.peers.append(Peer(outlet, egress))
            case ("subscribe", index, channel, filter, back):
                await self.subscribe(index, channel, filter, back)
            case ("subscribe, reading nothing", index, channel, back):
                if peer := self.peer(index):
                    peer.egress.stuck = True
                    peer.egress.window = 0
                    await self.subscribe(index, channel, None, back)
            case ("unsubscribe", index, channel):
                if (peer := self.peer(index)) and channel in peer.starts:
                    self.hub.close(peer.outlet, channel)
                    peer.read()
                    self.check(peer, channel, settled=False)
                    del peer.starts[channel]
            case ("stall", index):
                if peer := self.peer(index):
                    peer.egress.stuck = True
            case ("resume", index):
                if peer := self.peer(index):
                    peer.egress.resume()
            case ("quiet",):
                self.now += 30
                self.hub.deadlines.fire()
            case ("gate",):
                if self.log.gate is None:
                    self.log.gate = anyio.Event()
                else:
                    self.open_gate()
            case ("yield", times):
                for _ in range(times):
                    await anyio.lowlevel.checkpoint()

    def open_gate(self) -> None:
        if self.log.gate is not None:
            self.log.gate.set()
            self.log.gate = None

    async def subscribe(self, index: int, channel: str, filter: Any, back: int | None) -> None:
        peer = self.peer(index)
        if peer is None or channel in peer.starts:
            return
        since = None if back is None else Position("E1", max(0, self.log.head - back))
        start = await self.hub.resolve(channel, since, None)
        subscription, reply = self.hub.open(peer.outlet, channel, start, self.hub.compile(filter))
        peer.starts[channel] = (reply.offset, filter)
        peer.got[channel] = []
        self.hub.begin(subscription)

    def check(self, peer: Peer, channel: str, *, settled: bool) -> None:
        start, filter = peer.starts[channel]
        due = [
            offset
            for offset, (channels, n) in enumerate(self.facts, 1)
            if offset > start and channel in channels and passes(filter, n)
        ]
        got = peer.got[channel]
        assert got == due[: len(got)]
        assert len(got) >= sum(offset <= peer.beaten for offset in due), "a heartbeat ran ahead"
        if settled:
            assert got == due

    async def settle(self) -> None:
        self.open_gate()
        await self.step(("commit", ("geoids", "scars", "geoid:a"), 0, 0))
        await self.step(("deliver",))
        self.hub.flush()
        for _ in range(200):
            for peer in self.peers:
                peer.egress.resume()
            for _ in range(8):
                await anyio.lowlevel.checkpoint()
            if all(peer.outlet.caught_up for peer in self.peers):
                break
        for peer in self.peers:
            peer.read()
            assert peer.egress.closed is None
            for channel in peer.starts:
                self.check(peer, channel, settled=True)


index = st.integers(0, 3)
channel = st.sampled_from(CHANNELS)
actions = st.one_of(
    st.tuples(
        st.just("commit"),
        st.sampled_from([("geoids",), ("scars",), ("geoids", "geoid:a"), ("scars", "geoid:a")]),
        st.integers(0, 3),
        st.sampled_from([0, 0, 200]),
    ),
    st.tuples(st.just("deliver")),
    st.tuples(st.just("lose")),
    st.tuples(st.just("flush")),
    st.tuples(st.just("connect"), st.sampled_from([0, 150, 600, 1 << 30])),
    st.tuples(st.just("subscribe"), index, channel, st.sampled_from(FILTERS), st.one_of(st.none(), st.integers(0, 12))),
    st.tuples(st.just("subscribe, reading nothing"), index, channel, st.integers(1, 12)),
    st.tuples(st.just("unsubscribe"), index, channel),
    st.tuples(st.just("stall"), index),
    st.tuples(st.just("resume"), index),
    st.tuples(st.just("quiet")),
    st.tuples(st.just("gate")),
    st.tuples(st.just("yield"), st.integers(1, 4)),
)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a short history crosses the bounds of chunks, pages and scans."""
    monkeypatch.setattr(catchup, "CHUNK_EVENTS", 3)
    monkeypatch.setattr(catchup, "CHUNK_BYTES", 200)
    monkeypatch.setattr(catchup, "_PAGE_ENTRIES", 2)
    monkeypatch.setattr(joiner, "LARGE_BATCH", 700)
    monkeypatch.setattr(catchup, "_SCAN", 4)


async def play(history: list[tuple[Any, ...]], tail_bytes: int) -> None:
    async with anyio.create_task_group() as group:
        world = History(group, tail_bytes)
        await world.step(("connect", 400))
        for action in history:
            await world.step(action)
            for peer in world.peers:
                peer.read()
                for name in peer.starts:
                    world.check(peer, name, settled=False)
                peer.beaten = 0  # it speaks of what was open then
        await world.settle()
        group.cancel_scope.cancel()


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(actions, min_size=5, max_size=60), st.sampled_from([1024, 4096, 1 << 20]))
def test_every_history_is_delivered_exactly_once_in_order(history: list[tuple[Any, ...]], tail_bytes: int) -> None:
    anyio.run(play, history, tail_bytes)
