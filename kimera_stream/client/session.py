"""The client's commands."""

import ssl as ssl_module
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio

from kimera_stream.client.backoff import Backoff
from kimera_stream.client.errors import ConnectionLostError
from kimera_stream.client.lifeline import PASSING, Lifeline, Options, StateCallback, Token
from kimera_stream.client.subscription import Subscription
from kimera_stream.protocol import messages as m
from kimera_stream.protocol.errors import AlreadySubscribedError, NotFoundError, NotSubscribedError, UnavailableError
from kimera_stream.protocol.objects import Decision, GeoidBody, Position, WatchKind


@dataclass(frozen=True, slots=True)
class HistoryResult:
    """A page of ``history``: ``offset`` goes into the next ``since`` while ``more`` is true."""

    events: list[m.Event]
    epoch: str
    offset: int
    more: bool


def connect(
    url: str,
    *,
    token: Token | None = None,
    encoding: m.Encoding = "json",
    patience: float = 0.0,
    timeout: float = 30.0,
    max_pending: int = 256,
    max_message_bytes: int = 16 * 1024 * 1024,
    backoff: Backoff | None = None,
    ssl: ssl_module.SSLContext | None = None,
    name: str = "kimera-stream-python",
    on_state: StateCallback | None = None,
) -> "Client":
    """A client for the server at ``url``; use it as ``async with connect(...) as client``.

    Args:
        url: ``http(s)://`` or ``ws(s)://`` address of the server.
        token: Bearer token, or a function (plain or async) that returns a fresh one: it is asked at every connect and
            when the server says that the token is about to expire.
        encoding: ``json`` or ``msgpack``.
        patience: Seconds to keep trying to reach a server that is not there yet; ``math.inf`` waits for ever. A
            connection lost later is always taken up again.
        timeout: Seconds a command may take, waiting for a reconnect included.
        max_pending: Commands waiting for their reply at a time; more wait their turn.
        max_message_bytes: Largest message accepted.
        backoff: Delays between attempts.
        ssl: TLS context for ``https``/``wss``.
        name: How the client introduces itself.
        on_state: Told about connection changes, for people to see.

    Raises (on entering):
        UnavailableError: the server cannot be reached within ``patience``.
        UnauthorizedError, ForbiddenError, ConnectionEndedError: the server refuses the connection.
    """
    return Client(
        url,
        token=token,
        options=Options(
            encoding=encoding,
            patience=patience,
            timeout=timeout,
            max_pending=max_pending,
            max_message_bytes=max_message_bytes,
            backoff=backoff or Backoff(),
            ssl=ssl,
            name=name,
            on_state=on_state,
        ),
    )


