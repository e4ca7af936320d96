"""Commands carried out: each becomes one call of a service and one reply. Shared by all connections."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import anyio
import msgspec

from kimera_stream.core.access import Principal
from kimera_stream.core.interfaces import KnowledgeService, VaultService
from kimera_stream.core.validation import check_one_of
from kimera_stream.protocol.channels import channel_kind, check_id, is_id
from kimera_stream.protocol.errors import BadPositionError, BadRequestError, NotFoundError
from kimera_stream.protocol.explaining import bad_request
from kimera_stream.protocol.messages import (
    Ack,
    Acked,
    AnyCommand,
    CursorRef,
    Delete,
    Deleted,
    Encoding,
    History,
    HistoryPage,
    Ping,
    Pong,
    Presence,
    PresenceReply,
    Publish,
    Published,
    Reply,
    Resolve,
    Resolved,
    Unwatch,
    Unwatched,
    WatchCommand,
    Watching,
    parse_since,
)
from kimera_stream.protocol.objects import Position
from kimera_stream.streaming.hub import Hub
from kimera_stream.streaming.starts import Start, require_watch, unknown_watch

_DEFAULT_PRIORITY: Final = 5
PresenceOfAll = Callable[[str], Awaitable[tuple[int, dict[str, int]]]]
"""``Hub.presence`` over several nodes."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, on which connection."""

    principal: Principal
    session: str
    encoding: Encoding


@dataclass(slots=True)
class _Turns:
    """Who moves one cursor, one after the other."""

    lock: anyio.Lock = field(default_factory=anyio.Lock)
    taken: int = 0


