"""The AsyncAPI 3.0 document of the WebSocket and of the Server-Sent Events, out of the message types."""

import inspect
from typing import Any, Final

import msgspec

from kimera_stream.api.http.sse import SubscribedEvent
from kimera_stream.protocol import messages
from kimera_stream.protocol.close_codes import CloseCode
from kimera_stream.protocol.errors import ERRORS_BY_CODE
from kimera_stream.protocol.log import LATEST_CHANNELS
from kimera_stream.protocol.messages import SUBPROTOCOLS, Command, Push, Reply
from kimera_stream.protocol.objects import Contradiction, FieldState, Geoid, Scar, VaultRebalance, WatchMatch

REF: Final = "#/components/schemas/{name}"
STREAM: Final = "stream"
EVENTS: Final = "events"

REPLIES: Final[dict[type[Command], type[Reply]]] = {
    messages.Connect: messages.Connected,
    messages.Subscribe: messages.Subscribed,
    messages.Unsubscribe: messages.Unsubscribed,
    messages.Publish: messages.Published,
    messages.Delete: messages.Deleted,
    messages.Resolve: messages.Resolved,
    messages.WatchCommand: messages.Watching,
    messages.Unwatch: messages.Unwatched,
    messages.History: messages.HistoryPage,
    messages.Presence: messages.PresenceReply,
    messages.Ack: messages.Acked,
    messages.Refresh: messages.Refreshed,
    messages.Ping: messages.Pong,
}
PUSHES: Final[tuple[type[Push], ...]] = (messages.Heartbeat, messages.Expiring, messages.Resync)
EVENT_DATA: Final[dict[str, Any]] = {
    "geoid.created": Geoid,
    "geoid.updated": Geoid,
    "geoid.deleted": Geoid,
    "contradiction.found": Contradiction,
    "contradiction.resolved": Contradiction,
    "contradiction.dissolved": Contradiction,
    "scar.formed": Scar,
    "scar.crystallized": Scar,
    "vault.rebalanced": VaultRebalance,
    "watch.matched": WatchMatch,
    "field.updated": FieldState,
    "stats.updated": dict[str, Any],
}
"""What ``data`` of each event type is."""
RESERVED: Final = frozenset({"scar.crystallized", "vault.rebalanced"})
"""Event types that clients have to know and this version never sends: a scar goes to the lighter vault when it is formed."""

_CHANNELS: Final = (
    "Channels to subscribe to: `geoids`, `contradictions`, `scars` (log); `field`, `stats` (newest value); `geoid:<id>`, "
    "`session:<id>`, `agent:<id>`, `watch:<id>` (log)."
)


def asyncapi_document(*, version: str, host: str, secure: bool) -> dict[str, Any]:
    """The whole document, as builtins.

    Args:
        version: Version of the server.
        host: ``host:port`` that clients call.
        secure: Whether they call it over TLS.
    """
    structs: list[Any] = [*REPLIES, *REPLIES.values(), messages.Error, *PUSHES, SubscribedEvent]
    _, schemas = msgspec.json.schema_components([*structs, *EVENT_DATA.values()], ref_template=REF)
    named = {_op(kind): _message(kind) for kind in structs if kind is not SubscribedEvent}
    named["streamSubscribed"] = {
        "name": "subscribed",
        "title": "subscribed (SSE)",
        "summary": "The first event of a stream of Server-Sent Events.",
        "payload": {"$ref": REF.format(name="SubscribedEvent")},
    }
    for type_name, data in EVENT_DATA.items():
        named[type_name] = _event_message(type_name, data)
    pushes = list(map(_op, PUSHES))
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Kimera Stream",
            "version": version,
            "description": (
                "One message per WebSocket frame; every message is an object with `op`. A command carries an `id`, which "
                "its one reply echoes. The first command is `connect`. " + _CHANNELS
            ),
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {
            "websocket": {"host": host, "protocol": "wss" if secure else "ws", "security": [_BEARER_REF]},
            "http": {"host": host, "protocol": "https" if secure else "http", "security": [_BEARER_REF]},
        },
        "channels": {
            STREAM: {
                "address": "/v1/stream",
                "title": "The WebSocket",
                "description": f"Subprotocols: {', '.join(f'`{name}` ({kind})' for name, kind in SUBPROTOCOLS.items())}. {_CHANNELS}",
                "servers": [{"$ref": "#/servers/websocket"}],
                "messages": {name: _message_ref(name) for name in named if name != "streamSubscribed"},
                "bindings": {"ws": {"method": "GET"}},
                "x-close-codes": {
                    str(int(code)): {"reason": code.reason, "reconnect": code.reconnect} for code in CloseCode
                },
                "x-error-codes": {code: {"temporary": kind.temporary} for code, kind in ERRORS_BY_CODE.items()},
            },
            EVENTS: {
                "address": "/v1/events",
                "title": "Server-Sent Events",
                "description": "`id:` is `epoch:offset`, `event:` the type, `data:` the event object. `Last-Event-ID` resumes.",
                "servers": [{"$ref": "#/servers/http"}],
                "messages": {name: _message_ref(name) for name in ("streamSubscribed", *EVENT_DATA)},
                "bindings": {"http": {}},
            },
        },
        "operations": {
            **{_op(kind): _command(kind, reply) for kind, reply in REPLIES.items()},
            "push": {
                "action": "send",
                "channel": {"$ref": f"#/channels/{STREAM}"},
                "summary": "What the server sends unasked: events of subscribed channels, heartbeats and notices.",
                "messages": [_channel_message(STREAM, name) for name in (*EVENT_DATA, *pushes)],
            },
            "streamEvents": {
                "action": "send",
                "channel": {"$ref": f"#/channels/{EVENTS}"},
                "summary": "Events of one channel.",
                "messages": [_channel_message(EVENTS, name) for name in ("streamSubscribed", *EVENT_DATA)],
            },
        },
        "components": {
            "messages": named,
            "schemas": {name: _draft_07(schema) for name, schema in sorted(schemas.items())},
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "A JWT or an API key: in `connect`, in the `Authorization` header, or as the subprotocol `kimera.token.<token>`.",
                }
            },
        },
    }


