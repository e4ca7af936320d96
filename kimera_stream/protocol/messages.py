"""Every message of the WebSocket protocol (section 3 of the contract).

A message is an object whose ``op`` names its type. Commands are decoded strictly (unknown fields are refused);
replies and pushes are decoded leniently by clients, so that fields can be added.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from kimera_stream.protocol.errors import ErrorCode
from kimera_stream.protocol.objects import (
    Contradiction,
    Decision,
    Geoid,
    GeoidBody,
    Position,
    Scar,
    WatchKind,
)

CommandId = Annotated[int, Meta(ge=1, le=0xFFFF_FFFF)]
Filter = dict[str, Any]
"""A filter tree as received; ``protocol.filters.compile_filter`` checks it."""


class CursorRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A durable cursor by name, in place of a position."""

    cursor: str


class ClientInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a client says of itself. Informative only."""

    name: str
    version: str = ""


class ServerInfo(msgspec.Struct, frozen=True):
    name: str
    version: str
    node: str


class SubscribeBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``subscribe`` asks for, without an id: also the items of ``connect.subs``.

    ``since`` is a position or a cursor; the session converts it (see ``parse_since``), so that one command decodes
    whichever of the two it carries.
    """

    channel: str
    since: dict[str, Any] | None = None
    rewind: Annotated[int, Meta(ge=0)] | None = None
    filter: Filter | None = None


# -- commands ------------------------------------------------------------------------------------------------------


class Command(msgspec.Struct, frozen=True, kw_only=True, tag_field="op", forbid_unknown_fields=True):
    """Base of every command."""

    id: CommandId


class Connect(Command, tag="connect", frozen=True, kw_only=True):
    token: str | None = None
    client: ClientInfo | None = None
    subs: list[SubscribeBody] | None = None


class Subscribe(Command, tag="subscribe", frozen=True, kw_only=True):
    channel: str
    since: dict[str, Any] | None = None
    rewind: Annotated[int, Meta(ge=0)] | None = None
    filter: Filter | None = None


class Unsubscribe(Command, tag="unsubscribe", frozen=True, kw_only=True):
    channel: str


class Publish(Command, tag="publish", frozen=True, kw_only=True):
    geoid: GeoidBody
    key: Annotated[str, Meta(min_length=1, max_length=255)] | None = None
    priority: Annotated[int, Meta(ge=0, le=9)] | None = None


class Delete(Command, tag="delete", frozen=True, kw_only=True):
    geoid_id: str


class Resolve(Command, tag="resolve", frozen=True, kw_only=True):
    contradiction_id: str
    decision: Decision
    reason: str | None = None


class WatchCommand(Command, tag="watch", frozen=True, kw_only=True):
    watch: str
    text: str | None = None
    vector: list[float] | None = None
    kinds: list[WatchKind]
    min_score: Annotated[float, Meta(ge=0, le=1)] | None = None
    filter: Filter | None = None


class Unwatch(Command, tag="unwatch", frozen=True, kw_only=True):
    watch: str


class History(Command, tag="history", frozen=True, kw_only=True):
    channel: str
    since: dict[str, Any] | None = None
    limit: Annotated[int, Meta(ge=1)]
    reverse: bool = False


class Presence(Command, tag="presence", frozen=True, kw_only=True):
    channel: str


class Ack(Command, tag="ack", frozen=True, kw_only=True):
    channel: str
    offset: Annotated[int, Meta(ge=0)]
    name: str


class Refresh(Command, tag="refresh", frozen=True, kw_only=True):
    token: str


class Ping(Command, tag="ping", frozen=True, kw_only=True):
    pass


AnyCommand = (
    Connect
    | Subscribe
    | Unsubscribe
    | Publish
    | Delete
    | Resolve
    | WatchCommand
    | Unwatch
    | History
    | Presence
    | Ack
    | Refresh
    | Ping
)

# -- replies -------------------------------------------------------------------------------------------------------


