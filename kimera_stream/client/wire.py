"""Encoding of commands and decoding of server messages, for both subprotocols."""

from typing import Any
from urllib.parse import urlsplit, urlunsplit

import msgspec

from kimera_stream.protocol.errors import BadRequestError
from kimera_stream.protocol.messages import SUBPROTOCOLS, AnyServerMessage, Command, Encoding, Event

_KNOWN_OPS = frozenset(
    {
        "connected",
        "subscribed",
        "unsubscribed",
        "published",
        "deleted",
        "resolved",
        "watching",
        "unwatched",
        "history",
        "presence",
        "acked",
        "refreshed",
        "pong",
        "error",
        "event",
        "heartbeat",
        "expiring",
        "resync",
    }
)


class Codec:
    """One encoding of the wire. ``subprotocol`` is what the handshake offers for it."""

    def __init__(self, encoding: Encoding) -> None:
        self.encoding = encoding
        self.subprotocol = next(name for name, value in SUBPROTOCOLS.items() if value == encoding)
        self._json = encoding == "json"
        self._decoder: Any
        self._events: Any
        if self._json:
            self._decoder = msgspec.json.Decoder(AnyServerMessage)
            self._events = msgspec.json.Decoder(Event)
        else:
            self._decoder = msgspec.msgpack.Decoder(AnyServerMessage)
            self._events = msgspec.msgpack.Decoder(Event)

    def encode(self, command: Command) -> str | bytes:
        """One frame: text for JSON, binary for MessagePack."""
        if self._json:
            return msgspec.json.encode(command).decode()
        return msgspec.msgpack.encode(command)

    def decode(self, frame: str | bytes) -> AnyServerMessage | None:
        """The message of one frame; None for an ``op`` that this version does not know (the contract is additive).

        Raises:
            msgspec.DecodeError: the frame is not a message at all.
        """
        try:
            message: AnyServerMessage = self._decoder.decode(frame)
        except msgspec.ValidationError:
            loose = (msgspec.json if self._json else msgspec.msgpack).decode(frame)
            if isinstance(loose, dict) and isinstance(loose.get("op"), str) and loose["op"] not in _KNOWN_OPS:
                return None
            raise
        return message

    def event(self, raw: msgspec.Raw) -> Event:
        """An event inside a ``history`` reply."""
        event: Event = self._events.decode(raw)
        return event


def http_base(url: str) -> str:
    """``url`` as the server's HTTP base, without a path or a trailing slash; ws and wss URLs are accepted.

    Raises:
        BadRequestError: it is not an absolute http, https, ws or wss URL.
    """
    parts = urlsplit(url if "://" in url else f"http://{url}")
    scheme = {"ws": "http", "wss": "https"}.get(parts.scheme, parts.scheme)
    if scheme not in ("http", "https") or not parts.hostname:
        raise BadRequestError(f"url: expected http(s)://HOST:PORT or ws(s)://HOST:PORT, got {url!r}", field="url")
    path = parts.path.removesuffix("/v1/stream").rstrip("/")
    return urlunsplit((scheme, parts.netloc, path, "", ""))


def stream_url(url: str) -> str:
    """The WebSocket URL of the server at ``url``."""
    return "ws" + http_base(url).removeprefix("http") + "/v1/stream"
