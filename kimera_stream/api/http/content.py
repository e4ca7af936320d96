"""Bodies in and out: size limits, content types, strict decoding and the encoding of answers."""

import re
from typing import Any, Final, TypeVar

import anyio
import msgspec
from starlette.requests import Request
from starlette.responses import Response

from kimera_stream.api.problems import RequestTimeoutError, UnsupportedMediaTypeError
from kimera_stream.protocol.errors import BadRequestError, KimeraError, TooLargeError
from kimera_stream.protocol.explaining import bad_request, decode_as
from kimera_stream.protocol.messages import Encoding

T = TypeVar("T")

JSON: Final = "application/json"
MSGPACK: Final = "application/msgpack"
NDJSON: Final = "application/x-ndjson"
EVENT_STREAM: Final = "text/event-stream"

_JSON_TYPES: Final = frozenset({JSON, "text/json"})
_MSGPACK_TYPES: Final = frozenset({MSGPACK, "application/x-msgpack", "application/vnd.msgpack"})
NDJSON_TYPES: Final = frozenset({NDJSON, "application/ndjson", "application/jsonl", "application/x-jsonlines"})
_QUALITY: Final = re.compile(r"q=(?P<q>[01](?:\.\d{0,3})?)")


class ClientGone(KimeraError):  # noqa: N818 - an outcome, not a fault
    """The client went away before its request was whole. Nobody is left to answer."""


def media_type(request: Request) -> str:
    """The request's content type without parameters, in lower case; empty where there is none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def request_encoding(request: Request) -> Encoding:
    """The encoding of a request's body.

    Raises:
        UnsupportedMediaTypeError: it is neither JSON nor MessagePack, or compressed.
    """
    _check_charset_and_coding(request)
    kind = media_type(request)
    if kind in _JSON_TYPES or (kind.startswith("application/") and kind.endswith("+json")):
        return "json"
    if kind in _MSGPACK_TYPES:
        return "msgpack"
    got = f"got {kind[:80]}" if kind else "got none"
    raise UnsupportedMediaTypeError(f"content-type: expected {JSON} or {MSGPACK}, {got}", field="content-type")


def _check_charset_and_coding(request: Request) -> None:
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        raise UnsupportedMediaTypeError(
            f"content-encoding: expected an uncompressed body, got {coding[:40]}", field="content-encoding"
        )
    charset = re.search(r"charset\s*=\s*\"?([\w.-]+)", request.headers.get("content-type", ""), re.IGNORECASE)
    if charset and charset[1].lower() not in ("utf-8", "utf8"):
        raise UnsupportedMediaTypeError(
            f"content-type: expected the charset utf-8, got {charset[1][:40]}", field="content-type"
        )


def is_ndjson(request: Request) -> bool:
    """Whether the request's body is a stream of lines; refuses a compressed one."""
    if media_type(request) not in NDJSON_TYPES:
        return False
    _check_charset_and_coding(request)
    return True


def answer_encoding(request: Request) -> Encoding:
    """The encoding that the client prefers for the answer: JSON unless MessagePack is asked for by name."""
    json_quality, msgpack_quality = 0.0, 0.0
    for part in request.headers.get("accept", "").split(","):
        kind, _, parameters = part.partition(";")
        kind = kind.strip().lower()
        match = _QUALITY.search(parameters)
        quality = float(match["q"]) if match else 1.0
        if kind in _MSGPACK_TYPES:
            msgpack_quality = max(msgpack_quality, quality)
        elif kind in _JSON_TYPES:
            json_quality = max(json_quality, quality)
    return "msgpack" if msgpack_quality > json_quality else "json"


async def read_body(request: Request, limit: int, *, patience: float = 30.0) -> bytes:
    """The whole body. ``patience``: seconds to wait for each next part of it.

    Raises:
        RequestTimeoutError: the client stopped sending.
        TooLargeError: it is longer than ``limit`` bytes; told by its declared length where there is one.
        ClientGone: the client went away.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise _too_large(limit)
    chunks: list[bytes] = []
    size = 0
    more = True
    while more:
        with anyio.move_on_after(patience) as waiting:
            message = await request.receive()
        if waiting.cancelled_caught:
            raise RequestTimeoutError(f"body: nothing came for {patience:g} s; expected the rest of it", field="body")
        if message["type"] != "http.request":
            raise ClientGone
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        chunks.append(chunk)
        more = message.get("more_body", False)
    return b"".join(chunks)


def _too_large(limit: int) -> TooLargeError:
    return TooLargeError(f"body: expected at most {limit} bytes; send more as {NDJSON}", field="body")


def decode(data: bytes, kind: type[T], encoding: Encoding, *, where: str = "") -> T:
    """``data`` as ``kind``, strictly.

    Args:
        where: Path of the value in the request, put before the field in messages.

    Raises:
        BadRequestError: names the field and what was expected.
    """
    try:
        return decode_as(kind, data, encoding)
    except msgspec.ValidationError as error:
        told = bad_request(error, data, encoding)
        if not where and told.field is not None:
            raise told from error
        message = told.message.removeprefix("message: ") if told.field is None else told.message
        joined = where if told.field is None else f"{where}.{told.field}"
        glue = ": " if told.field is None else "."
        raise BadRequestError(f"{where or 'body'}{glue}{message}", field=joined or None) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise malformed(error, encoding, where or "body") from error


def malformed(error: Exception, encoding: Encoding, where: str) -> BadRequestError:
    """The error for bytes that are not a value at all."""
    if isinstance(error, RecursionError):
        return BadRequestError(f"{where}: nested too deeply")
    if isinstance(error, UnicodeDecodeError):
        return BadRequestError(f"{where}: expected valid UTF-8, got an invalid byte")
    name = "JSON" if encoding == "json" else "MessagePack"
    words = str(error).rpartition(" is malformed: ")[2]  # it is said already; what follows says more
    return BadRequestError(f"{where}: expected valid {name}: {words[:1].lower()}{words[1:]}")


def encode(value: Any, encoding: Encoding) -> bytes:
    """``value`` in an encoding."""
    return msgspec.json.encode(value) if encoding == "json" else msgspec.msgpack.encode(value)


def answer(request: Request, value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response with ``value`` in the encoding the client prefers."""
    encoding = answer_encoding(request)
    return Response(
        encode(value, encoding),
        status_code=status,
        headers={"cache-control": "no-store", "vary": "Accept", **(headers or {})},
        media_type=JSON if encoding == "json" else MSGPACK,
    )
