"""The hub: committed entries in, joined frames out to everyone who listens.

    deliver -> tail, pending -> (tick) -> selections: filter once, frame once, join once -> one write per connection

Every subscriber at the live edge has seen exactly what is at or below ``flushed``. One that is not there reads on from its own
position (``catchup``) and goes live in the same breath in which its position equals ``flushed``; nothing can happen in between,
so there is no hand-over at which an event could be lost or repeated.
"""

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from itertools import islice
from typing import Any, Protocol

import anyio
import structlog

from kimera_stream.core.interfaces import LogReader
from kimera_stream.infrastructure.settings import StreamSettings
from kimera_stream.kernels.egress import fan_out
from kimera_stream.protocol.channels import channel_kind
from kimera_stream.protocol.close_codes import CloseCode
from kimera_stream.protocol.codec import Codec, EventEncoder
from kimera_stream.protocol.errors import AlreadySubscribedError, NotSubscribedError
from kimera_stream.protocol.filters import Filter, compile_filter
from kimera_stream.protocol.log import LogEntry
from kimera_stream.protocol.messages import Subscribed
from kimera_stream.protocol.objects import Position
from kimera_stream.streaming.catchup import CatchUp
from kimera_stream.streaming.deadlines import Deadlines
from kimera_stream.streaming.egress import Egress, FanOut
from kimera_stream.streaming.joiner import Batches, Joiner
from kimera_stream.streaming.metrics import HubMetrics
from kimera_stream.streaming.outlet import Outlet, OutletOwner, Spawn, Subscription
from kimera_stream.streaming.reader import Reader, read
from kimera_stream.streaming.records import Record, Tail
from kimera_stream.streaming.selections import Channel, Selection, Value, Waiter
from kimera_stream.streaming.starts import Start, resolve

log = structlog.get_logger(__name__)


class Elsewhere(Protocol):
    """Connections that principals have on other nodes."""

    def known(self, principal: str) -> int:
        """As last heard: a moment old."""
        ...

    async def count(self, principal: str) -> int:
        """As they are now."""
        ...


