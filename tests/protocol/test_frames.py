"""Frames made here are what a WebSocket client reads."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Frame
from websockets.streams import StreamReader

from kimera_stream.protocol import frames


def parse(data: bytes) -> list[tuple[int, bytes, bool, bool]]:
    """What the `websockets` parser makes of the bytes: opcode, payload, fin, rsv1."""
    reader = StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    found = []
    while True:
        at_end = reader.at_eof()
        try:
            next(at_end)
        except StopIteration as stop:
            if stop.value:
                return found
        parser = Frame.parse(reader.read_exact, mask=False, max_size=None, extensions=[])
        try:
            next(parser)
        except StopIteration as stop:
            found.append((stop.value.opcode, bytes(stop.value.data), stop.value.fin, stop.value.rsv1))


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65_535, 65_536, 70_000])
def test_a_client_reads_them(size: int) -> None:
    data = frames.frame(frames.OP_BINARY, b"x" * size) + frames.frame(frames.OP_TEXT, b"end")
    assert parse(data) == [(2, b"x" * size, True, False), (1, b"end", True, False)]
    assert list(frames.split(data)) == [(2, b"x" * size), (1, b"end")]
    assert frames.payload(frames.frame(frames.OP_TEXT, b"y" * size)) == b"y" * size


@given(st.lists(st.tuples(st.sampled_from([1, 2]), st.binary(max_size=300)), max_size=10))
def test_split_undoes_joining(messages: list[tuple[int, bytes]]) -> None:
    assert list(frames.split(b"".join(frames.frame(op, payload) for op, payload in messages))) == messages


def test_split_refuses_what_is_not_whole_frames() -> None:
    whole = frames.frame(frames.OP_TEXT, b"hello")
    for broken in (whole[:-1], whole[:1], b"\x01\x05hello", b"\x81\x85hello"):
        with pytest.raises(ValueError, match="frame"):
            list(frames.split(broken))
