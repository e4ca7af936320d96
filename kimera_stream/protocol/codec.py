"""Messages to bytes and back, per encoding.

Commands are decoded in two steps: straight into the message types where everything is right; where not, a second, lenient
look finds the ``id``, so that the error can be answered to the command it belongs to. Events are encoded once per channel
and encoding: every subscriber gets the same bytes.
"""

import math
from typing import Any, Final

import msgspec

from kimera_stream.protocol import frames
from kimera_stream.protocol.close_codes import CloseCode
from kimera_stream.protocol.errors import (
    BadRequestError,
    Disconnect,
    KimeraError,
    OperationalError,
    TooLargeError,
    UnknownOpError,
)
from kimera_stream.protocol.explaining import bad_request, decode_as, wrong_key
from kimera_stream.protocol.log import LogEntry
from kimera_stream.protocol.messages import (
    AnyCommand,
    Encoding,
    Error,
    Publish,
    Push,
    Reply,
)

OPS: Final = (
    "connect",
    "subscribe",
    "unsubscribe",
    "publish",
    "delete",
    "resolve",
    "watch",
    "unwatch",
    "history",
    "presence",
    "ack",
    "refresh",
    "ping",
)
_MAX_ID: Final = 0xFFFF_FFFF
_INT_MIN: Final = -(1 << 63)
_INT_MAX: Final = (1 << 64) - 1
_MAX_NESTING: Final = 32


class Malformed(KimeraError):  # noqa: N818 - what a command can be, not only an exception
    """A command that cannot be carried out as it stands; ``id`` where it had a usable one."""

    def __init__(self, error: OperationalError, id: int | None = None) -> None:
        super().__init__(error.message)
        self.error = error
        self.id = id


class _Peek(msgspec.Struct):
    """The two fields that an error reply needs; the rest is skipped unread."""

    id: Any = None
    op: Any = None


class Codec:
    """One encoding of the wire: ``json`` in text frames or ``msgpack`` in binary frames.

    Stateless and shared by all connections; build the two once (``CODECS``).
    """

    def __init__(self, encoding: Encoding) -> None:
        self.encoding: Encoding = encoding
        self._decode: Any
        self._peek: Any
        self._encode: Any
        if encoding == "json":
            self.opcode = frames.OP_TEXT
            self._decode = msgspec.json.Decoder(AnyCommand).decode
            self._peek = msgspec.json.Decoder(_Peek).decode
            self._encode = msgspec.json.Encoder().encode
        else:
            self.opcode = frames.OP_BINARY
            self._decode = msgspec.msgpack.Decoder(AnyCommand).decode
            self._peek = msgspec.msgpack.Decoder(_Peek).decode
            self._encode = msgspec.msgpack.Encoder().encode

    def decode(self, data: str | bytes, *, max_bytes: int = 65_536) -> AnyCommand:
        """One command from the payload of one message.

        Args:
            data: ``str`` from a text frame, ``bytes`` from a binary one.
            max_bytes: A longer message is refused unread.

        Raises:
            Malformed: with the error to answer; the connection stays open.
            Disconnect: the frame type does not belong to this encoding (1003).
        """
        self._check_type(data)
        # A character is at most four bytes, so most messages need no counting.
        size = len(data)
        if isinstance(data, str) and size <= max_bytes < size * 4:
            size = len(data.encode())
        if size > max_bytes:
            raise Malformed(TooLargeError(f"message: a command has at most {max_bytes} bytes"), self.id_of(data))
        try:
            command: AnyCommand = self._decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise self._explain(data, exc) from exc
        if isinstance(command, Publish):
            problem = _storable(command.geoid.metadata, "geoid.metadata") or _storable(
                command.geoid.symbolic_state, "geoid.symbolic_state"
            )
            if problem:
                raise Malformed(problem, command.id)
        return command

    def encode(self, message: Reply | Push) -> bytes:
        """The payload of one reply or push."""
        data: bytes = self._encode(message)
        return data

    def frame(self, message: Reply | Push) -> bytes:
        """The whole frame of one reply or push."""
        return frames.frame(self.opcode, self._encode(message))

    def id_of(self, data: str | bytes) -> int | None:
        """The id of a command that is not going to be decoded, where it has a usable one."""
        self._check_type(data)
        try:
            return _usable_id(self._peek(data).id)
        except msgspec.ValidationError:
            return _usable_id(self._loose(data).get("id"))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None

    def _loose(self, data: str | bytes) -> dict[Any, Any]:
        """The message where it is an object whose keys are not all strings, as MessagePack can have; else an empty one."""
        try:
            return decode_as(dict[Any, Any], data, self.encoding)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return {}

    def _check_type(self, data: str | bytes) -> None:
        if isinstance(data, str) is not (self.encoding == "json"):
            raise Disconnect(CloseCode.UNSUPPORTED_DATA)

    def _explain(self, data: str | bytes, exc: Exception) -> Malformed:
        what = "JSON" if self.encoding == "json" else "MessagePack"
        if isinstance(exc, RecursionError):
            return Malformed(BadRequestError("message: nested too deeply"))
        if isinstance(exc, UnicodeDecodeError):
            return Malformed(BadRequestError("message: strings must be valid UTF-8"))
        try:
            peek = self._peek(data)
        except msgspec.ValidationError as wrong:
            given = wrong_key(wrong)
            words = "an object with `op` and `id`" if given is None else f"its keys to be strings, got `{given}`"
            return Malformed(BadRequestError(f"message: expected {words}"), _usable_id(self._loose(data).get("id")))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as broken:
            return Malformed(BadRequestError(f"message: not valid {what} ({broken})"))
        id = _usable_id(peek.id)
        if not isinstance(peek.op, str):
            return Malformed(BadRequestError("op: expected the name of a command", field="op"), id)
        if peek.op not in OPS:
            shown = peek.op if len(peek.op) <= 40 else peek.op[:40] + "..."
            return Malformed(UnknownOpError(f"op: unknown {shown!r}; expected one of {', '.join(OPS)}", field="op"), id)
        if id is None:
            return Malformed(BadRequestError(f"id: expected an integer from 1 to {_MAX_ID}", field="id"))
        return Malformed(bad_request(exc, data, self.encoding), id)