class Hub:
    """Fan-out of one log. Implements ``core.interfaces.EventSink``.

    Everything but ``run``, ``resolve`` and readers is synchronous and belongs to the event loop's thread.

    Args:
        log: The log that the entries come from, and that laggards read.
        settings: The ``stream`` group.
        metrics: Counters; None: a registry of its own.
        fan_out: How the same bytes are written to many handles.
        clock: Monotonic seconds.
        wall_clock: Unix seconds, for the time of values of latest channels.
        refresh: Where other nodes write the log too: asks it for its head.
        elsewhere: Connections on other nodes; None: there are none.
    """

    def __init__(
        self,
        log: LogReader,
        settings: StreamSettings,
        *,
        metrics: HubMetrics | None = None,
        fan_out: FanOut = fan_out,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        refresh: Callable[[], Awaitable[int]] | None = None,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        self.log = log
        self._refresh = refresh
        self._elsewhere = elsewhere
        self.settings = settings
        self.clock = clock
        self.epoch = log.epoch
        self.encoder = EventEncoder(log.epoch)
        self.delivered = log.head
        """Offset of the newest entry the hub was given."""
        self.flushed = log.head
        """Offset up to which everyone at the live edge has been served."""
        self.tail = Tail(settings.tail_bytes, last=log.head)
        self.source = CatchUp(log, self.tail, self.encoder, cache_bytes=max(settings.tail_bytes // 2, 1 << 20))
        self.deadlines = Deadlines(clock)
        self.metrics = metrics or HubMetrics()
        self._wall_clock = wall_clock
        self._joiner = Joiner(self.encoder, self.metrics, fan_out)
        self._channels: dict[str, Channel] = {}
        self._outlets: dict[Outlet, None] = {}
        self._principals: Counter[str] = Counter()
        """Connections by whose they are."""
        self.metrics.connections.set_function(self._outlets.__len__)
        self._pending: list[Record] = []
        self._pending_values: list[tuple[str, Value]] = []
        self._newest: dict[str, Value] = {}
        self._wake = anyio.Event()
        self._flushing = False
        self._paused_now: list[Outlet] = []
        self._stalled: dict[Outlet, None] = {}
        self._ahead: dict[Outlet, None] = {}
        self._readers: dict[Waiter, None] = {}
        self._mixed = 0
        self._bytes_seen = 0
        self._ended = False
        self._empty = anyio.Event()

    # -- in: EventSink

    def deliver(self, entries: Sequence[LogEntry]) -> None:
        """Take newly committed entries, in order. Entries already delivered are ignored; after a gap everyone reads the log."""
        for entry in entries:
            if entry.offset <= self.delivered:
                continue
            if entry.offset != self.delivered + 1:
                self._skip_to(entry.offset - 1)
            record = self.tail.append(entry)
            self._pending.append(record)
            self.delivered = entry.offset
        self._wake.set()

    def latest(self, channel: str, type: str, data: bytes, *, offset: int) -> None:
        """A new value of a latest channel; ``data`` is JSON."""
        previous = self._newest.get(channel)
        number = 1 if previous is None else previous.number + 1
        value = Value(number, type, int(self._wall_clock() * 1000), data, offset)
        self._newest[channel] = value
        self._pending_values.append((channel, value))
        self._wake.set()

    def newest(self, channel: str) -> bytes | None:
        """The newest value of a latest channel as JSON, None before the first."""
        value = self._newest.get(channel)
        return None if value is None else value.data

    def newest_value(self, channel: str) -> Value | None:
        """The same with its type, time and offset."""
        return self._newest.get(channel)

    # -- Presence, statistics

    def presence(self, channel: str) -> tuple[int, dict[str, int]]:
        """Number of subscriptions to the channel, and connections per principal id.

        Raises:
            BadChannelError: there is no such channel.
        """
        channel_kind(channel, max_bytes=self.settings.max_channel_bytes)
        found = self._channels.get(channel)
        return (found.subscribers, dict(found.principals)) if found else (0, {})

    @property
    def principals(self) -> Mapping[str, int]:
        """Connections by whose they are."""
        return self._principals

    def statistics(self) -> dict[str, int]:
        """Counts for the ``stats`` channel and for health reports."""
        return {
            "connections": len(self._outlets),
            "subscriptions": sum(channel.subscribers for channel in self._channels.values()),
            "channels": len(self._channels),
            "lagging": sum(1 for outlet in self._outlets if not outlet.caught_up),
            "stalled": len(self._stalled),
            "readers": len(self._readers),
            "tail_bytes": self.tail.bytes,
            "tail_events": len(self.tail),
            "position": self.flushed,
            "log_reads": self.source.log_reads,
        }

    @property
    def stalled_connections(self) -> int:
        """Connections whose buffer is above its high-water mark."""
        return len(self._stalled)

    def value_frame(self, selection: Selection, value: Value) -> bytes:
        """The frame of a latest channel's value."""
        return self._joiner.value_frame(selection, value)

    async def head(self, wanted: int | None = None) -> int:
        """The newest offset. Where other nodes write the log too, they are ahead of what was delivered here: the log is asked,
        unless ``wanted`` is known to be there.

        Raises:
            UnavailableError: it cannot be asked.
        """
        known = max(self.log.head, self.delivered)
        if self._refresh is None or (wanted is not None and wanted <= known):
            return known
        return max(known, await self._refresh())

    # -- subscribing

    def compile(self, tree: Mapping[str, Any] | None) -> Filter | None:
        """A filter tree under the configured limits.

        Raises:
            BadFilterError: naming the node and what is expected.
        """
        if tree is None:
            return None
        return compile_filter(dict(tree), max_nodes=self.settings.filter_nodes, max_depth=self.settings.filter_depth)

    async def resolve(self, channel: str, since: Position | None, rewind: int | None) -> Start:
        """Where a subscription that asks for ``since`` or ``rewind`` starts.

        Raises:
            BadChannelError: there is no such channel.
            BadPositionError: ``since`` is ahead of the log.
            BadRequestError: both were given, or ``rewind`` is too long.
        """
        return await resolve(
            self.log,
            self.settings,
            channel,
            since,
            rewind,
            flushed=self.flushed,
            head=await self.head(0 if since is None else since.offset),
        )

    def start_live(self, channel: str) -> Start:
        """The start of a subscription that asks for nothing older.

        Raises:
            BadChannelError: there is no such channel.
        """
        channel_kind(channel, max_bytes=self.settings.max_channel_bytes)
        return Start(None)

    def connect(
        self,
        egress: Egress,
        codec: Codec,
        *,
        spawn: Spawn,
        owner: OutletOwner | None = None,
    ) -> Outlet:
        """A new connection.

        Args:
            spawn: Starts children of its task group.
            owner: Hears of its end, and that the server stops.
        """
        outlet = Outlet(self, egress, codec, spawn=spawn, owner=owner)
        egress.listen(outlet)
        self._outlets[outlet] = None
        return outlet

    def identify(self, outlet: Outlet, principal: str, *, limit: int) -> bool:
        """Whose connection it is; False: ``limit`` of theirs are open already, as far as this node has heard. Where not all of them are
        open here (``full``), ``identify_counted`` decides.
        """
        return self._admit(outlet, principal, limit, 0 if self._elsewhere is None else self._elsewhere.known(principal))

    def full(self, principal: str, *, limit: int) -> bool:
        """Whether ``limit`` connections of theirs are open on this node alone."""
        return self._elsewhere is None or self._principals[principal] >= limit

    async def identify_counted(self, outlet: Outlet, principal: str, *, limit: int) -> bool:
        """``identify`` by what is open elsewhere at present: some of what this node has heard of may be gone, and nobody is refused for that.

        False too if the connection ended meanwhile.
        """
        elsewhere = 0 if self._elsewhere is None else await self._elsewhere.count(principal)
        return not outlet.ended and self._admit(outlet, principal, limit, elsewhere)

    def _admit(self, outlet: Outlet, principal: str, limit: int, elsewhere: int) -> bool:
        if self._principals[principal] + elsewhere >= limit:
            return False
        self._principals[principal] += 1
        outlet.principal = principal
        outlet.identified = True
        return True

    def open(
        self, outlet: Outlet, channel: str, start: Start, filter: Filter | None
    ) -> tuple[Subscription, Subscribed]:
        """Add a subscription, which stays silent until ``begin``; so the reply can go out before the first event.

        Raises:
            AlreadySubscribedError: the connection is on that channel.
        """
        if channel in outlet.subscriptions:
            raise AlreadySubscribedError(f"channel: already subscribed to {channel}", field="channel")
        if start.position is not None and start.position < self.log.trimmed:
            # Retention passed the position while the start was being looked up.
            start = Start(None, was_recovering=start.was_recovering)
        position = self.flushed if start.position is None else start.position
        selection = self.enter(channel, filter, outlet.codec, outlet.principal)
        subscription = Subscription(outlet, selection, position)
        outlet.subscriptions[channel] = subscription
        reply = Subscribed(
            channel=channel,
            epoch=self.epoch,
            offset=position,
            was_recovering=start.was_recovering,
            recovered=start.recovered,
        )
        return subscription, reply

    def begin(self, subscription: Subscription) -> None:
        """Let the events flow."""
        subscription.outlet.catch_up()

    def close(self, outlet: Outlet, channel: str) -> None:
        """End a subscription.

        Raises:
            NotSubscribedError: there is none.
        """
        subscription = outlet.subscriptions.pop(channel, None)
        if subscription is None:
            raise NotSubscribedError(f"channel: not subscribed to {channel}", field="channel")
        self._fall_back(subscription)
        self.exit(subscription.selection, outlet.principal)

    def forget(self, outlet: Outlet) -> None:
        """The connection is gone."""
        for subscription in outlet.subscriptions.values():
            self._fall_back(subscription)
            self.exit(subscription.selection, outlet.principal)
        outlet.subscriptions.clear()
        self._outlets.pop(outlet, None)
        if outlet.identified:
            outlet.identified = False
            self._principals[outlet.principal] -= 1
            if not self._principals[outlet.principal]:
                del self._principals[outlet.principal]
        self._stalled.pop(outlet, None)
        self._ahead.pop(outlet, None)
        if not self._outlets:
            self._empty.set()

    def enter(self, name: str, filter: Filter | None, codec: Codec, principal: str) -> Selection:
        """Count a listener in and give it its selection."""
        channel = self._channels.get(name)
        if channel is None:
            channel = Channel(name, channel_kind(name, max_bytes=self.settings.max_channel_bytes))
            self._channels[name] = channel
        group = channel.group(filter)
        if (
            not group.users
            and (newest := self._newest.get(name)) is not None
            and (filter is None or filter.matches(self._joiner.view_of(name, newest)()))
        ):
            # What is pending reaches the group with the tick; only what went before it is taken over here.
            pending = sum(1 for pending_name, _ in self._pending_values if pending_name == name)
            if not pending:
                group.value = Value(1, newest.type, newest.ts, newest.data, newest.offset)
        selection = group.selection(codec.encoding)
        channel.enter(selection, principal)
        return selection

    def exit(self, selection: Selection, principal: str) -> None:
        """Count a listener out."""
        selection.channel.exit(selection, principal)
        if not selection.channel.subscribers:
            self._channels.pop(selection.channel.name, None)

    def reader(
        self,
        channel: str,
        *,
        since: Position | None = None,
        filter: Filter | None = None,
        rewind: int | None = None,
        principal: str = "",
    ) -> AbstractAsyncContextManager[tuple[Subscribed, Reader]]:
        """A pulling reader with the same semantics as a subscription; see ``streaming.reader``."""
        return read(self, channel, since=since, filter=filter, rewind=rewind, principal=principal)

    # -- the live edge

    def go_live(self, subscription: Subscription) -> None:
        """Put a subscription whose position is ``flushed`` at the live edge."""
        outlet = subscription.outlet
        subscription.live = True
        outlet.live += 1
        if outlet.live == 2:
            self._mixed += 1
        subscription.selection.join(subscription)

    def _fall_back(self, subscription: Subscription) -> None:
        """Take a subscription off the live edge; it stands where the live edge stands now."""
        if not subscription.live:
            return
        outlet = subscription.outlet
        subscription.live = False
        subscription.position = self.flushed
        value = subscription.selection.group.value
        subscription.seen = 0 if value is None else value.number
        subscription.selection.leave(subscription)
        outlet.live -= 1
        if outlet.live == 1:
            self._mixed += 1

    def stalled(self, outlet: Outlet) -> None:
        """The outlet's buffer is full. In the middle of a tick this waits for its end: what is written counts as delivered."""
        self._stalled[outlet] = None
        outlet.backlog_mark = self._bytes_seen
        if self._flushing:
            self._paused_now.append(outlet)
        else:
            self._park(outlet)

    def unstalled(self, outlet: Outlet) -> None:
        self._stalled.pop(outlet, None)

    def await_position(self, outlet: Outlet) -> None:
        """The outlet has a subscription ahead of ``flushed``: go on once that is reached."""
        self._ahead[outlet] = None

    def _park(self, outlet: Outlet) -> None:
        for subscription in outlet.subscriptions.values():
            self._fall_back(subscription)

    def _skip_to(self, last: int) -> None:
        """Entries up to ``last`` never came by: whoever is live reads them from the log."""
        log.warning("gap in delivery; subscribers read the log", after=self.delivered, until=last)
        self.flush()
        laggards = [outlet for outlet in self._outlets if outlet.live]
        for outlet in laggards:
            self._park(outlet)
        readers = list(self._readers)
        flushed, self.delivered, self.flushed = self.flushed, last, last
        self.tail.clear(last=last)
        for outlet in laggards:
            outlet.catch_up()
        for waiter in readers:
            waiter.wake(flushed)

    # -- the tick

    def flush(self) -> None:
        """Serve everyone at the live edge with what was delivered since the last time."""
        try:
            self._serve_pending()
        except Exception:
            # Who got what of this tick is unknown now. Closing everyone keeps the promise: they resume from their positions.
            self._paused_now.clear()
            self.flushed = self.delivered
            self.end_all(CloseCode.GOING_AWAY)
            raise

    def _serve_pending(self) -> None:
        records, self._pending = self._pending, []
        values, self._pending_values = self._pending_values, []
        if not records and not values:
            return
        until, before = self.delivered, self.flushed
        batches: Batches = {}
        for record in records:
            self._bytes_seen += record.size
            for name in record.entry.channels:
                channel = self._channels.get(name)
                if channel is not None:
                    self._joiner.select(record, channel, batches)
        for name, value in values:
            channel = self._channels.get(name)
            if channel is not None:
                self._joiner.select_value(value, channel, batches)
        self._flushing = True
        try:
            oversized, overfull = self._joiner.write(batches, self._mixed, self.clock())
        finally:
            self._flushing = False
        resume = self._ahead
        self._ahead = {}
        unwritten = [subscription for selection in oversized for subscription in selection.live]
        for outlet in overfull:
            unwritten += [sub for sub in outlet.subscriptions.values() if sub.selection.channel.kind == "log"]
        for subscription in unwritten:
            if subscription.live:  # else it had come to that already
                # Not written, so it stands where the tick began, and reads on from there.
                self._fall_back(subscription)
                subscription.position = before
                resume[subscription.outlet] = None
        self.flushed = until
        for outlet in self._paused_now:
            self._park(outlet)
        self._paused_now.clear()
        self.tail.settle(records)
        for outlet in resume:
            outlet.catch_up()
        for selection in batches:
            for waiter in list(selection.waiters):
                waiter.wake(before)
        if self._stalled and self.settings.slow_consumer == "disconnect":
            for outlet in list(self._stalled):
                # Of a latest channel it is owed one value, however long it has stalled.
                owed = any(sub.selection.channel.kind == "log" for sub in outlet.subscriptions.values())
                if owed and self._bytes_seen - outlet.backlog_mark > self.settings.outbox_bytes:
                    outlet.end(CloseCode.SLOW_CONSUMER)

    # -- life

    async def run(self) -> None:
        """Tick and keep time until cancelled. A service of the supervisor: restartable, and everything above goes on after."""
        async with anyio.create_task_group() as group:
            group.start_soon(self.deadlines.run, name="stream deadlines")
            group.start_soon(self._tick, name="stream ticks")

    async def _tick(self) -> None:
        """Immediately when quiet; under load events gather for a tick, so that each connection gets one write for many."""
        tick = self.settings.tick
        while True:
            await self._wake.wait()
            self._wake = anyio.Event()
            started = self.clock()
            self.flush()
            took = self.clock() - started
            if tick:
                # However long a tick takes, commands, handshakes and catching up get a fifth of the time at the least.
                await anyio.sleep(max(tick - took, took / 4))
            else:
                await anyio.lowlevel.checkpoint()

    def end_all(self, code: CloseCode) -> None:
        """Close every connection and end every reader."""
        for outlet in list(self._outlets):
            outlet.end(code)
        for reader in list(self._readers):
            reader.end()

    @property
    def connections(self) -> int:
        """Connections, whoever's they are, without those that were asked to leave."""
        return sum(not outlet.leaving for outlet in self._outlets)

    def send_away(self, count: int) -> None:
        """Close so many connections with 4005, the oldest of those that have all that there is: they come back elsewhere."""
        settled = (o for o in self._outlets if o.identified and o.caught_up and not o.leaving)
        for outlet in list(islice(settled, count)):
            outlet.egress_draining(CloseCode.REBALANCE)

    def recheck(self) -> None:
        """Have every connection ask again whether it may be here."""
        for outlet in list(self._outlets):
            if outlet.owner is not None:
                outlet.owner.outlet_doubted()

    async def shutdown(self, deadline: float) -> int:
        """Flush, ask every connection to finish, and wait; those still there after ``deadline`` seconds are aborted.

        Returns:
            How many had to be aborted.
        """
        self._ended = True
        self.flush()
        for reader in list(self._readers):
            reader.end()
        for outlet in list(self._outlets):
            outlet.egress_draining()
        with anyio.move_on_after(deadline):
            while self._outlets:
                self._empty = anyio.Event()
                await self._empty.wait()
        left = list(self._outlets)
        for outlet in left:
            outlet.end(CloseCode.SHUTDOWN)
            outlet.egress.abort()
        return len(left)

    @property
    def ended(self) -> bool:
        """Whether the hub takes no more connections."""
        return self._ended

    def add_reader(self, reader: Waiter) -> None:
        self._readers[reader] = None

    def remove_reader(self, reader: Waiter) -> None:
        self._readers.pop(reader, None)