class Reply(msgspec.Struct, frozen=True, kw_only=True, tag_field="op", omit_defaults=True):
    """Base of every reply; ``id`` echoes the command's. It is absent only in the bodies inside ``connected.subs``."""

    id: int | None = None


class Subscribed(Reply, tag="subscribed", frozen=True, kw_only=True):
    channel: str
    epoch: str
    offset: int
    was_recovering: bool
    recovered: bool


class Error(Reply, tag="error", frozen=True, kw_only=True):
    """``id`` is absent when the message was too broken to have one. ``channel`` only inside ``connected.subs``."""

    code: ErrorCode
    message: str
    temporary: bool
    retry_after: float | None = None
    field: str | None = None
    channel: str | None = None


class Connected(Reply, tag="connected", frozen=True, kw_only=True):
    session: str
    epoch: str
    offset: int
    server: ServerInfo
    ping: float
    expires: int | None = None
    limits: dict[str, int | float]
    subs: list[Subscribed | Error] | None = None


class Unsubscribed(Reply, tag="unsubscribed", frozen=True, kw_only=True):
    channel: str


class Published(Reply, tag="published", frozen=True, kw_only=True):
    geoid: Geoid
    offset: int
    contradictions: list[Contradiction]
    duplicate: bool


class Deleted(Reply, tag="deleted", frozen=True, kw_only=True):
    geoid_id: str
    offset: int


class Resolved(Reply, tag="resolved", frozen=True, kw_only=True):
    scar: Scar
    offset: int


class Watching(Reply, tag="watching", frozen=True, kw_only=True):
    watch: str
    channel: str


class Unwatched(Reply, tag="unwatched", frozen=True, kw_only=True):
    watch: str


class HistoryPage(Reply, tag="history", frozen=True, kw_only=True):
    events: list[msgspec.Raw]
    epoch: str
    offset: int
    more: bool


class PresenceReply(Reply, tag="presence", frozen=True, kw_only=True):
    subscribers: int
    principals: dict[str, int]


class Acked(Reply, tag="acked", frozen=True, kw_only=True):
    pass


class Refreshed(Reply, tag="refreshed", frozen=True, kw_only=True):
    expires: int | None


class Pong(Reply, tag="pong", frozen=True, kw_only=True):
    epoch: str
    offset: int


# -- pushes --------------------------------------------------------------------------------------------------------


class Push(msgspec.Struct, frozen=True, kw_only=True, tag_field="op", omit_defaults=True):
    """Base of what the server sends unasked."""


class Event(Push, tag="event", frozen=True, kw_only=True):
    channel: str
    epoch: str
    offset: int
    type: str
    ts: int
    data: Any


class Heartbeat(Push, tag="heartbeat", frozen=True, kw_only=True):
    epoch: str
    offset: int


class Expiring(Push, tag="expiring", frozen=True, kw_only=True):
    expires: int


class Resync(Push, tag="resync", frozen=True, kw_only=True):
    channel: str
    epoch: str
    offset: int
    dropped: int


AnyServerMessage = (
    Connected
    | Subscribed
    | Unsubscribed
    | Published
    | Deleted
    | Resolved
    | Watching
    | Unwatched
    | HistoryPage
    | PresenceReply
    | Acked
    | Refreshed
    | Pong
    | Error
    | Event
    | Heartbeat
    | Expiring
    | Resync
)

Encoding = Literal["json", "msgpack"]
SUBPROTOCOLS: dict[str, Encoding] = {"kimera.v1.json": "json", "kimera.v1.msgpack": "msgpack"}
TOKEN_SUBPROTOCOL_PREFIX = "kimera.token."  # noqa: S105 - a prefix, not a secret


def parse_since(since: dict[str, Any] | None) -> Position | CursorRef | None:
    """``since`` as a position or a durable cursor.

    Raises:
        msgspec.ValidationError: it is neither.
    """
    if since is None:
        return None
    if "cursor" in since:
        return msgspec.convert(since, CursorRef)
    return msgspec.convert(since, Position)