def error_reply(error: OperationalError, id: int | None = None, *, channel: str | None = None) -> Error:
    """The reply that tells of an error."""
    return Error(
        id=id,
        code=error.code,
        message=error.message,
        temporary=error.temporary,
        retry_after=error.retry_after,
        field=error.field,
        channel=channel,
    )


def _usable_id(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MAX_ID else None


def _storable(value: Any, path: str, depth: int = 0) -> BadRequestError | None:
    """Why a free-form value cannot become JSON, or None. MessagePack can say more than JSON can; integers can be too long."""
    if value is None or isinstance(value, str | bool):
        return None
    if isinstance(value, int):
        if _INT_MIN <= value <= _INT_MAX:
            return None
        return BadRequestError(f"{path}: expected an integer of at most 64 bits", field=path)
    if isinstance(value, float):
        return None if math.isfinite(value) else BadRequestError(f"{path}: expected a finite number", field=path)
    if depth >= _MAX_NESTING:
        return BadRequestError(f"{path}: nested more than {_MAX_NESTING} levels deep", field=path)
    if isinstance(value, list):
        for i, item in enumerate(value):
            if problem := _storable(item, f"{path}[{i}]", depth + 1):
                return problem
        return None
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                return BadRequestError(f"{path}: expected keys to be strings", field=path)
            if problem := _storable(item, f"{path}.{key}", depth + 1):
                return problem
        return None
    return BadRequestError(f"{path}: expected a JSON value, got {type(value).__name__}", field=path)


CODECS: Final[dict[Encoding, Codec]] = {"json": Codec("json"), "msgpack": Codec("msgpack")}


class EventEncoder:
    """Events of one log as bytes. ``epoch`` is part of every event, so each log has its own encoder."""

    def __init__(self, epoch: str) -> None:
        self.epoch = epoch
        self._epoch_json = msgspec.json.encode(epoch)

    def payload(self, entry: LogEntry, channel: str, encoding: Encoding) -> bytes:
        """The event object of ``entry`` on ``channel``."""
        return self.value_payload(
            channel, encoding, offset=entry.offset, type=entry.type, ts=entry.ts, data=bytes(entry.data)
        )

    def head(self, channel: str) -> bytes:
        """What every event on ``channel`` starts with in JSON: all before its offset."""
        return b'{"op":"event","channel":%b,"epoch":%b,"offset":' % (msgspec.json.encode(channel), self._epoch_json)

    def value_payload(self, channel: str, encoding: Encoding, *, offset: int, type: str, ts: int, data: bytes) -> bytes:
        """The event object of a value; ``data`` is JSON."""
        if encoding == "json":
            return b'%b%d,"type":"%b","ts":%d,"data":%b}' % (
                self.head(channel),
                offset,
                type.encode(),
                ts,
                data,
            )
        return msgspec.msgpack.encode(
            {
                "op": "event",
                "channel": channel,
                "epoch": self.epoch,
                "offset": offset,
                "type": type,
                "ts": ts,
                "data": msgspec.json.decode(data),
            }
        )

    def frame(self, entry: LogEntry, channel: str, encoding: Encoding) -> bytes:
        """The whole frame of ``entry`` on ``channel``."""
        return frames.frame(CODECS[encoding].opcode, self.payload(entry, channel, encoding))

    def view(self, channel: str, *, offset: int, type: str, ts: int, data: Any) -> dict[str, Any]:
        """The event object as a filter sees it; ``data`` as builtins."""
        return {
            "op": "event",
            "channel": channel,
            "epoch": self.epoch,
            "offset": offset,
            "type": type,
            "ts": ts,
            "data": data,
        }