_BEARER_REF: Final = {"$ref": "#/components/securitySchemes/bearer"}


def _op(kind: type[msgspec.Struct]) -> str:
    return str(kind.__struct_config__.tag)


def _message_ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/messages/{name}"}


def _channel_message(channel: str, name: str) -> dict[str, str]:
    return {"$ref": f"#/channels/{channel}/messages/{name}"}


def _message(kind: type[msgspec.Struct]) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "name": _op(kind),
        "title": _op(kind),
        "payload": {"$ref": REF.format(name=kind.__name__)},
    }
    doc = kind.__dict__.get("__doc__")
    if doc:
        shown["summary"] = inspect.cleandoc(doc).partition("\n\n")[0]
    return shown


def _event_message(type_name: str, data: Any) -> dict[str, Any]:
    (data_schema,), _ = msgspec.json.schema_components([data], ref_template=REF)
    kind = "latest" if type_name.partition(".")[0] in LATEST_CHANNELS else "log"
    return {
        "name": type_name,
        "title": type_name,
        "summary": f"An event of a {kind} channel."
        + (" Reserved: this version sends none." if type_name in RESERVED else ""),
        "payload": {
            "type": "object",
            "properties": {
                "op": {"const": "event"},
                "channel": {"type": "string"},
                "epoch": {"type": "string"},
                "offset": {"type": "integer", "minimum": 0},
                "type": {"const": type_name},
                "ts": {"type": "integer", "description": "Unix milliseconds."},
                "data": data_schema,
            },
            "required": ["op", "channel", "epoch", "offset", "type", "ts", "data"],
        },
    }


def _command(kind: type[Command], reply: type[Reply]) -> dict[str, Any]:
    return {
        "action": "receive",
        "channel": {"$ref": f"#/channels/{STREAM}"},
        "title": _op(kind),
        "messages": [_channel_message(STREAM, _op(kind))],
        "reply": {
            "channel": {"$ref": f"#/channels/{STREAM}"},
            "messages": [_channel_message(STREAM, _op(reply)), _channel_message(STREAM, _op(messages.Error))],
        },
    }


def _draft_07(schema: Any) -> Any:
    """AsyncAPI's schemas are of JSON Schema draft 07, which writes tuples as ``items``; its discriminator is a bare name."""
    if isinstance(schema, list):
        return [_draft_07(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    shown = {name: _draft_07(item) for name, item in schema.items()}
    if "prefixItems" in shown:
        shown["items"] = shown.pop("prefixItems")
        shown["additionalItems"] = False
    if isinstance(shown.get("discriminator"), dict):
        shown["discriminator"] = shown["discriminator"]["propertyName"]
    return shown
