"""Commands in, replies out, in both encodings."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimera_stream.protocol import frames
from kimera_stream.protocol.close_codes import CloseCode
from kimera_stream.protocol.codec import CODECS, EventEncoder, Malformed, error_reply
from kimera_stream.protocol.errors import Disconnect, RateLimitedError
from kimera_stream.protocol.log import LogEntry
from kimera_stream.protocol.messages import Connect, Error, Event, Pong, Publish, Subscribe

ENCODINGS = ["json", "msgpack"]


def encode(encoding: str, message: Any) -> str | bytes:
    return msgspec.json.encode(message).decode() if encoding == "json" else msgspec.msgpack.encode(message)


def refused(encoding: str, data: Any, **options: Any) -> Error:
    """The error reply that the message gets."""
    with pytest.raises(Malformed) as caught:
        CODECS[encoding].decode(data if isinstance(data, str | bytes) else encode(encoding, data), **options)
    return error_reply(caught.value.error, caught.value.id)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_commands_decode(encoding: str) -> None:
    codec = CODECS[encoding]
    assert codec.decode(encode(encoding, {"op": "connect", "id": 1, "token": "t"})) == Connect(id=1, token="t")
    command = codec.decode(
        encode(encoding, {"op": "publish", "id": 4_294_967_295, "geoid": {"text": "x", "metadata": {"a": [1, None]}}})
    )
    assert isinstance(command, Publish)
    assert command.geoid.metadata == {"a": [1, None]}
    since = codec.decode(
        encode(encoding, {"op": "subscribe", "id": 2, "channel": "geoids", "since": {"epoch": "e", "offset": 1}})
    )
    assert isinstance(since, Subscribe)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    ("message", "code", "id", "field"),
    [
        ({"op": "nonsense", "id": 9}, "unknown_op", 9, "op"),
        ({"op": "nonsense"}, "unknown_op", None, "op"),
        ({"op": 7, "id": 9}, "bad_request", 9, "op"),
        ({"id": 9}, "bad_request", 9, "op"),
        ({"op": "ping"}, "bad_request", None, "id"),
        ({"op": "ping", "id": 0}, "bad_request", None, "id"),
        ({"op": "ping", "id": 4_294_967_296}, "bad_request", None, "id"),
        ({"op": "ping", "id": True}, "bad_request", None, "id"),
        ({"op": "ping", "id": "1"}, "bad_request", None, "id"),
        ({"op": "ping", "id": 3, "extra": 1}, "bad_request", 3, "extra"),
        ({"op": "subscribe", "id": 3}, "bad_request", 3, "channel"),
        ({"op": "publish", "id": 3, "geoid": {"text": 5}}, "bad_request", 3, "geoid.text"),
        ({"op": "publish", "id": 3, "geoid": {"text": "a", "colour": "b"}}, "bad_request", 3, "geoid.colour"),
        ({"op": "publish", "id": 3, "geoid": {"vector": [1, "2"]}}, "bad_request", 3, "geoid.vector[1]"),
        ({"op": "publish", "id": 3, "geoid": {"text": "a"}, "priority": 10}, "bad_request", 3, "priority"),
        ({"op": "publish", "id": 3, "geoid": {"text": "a"}, "key": ""}, "bad_request", 3, "key"),
        ({"op": "resolve", "id": 3, "contradiction_id": "c", "decision": "shrug"}, "bad_request", 3, "decision"),
        ({"op": "history", "id": 3, "channel": "geoids", "limit": 0}, "bad_request", 3, "limit"),
        ([1, 2], "bad_request", None, None),
        ("text", "bad_request", None, None),
        (None, "bad_request", None, None),
    ],
)
def test_a_wrong_command_is_answered_by_id_and_field(
    encoding: str, message: Any, code: str, id: int | None, field: str | None
) -> None:
    reply = refused(encoding, encode(encoding, message))
    assert (reply.code, reply.id, reply.field) == (code, id, field)
    assert not reply.temporary
    if field:
        assert reply.message.startswith(field)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    ("message", "told"),
    [
        (
            {"op": "resolve", "id": 3, "contradiction_id": "c", "decision": "shrug"},
            "decision: expected one of collapse, surge, buffer, got 'shrug'",
        ),
        (
            {"op": "watch", "id": 3, "watch": "w", "text": "a", "kinds": ["related", "x" * 50]},
            f"kinds[1]: expected one of contradicts, related, got '{'x' * 40}'",
        ),
    ],
)
def test_the_error_of_a_fixed_choice_names_what_there_is(encoding: str, message: Any, told: str) -> None:
    assert refused(encoding, encode(encoding, message)).message == told


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    ("geoid", "field"),
    [
        ({"semantic_state": {"calm": 1, "heavy": "very", "loud": None}}, "geoid.semantic_state.heavy"),
        ({"symbolic_state": {"up": True, "a.b[0]": [1]}}, "geoid.symbolic_state.a.b[0]"),
        ({"symbolic_state": {"x" * 300: {}}}, f"geoid.symbolic_state.{'x' * 256}..."),
    ],
)
def test_the_offending_key_of_a_state_is_named(encoding: str, geoid: Any, field: str) -> None:
    reply = refused(encoding, {"op": "publish", "id": 3, "geoid": geoid})
    assert (reply.code, reply.id, reply.field) == ("bad_request", 3, field)
    assert reply.message.startswith(f"{field}: expected ")


@pytest.mark.parametrize(
    ("geoid", "field"),
    [
        ('{"semantic_state":{"a":1,"b":1e999}}', "geoid.semantic_state.b"),
        ('{"metadata":{"a":{"b":[1,{"c":1e999}]}}}', "geoid.metadata.a.b[1].c"),
        ('{"semantic_state":{"a":"x","a":1}}', "geoid.semantic_state[...]"),
    ],
)
def test_the_offending_key_is_named_where_json_has_it_once(geoid: str, field: str) -> None:
    reply = refused("json", '{"op":"publish","id":3,"geoid":' + geoid + "}")
    assert (reply.code, reply.id, reply.field) == ("bad_request", 3, field)


@pytest.mark.parametrize(
    ("message", "id", "told"),
    [
        ({"op": "ping", "id": 3, 1: 2}, 3, "message: expected its keys to be strings, got `int`"),
        ({1: "ping", 2: 3}, None, "message: expected its keys to be strings, got `int`"),
        ({"op": "ping", "id": 3, None: 2}, 3, "message: expected its keys to be strings, got `null`"),
        (
            {"op": "publish", "id": 3, "geoid": {"symbolic_state": {None: 2}}},
            3,
            "geoid.symbolic_state: expected keys to be strings, got `null`",
        ),
        ({"op": "publish", "id": 3, "geoid": {"vector": [None]}}, 3, "geoid.vector[0]: expected `float`, got `null`"),
        ({"op": "publish", "id": 3, "geoid": {1: 2}}, 3, "geoid: expected keys to be strings, got `int`"),
        (
            {"op": "publish", "id": 3, "geoid": {"semantic_state": {b"a": 2.0}}},
            3,
            "geoid.semantic_state: expected keys to be strings, got `bytes`",
        ),
        (
            {"op": "subscribe", "id": 3, "channel": "geoids", "filter": {1: 2}},
            3,
            "filter: expected keys to be strings, got `int`",
        ),
    ],
)
def test_keys_of_msgpack_that_are_no_strings(message: Any, id: int | None, told: str) -> None:
    reply = refused("msgpack", message)
    assert (reply.code, reply.id, reply.message) == ("bad_request", id, told)


def test_an_oversized_command_with_a_key_that_is_no_string_is_answered_by_id() -> None:
    assert refused("msgpack", {"op": "ping", "id": 12, 1: "x" * 300}, max_bytes=200).id == 12


@pytest.mark.parametrize(
    "broken",
    ["", "{", '{"op":"ping","id":1', "nul", '{"op":"publish","id":1,"geoid":{"vector":[NaN]}}', "[" * 60_000, "{}}"],
)
def test_broken_json_has_no_id(broken: str) -> None:
    reply = refused("json", broken)
    assert (reply.code, reply.id) == ("bad_request", None)


@pytest.mark.parametrize("broken", [b"", b"\xc1", b"\x82\xa2op", b"\x81\xa2op\xa2\xff\xff", b"\x91" * 60_000])
def test_broken_msgpack_has_no_id(broken: bytes) -> None:
    reply = refused("msgpack", broken)
    assert (reply.code, reply.id) == ("bad_request", None)


@pytest.mark.parametrize(
    ("metadata", "field"),
    [
        ({"a": float("nan")}, "geoid.metadata.a"),
        ({"a": [1.0, float("inf")]}, "geoid.metadata.a[1]"),
        ({"a": b"bytes"}, "geoid.metadata.a"),
        ({"a": {1: 2}}, "geoid.metadata.a"),
        ({"a": msgspec.msgpack.Ext(5, b"x")}, "geoid.metadata.a"),
    ],
)
def test_msgpack_cannot_smuggle_in_what_json_cannot_say(metadata: Any, field: str) -> None:
    reply = refused("msgpack", {"op": "publish", "id": 3, "geoid": {"text": "a", "metadata": metadata}})
    assert (reply.code, reply.id, reply.field) == ("bad_request", 3, field)


def test_integers_beyond_64_bits_are_refused() -> None:
    reply = refused("json", '{"op":"publish","id":3,"geoid":{"text":"a","metadata":{"n":' + "9" * 30 + "}}}")
    assert (reply.id, reply.field) == (3, "geoid.metadata.n")


def test_deep_metadata_is_refused() -> None:
    reply = refused("json", '{"op":"publish","id":3,"geoid":{"text":"a","metadata":{"n":' + "[" * 40 + "]" * 40 + "}}}")
    assert reply.id == 3
    assert "nested" in reply.message


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_oversized_command_is_answered_by_id(encoding: str) -> None:
    message = {"op": "publish", "id": 12, "geoid": {"text": "é" * 300}}
    assert refused(encoding, message, max_bytes=500).code == "too_large"
    assert refused(encoding, message, max_bytes=500).id == 12
    CODECS[encoding].decode(encode(encoding, message), max_bytes=700)


def test_the_frame_type_belongs_to_the_encoding() -> None:
    for encoding, data in (("json", b"{}"), ("msgpack", "{}")):
        with pytest.raises(Disconnect) as caught:
            CODECS[encoding].decode(data)
        assert caught.value.code == CloseCode.UNSUPPORTED_DATA


@pytest.mark.parametrize("encoding", ENCODINGS)
@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(encoding: str, data: bytes) -> None:
    message = data.decode("latin-1") if encoding == "json" else data
    try:
        CODECS[encoding].decode(message)
    except Malformed as exc:
        CODECS[encoding].encode(error_reply(exc.error, exc.id))


def test_replies_and_their_frames() -> None:
    pong = Pong(id=3, epoch="e", offset=9)
    assert msgspec.json.decode(CODECS["json"].encode(pong)) == {"op": "pong", "id": 3, "epoch": "e", "offset": 9}
    assert CODECS["msgpack"].frame(pong) == frames.frame(2, CODECS["msgpack"].encode(pong))
    error = error_reply(RateLimitedError("slow down", retry_after=0.5), 7)
    assert msgspec.json.decode(CODECS["json"].encode(error)) == {
        "op": "error", "id": 7, "code": "rate_limited", "message": "slow down", "temporary": True, "retry_after": 0.5,
    }  # fmt: skip


json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**63),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(),
    ),
    lambda v: st.one_of(st.lists(v, max_size=3), st.dictionaries(st.text(max_size=5), v, max_size=3)),
    max_leaves=8,
)


@given(json_values, st.sampled_from(["geoids", "geoid:a~b"]), st.text(min_size=1, max_size=8))
def test_events_say_the_same_in_both_encodings(data: Any, channel: str, epoch: str) -> None:
    encoder = EventEncoder(epoch)
    entry = LogEntry(5, "geoid.created", 1_700_000_000_000, (channel,), msgspec.Raw(msgspec.json.encode(data)))
    said = msgspec.json.decode(encoder.payload(entry, channel, "json"), type=Event)
    assert said == msgspec.msgpack.decode(encoder.payload(entry, channel, "msgpack"), type=Event)
    assert (said.channel, said.epoch, said.offset, said.type, said.ts) == (channel, epoch, 5, entry.type, entry.ts)
    assert said.data == msgspec.json.decode(entry.data)