class Client(Lifeline):
    """A connection to a server that outlives its sockets. Made by ``connect``.

    Every command raises the error class of the server's answer (``kimera_stream.protocol.errors``), or
    ``UnavailableError`` when no answer came in time. Commands that are safe to repeat are sent again after a lost
    connection; the others raise ``ConnectionLostError``.
    """

    async def publish(
        self, geoid: GeoidBody | str, *, key: str | None = None, priority: int | None = None, once: bool = True
    ) -> m.Published:
        """Publish a statement; returns when it is durable, scored and in the log.

        Args:
            geoid: The body, or just its text.
            key: Idempotency key.
            priority: 0 (first) to 9.
            once: Make up a key where none is given, so that a lost connection can be repaired by sending again.
        """
        body = GeoidBody(text=geoid) if isinstance(geoid, str) else geoid
        if key is None and once:
            key = uuid.uuid4().hex
        return await self._call(
            lambda i: m.Publish(id=i, geoid=body, key=key, priority=priority), m.Published, repeat=key is not None
        )

    async def delete(self, geoid_id: str) -> m.Deleted:
        """Delete a geoid."""
        return await self._call(lambda i: m.Delete(id=i, geoid_id=geoid_id), m.Deleted, repeat=False)

    async def resolve(self, contradiction_id: str, decision: Decision, reason: str | None = None) -> m.Resolved:
        """Resolve a contradiction, which forms a scar."""
        return await self._call(
            lambda i: m.Resolve(id=i, contradiction_id=contradiction_id, decision=decision, reason=reason),
            m.Resolved,
            repeat=False,
        )

    def subscribe(
        self,
        channel: str,
        *,
        since: Position | str | None = None,
        rewind: int | None = None,
        filter: dict[str, Any] | None = None,
        buffer: int = 1024,
    ) -> AbstractAsyncContextManager[Subscription]:
        """Subscribe for the duration of an ``async with`` block.

        Args:
            channel: Name of the channel.
            since: A position, or the name of a durable cursor (see ``ack``).
            rewind: Start with the last so many events.
            filter: Filter tree of the contract.
            buffer: Items kept for a consumer that is slower than the stream.

        Raises (on entering):
            AlreadySubscribedError: this client has the channel already.
            BadChannelError, BadFilterError, BadPositionError, ForbiddenError: as the server says.
        """
        return self._subscribe(channel, since, rewind, filter, buffer)

    @asynccontextmanager
    async def _subscribe(
        self,
        channel: str,
        since: Position | str | None,
        rewind: int | None,
        filter: dict[str, Any] | None,
        buffer: int,
    ) -> AsyncIterator[Subscription]:
        if channel in self._subscriptions:
            raise AlreadySubscribedError(f"channel: this client is subscribed to {channel} already", field="channel")
        sub = Subscription(channel, since=since, rewind=rewind, filter=filter, capacity=buffer, catch_up=self._catch_up)
        try:
            await self._start(sub)
            yield sub
        finally:
            self._subscriptions.pop(channel, None)
            sub.end(None)
            if self._link is not None:
                with anyio.move_on_after(2, shield=True):
                    await self._unsubscribe(channel)

    async def _start(self, sub: Subscription) -> None:
        """Ask for ``sub``; from the reply on it belongs to the connection and is asked for again after each loss."""
        while True:
            link = await self._live_link()
            body = sub.body()
            joined = False

            def on_reply(reply: m.Reply, body: m.SubscribeBody = body) -> None:
                nonlocal joined
                if isinstance(reply, m.Subscribed):
                    joined = True
                    self._subscriptions[sub.channel] = sub
                    sub.started(body, reply)

            try:
                with anyio.fail_after(self._options.timeout):
                    await link.call(
                        lambda i, body=body: m.Subscribe(  # type: ignore[misc]
                            id=i, channel=body.channel, since=body.since, rewind=body.rewind, filter=body.filter
                        ),
                        m.Subscribed,
                        on_reply=on_reply,
                    )
            except ConnectionLostError:
                if joined:
                    return
                if self._link is link:
                    await self._changed.wait()
            except TimeoutError as exc:
                raise UnavailableError(f"no reply from {self.url} within {self._options.timeout:g} s") from exc
            else:
                return

    async def _catch_up(self, sub: Subscription) -> None:
        """The consumer wants more of a subscription that had let go of the live edge: take it up at its position."""
        attempt = 0
        while not sub.ended:
            link = await self._live_link()
            if not sub.behind:
                return  # a reconnect has done it
            try:
                await self._unsubscribe(sub.channel)
                if self._link is link and sub.behind:
                    self._subscriptions.pop(sub.channel, None)
                    await self._start(sub)
            except PASSING as exc:
                if self._error is not None:
                    raise
                if not sub.ended:
                    self._subscriptions[sub.channel] = sub  # a reconnect meanwhile asks for it
                await anyio.sleep(self._options.backoff.delay(attempt, exc.retry_after))
                attempt += 1
            else:
                return

    async def _unsubscribe(self, channel: str) -> None:
        link = self._link
        if link is None:
            return
        try:
            await link.call(lambda i: m.Unsubscribe(id=i, channel=channel), m.Unsubscribed)
        except (ConnectionLostError, NotSubscribedError):
            return  # gone either way

    @asynccontextmanager
    async def watch(
        self,
        name: str,
        *,
        text: str | None = None,
        vector: list[float] | None = None,
        kinds: Sequence[WatchKind] = ("contradicts",),
        min_score: float | None = None,
        filter: dict[str, Any] | None = None,
        keep: bool = False,
        since: Position | str | None = None,
        buffer: int = 1024,
    ) -> AsyncIterator[Subscription]:
        """A standing semantic query for the duration of the block: its matches as a subscription.

        ``keep`` leaves the watch on the server afterwards, so that it goes on matching while nobody listens.
        """
        watching = await self._call(
            lambda i: m.WatchCommand(
                id=i,
                watch=name,
                text=text,
                vector=vector,
                kinds=list(kinds),
                min_score=min_score,
                filter=filter,
            ),
            m.Watching,
            repeat=True,
        )
        try:
            async with self.subscribe(watching.channel, since=since, buffer=buffer) as matches:
                yield matches
        finally:
            if not keep and self._link is not None:
                with anyio.move_on_after(2, shield=True):
                    await self.unwatch(name)

    async def unwatch(self, name: str) -> None:
        """Remove a watch; one that is gone already is no error."""
        try:
            await self._call(lambda i: m.Unwatch(id=i, watch=name), m.Unwatched, repeat=True)
        except NotFoundError:
            return

    async def history(
        self, channel: str, *, since: Position | str | None = None, limit: int = 100, reverse: bool = False
    ) -> HistoryResult:
        """A page of past events of a log channel (at most 1000)."""
        after = {"cursor": since} if isinstance(since, str) else None
        if isinstance(since, Position):
            after = {"epoch": since.epoch, "offset": since.offset}  # type: ignore[dict-item]
        page = await self._call(
            lambda i: m.History(id=i, channel=channel, since=after, limit=limit, reverse=reverse),
            m.HistoryPage,
            repeat=True,
        )
        return HistoryResult([self._codec.event(raw) for raw in page.events], page.epoch, page.offset, page.more)

    async def presence(self, channel: str) -> m.PresenceReply:
        """Who listens to the channel."""
        return await self._call(lambda i: m.Presence(id=i, channel=channel), m.PresenceReply, repeat=True)

    async def ack(self, channel: str, offset: int, name: str) -> None:
        """Store ``offset`` as the durable cursor ``name``; subscribe with ``since=name`` goes on there."""
        await self._call(lambda i: m.Ack(id=i, channel=channel, offset=offset, name=name), m.Acked, repeat=True)

    async def refresh(self, token: str) -> int | None:
        """Replace the connection's token; returns when the new one expires (unix seconds)."""
        return (await self._call(lambda i: m.Refresh(id=i, token=token), m.Refreshed, repeat=False)).expires

    async def ping(self) -> Position:
        """The log's newest position."""
        pong = await self._call(lambda i: m.Ping(id=i), m.Pong, repeat=True)
        return Position(pong.epoch, pong.offset)
