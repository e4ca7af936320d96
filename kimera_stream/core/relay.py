"""Log entries as they travel between nodes. MessagePack, as tuples: the data of an entry is passed on as the bytes it is."""

from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from kimera_stream.protocol.log import LogEntry

MESSAGE_BYTES: Final = 262_144
"""Data in one message, about: a larger commit is told in several."""


class _Told(msgspec.Struct, array_like=True, frozen=True, gc=False):
    offset: int
    type: str
    ts: int
    channels: tuple[str, ...]
    data: bytes


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[_Told]).decode


def pack_entries(entries: Sequence[LogEntry]) -> Iterator[bytes]:
    """Messages that together hold ``entries``, in their order."""
    part: list[_Told] = []
    size = 0
    for entry in entries:
        data = bytes(entry.data)
        if part and size + len(data) > MESSAGE_BYTES:
            yield _encode(part)
            part, size = [], 0
        part.append(_Told(entry.offset, entry.type, entry.ts, entry.channels, data))
        size += len(data)
    if part:
        yield _encode(part)


def unpack_entries(message: bytes) -> list[LogEntry]:
    """The entries of one message.

    Raises:
        msgspec.MsgspecError: it is none.
    """
    return [
        LogEntry(told.offset, told.type, told.ts, told.channels, msgspec.Raw(told.data)) for told in _decode(message)
    ]
