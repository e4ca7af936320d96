"""Those who hear: they resume where they were, however the connection ended, and write down every event as it came."""

import time
from random import Random
from typing import Any, Literal

import anyio
import msgspec

from tests.oracle.model import Heard, Segment
from tests.oracle.passes import Passes
from tests.oracle.publishers import LONGEST_PAUSE, PAUSE
from tests.oracle.wire import PATIENCE, REVOKED, UNAUTHORIZED, Gone, Web, Wire, connected

Mode = Literal["since", "cursor", "wander", "sse"]
"""since: goes on after the last event. cursor: the same by a durable cursor. wander: leaves now and then and begins again
somewhere in the past. sse: over HTTP, with ``Last-Event-ID``."""

ACK_EVERY = 20
"""Events between two acknowledgements of a durable cursor."""
WANDER = 2.5
"""Seconds after which a wanderer that has caught up leaves."""

RESUME_CODES = range(4000, 4500)
PROTOCOL_CODES = (1000, 1001, 1006, 1011, 1012, 1013)


class Listener:
    """One subscriber.

    Args:
        doors: Addresses; each connection goes to the next.
        heard: Where it writes down what it hears.
        since: Begin after this offset of the first log it meets; None: with what comes next.
        filter: As the contract has it; ``heard.wanted`` is our own understanding of it.
        pace: Seconds it takes over an event.
        passes: What it comes in by; None: it shows no token.
    """

    def __init__(
        self,
        doors: list[str],
        heard: Heard,
        seed: int,
        *,
        encoding: str = "json",
        mode: Mode = "since",
        since: int | None = None,
        filter: dict[str, Any] | None = None,
        pace: float = 0.0,
        passes: Passes | None = None,
    ) -> None:
        self.heard = heard
        self._doors = doors
        self._encoding = encoding
        self._mode = mode
        self._since = since
        self._filter = filter
        self._pace = pace
        self._passes = passes
        self._shown: str | None = None
        self._turned_away: set[str] = set()
        self._rng = Random(f"{seed}-{heard.name}")
        self._acked: set[int] = set()
        self._confirmed = 0
        self._cursor_epoch = ""
        self._most = 0
        self._moved = anyio.Event()
        self._resting = False
        self.visits = 0
        self.connected = False
        self.codes: dict[int, int] = {}
        """How often each close code ended a subscription."""

    @property
    def invited(self) -> bool:
        """Whether it comes in by a token."""
        return self._passes is not None

    @property
    def position(self) -> tuple[str, int]:
        """Of the last event, or of a heartbeat after it."""
        if not self.heard.segments:
            return "", 0
        last = self.heard.segments[-1]
        return last.epoch, last.last

    async def reach(self, epoch: str, offset: int) -> None:
        """Wait until everything up to ``offset`` of that log has been heard, or is said to have been; the caller knows that there is
        an event at or after it on the channel."""
        while not (self.position[0] == epoch and self.position[1] >= offset):
            moved = self._moved
            await moved.wait()

    async def in_touch(self) -> None:
        """Wait until it is subscribed."""
        while not self.connected:
            moved = self._moved
            await moved.wait()

    def rest(self, resting: bool) -> None:
        """Whether a wanderer stays where it is, for as long as everything is read and checked."""
        self._resting = resting

    async def run(self) -> None:
        """Until cancelled."""
        pause = PAUSE
        while True:
            door = self._doors[self.visits % len(self._doors)]
            self.visits += 1
            began = time.monotonic()
            try:
                await (self._visit_web(door) if self._mode == "sse" else self._visit(door))
            except Gone as gone:
                self._left(gone)
            self.connected = False
            if time.monotonic() - began > 2 * LONGEST_PAUSE:
                pause = PAUSE
            await anyio.sleep(pause * (0.5 + self._rng.random()))
            pause = min(2 * pause, LONGEST_PAUSE)

    async def turned_away(self, token: str) -> None:
        """Wait until it is in by that token no more, and cannot come in by it again."""
        while token not in self._turned_away:
            moved = self._moved
            await moved.wait()

    def _left(self, gone: Gone) -> None:
        asked = self._passes is not None and self._shown in self._passes.asked
        if gone.code == UNAUTHORIZED and asked:
            assert self._shown is not None
            self._turned_away.add(self._shown)
            self._wake()
            return
        if gone.code == REVOKED and not asked:
            self.heard.broken.append(
                f"{self.heard.name}: closed with {gone.code} {gone.reason}, though nobody asked for it"
            )
        if self.connected:
            self.codes[gone.code] = self.codes.get(gone.code, 0) + 1
        if gone.code not in RESUME_CODES and gone.code not in PROTOCOL_CODES:
            self.heard.broken.append(f"{self.heard.name}: closed with {gone.code} {gone.reason}")

    # -- WebSocket ---------------------------------------------------------------------------------------------------------

    async def _visit(self, door: str) -> None:
        self._shown = None if self._passes is None else self._passes.current.token
        async with connected(door, self._encoding, self._shown) as wire:
            segment = await self._subscribe(wire)
            if segment is None:
                return
            self.connected = True
            goal, leave = self._most, float("inf")
            acks: dict[int, int] = {}
            unacked = 0
            while True:
                message = await wire.receive()
                if message["op"] == "event":
                    self._hear(segment, message)
                    unacked += 1
                    if self._mode == "cursor" and unacked >= ACK_EVERY:
                        unacked = 0
                        self._acked.add(segment.last)
                        acks[wire.next_id] = segment.last
                        await wire.send("ack", channel=self.heard.channel, offset=segment.last, name=self.heard.name)
                    if self._pace:
                        await anyio.sleep(self._pace)
                elif message["op"] == "heartbeat":
                    if message["epoch"] == segment.epoch:
                        segment.beaten = max(segment.beaten, message["offset"])
                        self._wake()
                elif message["op"] == "acked":
                    self._confirmed = max(self._confirmed, acks.pop(message["id"]))
                if self._mode == "wander" and not self._resting:
                    if leave == float("inf") and segment.last >= goal:
                        leave = time.monotonic() + WANDER * (0.5 + self._rng.random())
                    if time.monotonic() > leave:
                        return

    async def _subscribe(self, wire: Wire) -> Segment | None:
        asked: tuple[str, int] | None = None
        allowed: frozenset[int] | None = None
        fields: dict[str, Any] = {} if self._filter is None else {"filter": self._filter}
        epoch, last = self.position
        if self._mode == "cursor" and self._confirmed and epoch == wire.connected["epoch"]:
            fields["since"] = {"cursor": self.heard.name}
            allowed = frozenset(each for each in self._acked if each >= self._confirmed)
        elif epoch:
            if self._mode == "wander" and epoch == wire.connected["epoch"]:
                last = self._rng.randrange(max(0, self._most - self._rng.choice([50, 500, 500, 5_000])), self._most + 1)
            asked = epoch, last
        elif self._since is not None:
            asked = wire.connected["epoch"], self._since
        if asked is not None:
            fields["since"] = {"epoch": asked[0], "offset": asked[1]}
        reply = await wire.answer(await wire.send("subscribe", channel=self.heard.channel, **fields))
        if reply["op"] != "subscribed":
            if not reply.get("temporary"):
                self.heard.broken.append(
                    f"{self.heard.name}: subscribing with {fields.get('since')} was refused: {reply.get('code')} {reply.get('message')}"
                )
                await anyio.sleep(LONGEST_PAUSE)
            return None
        return self._begin(reply, asked, allowed)

    # -- Server-Sent Events --------------------------------------------------------------------------------------------------

    async def _visit_web(self, door: str) -> None:
        epoch, last = self.position
        asked: tuple[str, int] | None = (epoch, last) if epoch else None
        headers = {} if asked is None else {"Last-Event-ID": f"{epoch}:{last}"}
        params = {"channel": self.heard.channel}
        if self._filter is not None:
            params["filter"] = msgspec.json.encode(self._filter).decode()
        async with Web(door) as web, web.stream("/v1/events", params=params, headers=headers) as events:
            segment: Segment | None = None
            async for fields in events:
                data = msgspec.json.decode(fields["data"])
                if segment is None:
                    segment = self._begin(data, asked, None)
                    self.connected = True
                    continue
                if fields["id"] != f"{data['epoch']}:{data['offset']}":
                    self.heard.broken.append(
                        f"{self.heard.name}: event {data['offset']} came with the id {fields['id']}"
                    )
                self._hear(segment, data)
                if self._pace:
                    await anyio.sleep(self._pace)

    # -- both ----------------------------------------------------------------------------------------------------------------

    def _begin(self, reply: dict[str, Any], asked: tuple[str, int] | None, allowed: frozenset[int] | None) -> Segment:
        segment = Segment(reply["epoch"], reply["offset"], asked, reply["recovered"], reply["was_recovering"], allowed)
        if segment.epoch != self._cursor_epoch:
            self._cursor_epoch, self._confirmed, self._most = segment.epoch, 0, 0
            self._acked.clear()
        self.heard.segments.append(segment)
        self._wake()
        return segment

    def _hear(self, segment: Segment, event: dict[str, Any]) -> None:
        if event["epoch"] != segment.epoch or event["channel"] != self.heard.channel:
            self.heard.broken.append(
                f"{self.heard.name}: an event of {event['epoch']}/{event['channel']} on {segment.epoch}/{self.heard.channel}"
            )
        if event["offset"] <= segment.beaten:
            self.heard.broken.append(
                f"{self.heard.name}: event {event['offset']} came after a heartbeat that said that nothing is missing up to {segment.beaten}"
            )
        segment.hear(event)
        self._most = max(self._most, event["offset"])
        self._wake()

    def _wake(self) -> None:
        self._moved.set()
        self._moved = anyio.Event()


__all__ = ["PATIENCE", "Listener", "Mode"]
