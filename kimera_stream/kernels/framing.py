"""Packed records of the log to joined WebSocket frames: compiled where it was built, in Python where not.

A record is ``CHECKSUM 1F OFFSET 1F TYPE 1F TS 1F CHANNELS 1F DATA``, numbers in decimal, the checksum (CRC-32) of all that follows its own
separator; records are joined by ``1E``. A missing one is ``- 1F OFFSET``. Neither byte occurs in names or JSON.
"""

from dataclasses import dataclass
from zlib import crc32

from kimera_stream.protocol import frames

try:
    from kimera_stream.kernels._egress import frame_records as _compiled
except ImportError:
    COMPILED = False
else:
    COMPILED = True

RECORD = b"\x1e"
FIELD = b"\x1f"


@dataclass(frozen=True, slots=True)
class Framed:
    """``frames``: one text frame per record, joined; ``first`` and ``last``: offsets of the outermost."""

    frames: bytes
    count: int
    first: int
    last: int


class BrokenRecordError(Exception):
    """A record is not what was committed. ``offset`` is 0 where even that cannot be told."""

    def __init__(self, offset: int, *, missing: bool) -> None:
        super().__init__(f"record {offset} is {'missing' if missing else 'damaged'}")
        self.offset = offset
        self.missing = missing


def frame_records(packed: bytes, head: bytes) -> Framed:
    """The frames of at least one record; the payload of each is ``head OFFSET,"type":"TYPE","ts":TS,"data":DATA}``.

    Raises:
        BrokenRecordError: the first that is not whole.
    """
    if not COMPILED:
        return reference_frames(packed, head)
    joined, count, first, last = _compiled(packed, head)
    if joined is None:
        raise BrokenRecordError(last, missing=bool(count))
    return Framed(joined, count, first, last)


def reference_frames(packed: bytes, head: bytes) -> Framed:
    """The definition, and the tests' oracle."""
    made: list[bytes] = []
    first = last = 0
    for record in packed.split(RECORD):
        checksum, separator, body = record.partition(FIELD)
        parts = body.split(FIELD, 4)
        last = int(parts[0]) if _is_number(parts[0]) else 0
        if checksum == b"-" and separator:
            raise BrokenRecordError(last, missing=True)
        if not _is_number(checksum) or int(checksum) != crc32(body) or len(parts) != 5:
            raise BrokenRecordError(last, missing=False)
        offset, type_, ts, _, data = parts
        payload = b'%b%b,"type":"%b","ts":%b,"data":%b}' % (head, offset, type_, ts, data)
        first = last if not made else first
        made.append(frames.frame(frames.OP_TEXT, payload))
    return Framed(b"".join(made), len(made), first, last)


def _is_number(field: bytes) -> bool:
    return field.isdigit() and len(field) <= 20 and int(field) < 1 << 64
