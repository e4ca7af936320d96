"""Server-side WebSocket frames (RFC 6455): unmasked, never fragmented, built once for every receiver."""

import struct
from collections.abc import Iterator
from typing import Final

OP_TEXT: Final = 0x1
OP_BINARY: Final = 0x2

_FIN: Final = 0x80
_RSV1: Final = 0x40
_SHORT: Final = 126
_LONG: Final = 127


def header(opcode: int, length: int, *, rsv1: bool = False) -> bytes:
    """The header of a final, unmasked frame with a payload of ``length`` bytes. ``rsv1`` marks a compressed payload."""
    first = _FIN | opcode | (_RSV1 if rsv1 else 0)
    if length < _SHORT:
        return struct.pack("!BB", first, length)
    if length < 1 << 16:
        return struct.pack("!BBH", first, _SHORT, length)
    return struct.pack("!BBQ", first, _LONG, length)


def frame(opcode: int, payload: bytes, *, rsv1: bool = False) -> bytes:
    """A whole frame."""
    return header(opcode, len(payload), rsv1=rsv1) + payload


def header_size(first_two: bytes | memoryview) -> int:
    """Bytes of the header that starts with these two bytes of an unmasked frame."""
    size = first_two[1]
    return 2 if size < _SHORT else 4 if size == _SHORT else 10


def payload(one_frame: bytes) -> bytes:
    """The payload of a single frame made here."""
    return one_frame[header_size(one_frame) :]


def split(frames: bytes) -> Iterator[tuple[int, bytes]]:
    """Opcode and payload of each of the joined frames.

    Raises:
        ValueError: the bytes are not whole frames of the kind made here.
    """
    at, end = 0, len(frames)
    while at < end:
        if end - at < 2 or not frames[at] & _FIN or frames[at + 1] & 0x80:
            raise ValueError("not a sequence of whole, unmasked frames")
        size = frames[at + 1]
        start = at + 2
        if size == _SHORT:
            size = int.from_bytes(frames[at + 2 : at + 4], "big")
            start = at + 4
        elif size == _LONG:
            size = int.from_bytes(frames[at + 2 : at + 10], "big")
            start = at + 10
        if start + size > end:
            raise ValueError("the last frame is cut short")
        yield frames[at] & 0x0F, frames[start : start + size]
        at = start + size