class Commands:
    """Args: hub, knowledge, vault: what the commands act on. presence: who listens where, on all nodes; None: there is one."""

    def __init__(
        self, hub: Hub, knowledge: KnowledgeService, vault: VaultService, presence: PresenceOfAll | None = None
    ) -> None:
        self._hub = hub
        self._presence_of_all = presence
        self._knowledge = knowledge
        self._vault = vault
        self._turns: dict[tuple[str, str, str], _Turns] = {}
        """Of cursors that are being moved."""
        self._handlers: dict[type[Any], Callable[[Any, Caller], Awaitable[Reply]]] = {
            Publish: self._publish,
            Delete: self._delete,
            Resolve: self._resolve,
            WatchCommand: self._watch,
            Unwatch: self._unwatch,
            History: self._history,
            Presence: self._presence,
            Ack: self._ack,
            Ping: self._ping,
        }

    async def execute(self, command: AnyCommand, caller: Caller) -> Reply:
        """Carry out one command.

        Raises:
            OperationalError: to be answered to the caller.
        """
        return await self._handlers[type(command)](command, caller)

    def start_live(self, channel: str) -> Start:
        """The start of a subscription for which ``starts_at_once`` holds.

        Raises:
            BadChannelError: there is no such channel.
        """
        return self._hub.start_live(channel)

    def starts_at_once(self, channel: str, since: object, rewind: int | None) -> bool:
        """Whether such a subscription starts with the next event, so that nothing has to be looked up."""
        return since is None and not rewind and unknown_watch(self._knowledge, channel) is None

    async def start(
        self, channel: str, since: Position | CursorRef | None, rewind: int | None, principal: Principal
    ) -> Start:
        """Where a subscription starts, a durable cursor looked up.

        Raises:
            NotFoundError: there is no such cursor, or no such watch.
            OperationalError: as ``Hub.resolve``.
        """
        channel_kind(channel, max_bytes=self._hub.settings.max_channel_bytes)
        await require_watch(self._knowledge, channel)
        if isinstance(since, CursorRef):
            named = is_id(since.cursor)  # nothing else can have been saved
            offset = await self._vault.cursor(principal.id, since.cursor, channel) if named else None
            if offset is None:
                raise NotFoundError(
                    f"since.cursor: no cursor {since.cursor!r} on {channel}; make one with ack", field="since.cursor"
                )
            if offset > await self._hub.head(offset):
                # A restored log is shorter than what was acknowledged on the old one.
                return Start(None, was_recovering=True)
            since = Position(self._hub.epoch, offset)
        return await self._hub.resolve(channel, since, rewind)

    async def _publish(self, command: Publish, caller: Caller) -> Reply:
        result = await self._knowledge.publish(
            command.geoid,
            principal=caller.principal,
            session_id=caller.session,
            key=command.key,
            priority=_DEFAULT_PRIORITY if command.priority is None else command.priority,
        )
        return Published(
            id=command.id,
            geoid=result.geoid,
            offset=result.offset,
            contradictions=result.contradictions,
            duplicate=result.duplicate,
        )

    async def _delete(self, command: Delete, caller: Caller) -> Reply:
        offset = await self._knowledge.delete(command.geoid_id, principal=caller.principal, session_id=caller.session)
        return Deleted(id=command.id, geoid_id=command.geoid_id, offset=offset)

    async def _resolve(self, command: Resolve, caller: Caller) -> Reply:
        check_id(command.contradiction_id, "contradiction_id")
        scar, offset = await self._knowledge.resolve(
            command.contradiction_id,
            command.decision,
            command.reason,
            principal=caller.principal,
            session_id=caller.session,
        )
        return Resolved(id=command.id, scar=scar, offset=offset)

    async def _watch(self, command: WatchCommand, caller: Caller) -> Reply:
        check_id(command.watch, "watch", what="a name of")
        check_one_of(command.text, command.vector)
        if not command.kinds:
            raise BadRequestError("kinds: expected at least one of contradicts, related", field="kinds")
        self._hub.compile(command.filter)
        watch = await self._knowledge.watch(
            command.watch,
            principal=caller.principal,
            text=command.text,
            vector=command.vector,
            kinds=command.kinds,
            min_score=command.min_score,
            filter=command.filter,
        )
        return Watching(id=command.id, watch=watch.watch, channel=f"watch:{watch.id}")

    async def _unwatch(self, command: Unwatch, caller: Caller) -> Reply:
        check_id(command.watch, "watch", what="a name of")
        await self._knowledge.unwatch(command.watch, principal=caller.principal)
        return Unwatched(id=command.id, watch=command.watch)

    async def _presence(self, command: Presence, caller: Caller) -> Reply:
        subscribers, principals = self._hub.presence(command.channel)
        if self._presence_of_all is not None:
            subscribers, principals = await self._presence_of_all(command.channel)
        return PresenceReply(id=command.id, subscribers=subscribers, principals=principals)

    async def _ack(self, command: Ack, caller: Caller) -> Reply:
        channel_kind(command.channel, max_bytes=self._hub.settings.max_channel_bytes)
        check_id(command.name, "name", what="a cursor name of")
        async with self._in_turn((caller.principal.id, command.name, command.channel)):
            await self._move_cursor(command, caller)
        return Acked(id=command.id)

    @asynccontextmanager
    async def _in_turn(self, cursor: tuple[str, str, str]) -> AsyncIterator[None]:
        """Where a cursor is put last it stays: it is moved as often, and in the order, as that was asked for."""
        turns = self._turns.setdefault(cursor, _Turns())
        turns.taken += 1
        try:
            async with turns.lock:
                yield
        finally:
            turns.taken -= 1
            if not turns.taken:
                del self._turns[cursor]

    async def _move_cursor(self, command: Ack, caller: Caller) -> None:
        head = await self._hub.head(command.offset)
        if command.offset > head:
            raise BadPositionError(
                f"offset: {command.offset} is ahead of the log, whose newest entry is {head}", field="offset"
            )
        await self._vault.save_cursor(caller.principal.id, command.name, command.channel, command.offset)

    async def _ping(self, command: Ping, caller: Caller) -> Reply:
        return Pong(id=command.id, epoch=self._hub.epoch, offset=max(self._hub.log.head, self._hub.delivered))

    async def _history(self, command: History, caller: Caller) -> Reply:
        try:
            since = parse_since(command.since)
        except msgspec.ValidationError as exc:
            field = bad_request(exc).field
            raise BadRequestError(
                'since: expected {"epoch", "offset"} or {"cursor"}', field=f"since.{field}" if field else "since"
            ) from exc
        page = await self.history(
            command.channel,
            since=since,
            limit=command.limit,
            reverse=command.reverse,
            principal=caller.principal,
            encoding=caller.encoding,
        )
        return msgspec.structs.replace(page, id=command.id)

    async def history(
        self,
        channel: str,
        *,
        since: Position | CursorRef | None,
        limit: int,
        reverse: bool,
        principal: Principal,
        encoding: Encoding,
    ) -> HistoryPage:
        """A page of a channel. ``offset`` of the answer is where to go on from: after the last entry looked at, in reverse the newest
        one, so that a subscription from there continues what the page shows.

        A page also ends where it fills half of a connection's outbox, so that no reply can make its receiver a slow consumer.

        Raises:
            BadPositionError: ``since`` is of another epoch, ahead of the log, or older than what is kept.
            OperationalError: bad channel, limit out of range, unknown cursor.
        """
        hub = self._hub
        if limit > hub.settings.history_page:
            raise BadRequestError(f"limit: expected 1 to {hub.settings.history_page}", field="limit")
        if channel_kind(channel, max_bytes=hub.settings.max_channel_bytes) == "latest":
            return self._newest_as_page(channel, encoding)
        start = await self.start(channel, since, None, principal)
        if start.was_recovering and not start.recovered:
            raise self._not_kept()
        after = hub.log.trimmed if start.position is None else start.position
        newest = max(after, await hub.head())
        page = await hub.log.read(channel, after=after, limit=limit, until=newest, reverse=reverse)
        if start.recovered and after < hub.log.trimmed:
            # Retention passed by meanwhile, or this node had not heard of it: the page may lack what came first.
            raise self._not_kept()
        budget = hub.settings.outbox_bytes // 2
        events: list[msgspec.Raw] = []
        for entry in page.entries:
            payload = hub.encoder.payload(entry, channel, encoding)
            budget -= len(payload)
            if events and budget < 0:
                break
            events.append(msgspec.Raw(payload))
        cut = len(events) < len(page.entries)
        offset = newest if reverse else page.scanned
        if cut and not reverse:
            offset = page.entries[len(events) - 1].offset
        return HistoryPage(events=events, epoch=hub.epoch, offset=offset, more=page.more or cut)

    def _not_kept(self) -> BadPositionError:
        log = self._hub.log
        return BadPositionError(
            f"since: not kept any more, or of another log; this one is {log.epoch} after {log.trimmed}", field="since"
        )

    def _newest_as_page(self, channel: str, encoding: Encoding) -> HistoryPage:
        hub = self._hub
        value = hub.newest_value(channel)
        if value is None:
            return HistoryPage(events=[], epoch=hub.epoch, offset=hub.flushed, more=False)
        payload = hub.encoder.value_payload(
            channel, encoding, offset=value.offset, type=value.type, ts=value.ts, data=value.data
        )
        return HistoryPage(events=[msgspec.Raw(payload)], epoch=hub.epoch, offset=value.offset, more=False)
