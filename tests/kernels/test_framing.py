"""Records of the log as frames: the compiled ones against their definition, and what is damaged is never framed."""

from zlib import crc32

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kimera_stream.kernels.framing import FIELD, RECORD, BrokenRecordError, Framed, frame_records, reference_frames
from kimera_stream.protocol import frames
from kimera_stream.protocol.codec import EventEncoder
from kimera_stream.protocol.log import LogEntry

HEAD = b'{"op":"event","channel":"geoids","epoch":"e","offset":'


def packed(offset: int, type_: str, ts: int, channels: str, data: bytes) -> bytes:
    body = FIELD.join([str(offset).encode(), type_.encode(), str(ts).encode(), channels.encode(), data])
    return str(crc32(body)).encode() + FIELD + body


def outcome(make: object, raw: bytes, head: bytes = HEAD) -> Framed | tuple[int, bool]:
    try:
        return make(raw, head)  # type: ignore[operator, no-any-return]
    except BrokenRecordError as error:
        return error.offset, error.missing


TYPES = st.sampled_from(["geoid.created", "scar.formed", "t"])
DATA = st.one_of(
    st.dictionaries(st.text(max_size=8), st.one_of(st.text(max_size=200), st.integers(-5, 5)), max_size=5).map(
        msgspec.json.encode
    ),
    st.sampled_from([60, 61, 62, 125, 126, 65_400, 65_535, 70_000]).map(lambda n: b'"' + b"x" * n + b'"'),
)
RECORDS = st.lists(st.builds(packed, st.integers(0, 2**64 - 1), TYPES, st.integers(0, 2**50), st.sampled_from(["", "geoids", "a b"]), DATA), min_size=1, max_size=6)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(RECORDS, st.sampled_from([HEAD, b"", b"h" * 70_000]))
def test_whole_records_are_framed_as_defined(records: list[bytes], head: bytes) -> None:
    raw = RECORD.join(records)
    framed = frame_records(raw, head)
    assert framed == reference_frames(raw, head)
    assert framed.count == len(records) == len(list(frames.split(framed.frames)))


@settings(max_examples=500, deadline=None)
@given(RECORDS, st.data())
def test_a_changed_byte_is_told_as_defined_and_never_framed(records: list[bytes], data: st.DataObject) -> None:
    raw = bytearray(RECORD.join(records))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    found = outcome(frame_records, bytes(raw))
    assert found == outcome(reference_frames, bytes(raw))
    assert not isinstance(found, Framed)


@given(st.binary(max_size=80).map(lambda raw: raw.replace(b"a", FIELD).replace(b"b", RECORD).replace(b"c", b"-")))
@example(b"")
@example(FIELD)
@example(RECORD)
@example(b"-")
@example(b"-" + FIELD)
@example(b"0" + FIELD)
@example(b"-" + FIELD + b"18446744073709551616")
def test_any_bytes_are_told_as_defined(raw: bytes) -> None:
    assert outcome(frame_records, raw) == outcome(reference_frames, raw)


def test_a_missing_record_is_named() -> None:
    raw = RECORD.join([packed(7, "t", 1, "", b"{}"), b"-" + FIELD + b"8"])
    with pytest.raises(BrokenRecordError) as broken:
        frame_records(raw, HEAD)
    assert (broken.value.offset, broken.value.missing) == (8, True)


def test_a_frame_is_that_of_the_live_edge() -> None:
    entry = LogEntry(12, "geoid.created", 34, ("geoids", "geoid:x"), msgspec.Raw('{"text":"Grüße"}'.encode()))
    encoder = EventEncoder("an epoch")
    framed = frame_records(
        packed(entry.offset, entry.type, entry.ts, " ".join(entry.channels), bytes(entry.data)), encoder.head("geoids")
    )
    assert framed.frames == encoder.frame(entry, "geoids", "json")
    assert (framed.first, framed.last) == (12, 12)
