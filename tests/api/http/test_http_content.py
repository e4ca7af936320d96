"""Bodies: limits, content types and negotiation, apart from any route."""

import anyio
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from kimera_stream.api.http.content import ClientGone, answer_encoding, decode, read_body
from kimera_stream.api.problems import RequestTimeoutError
from kimera_stream.protocol.errors import BadRequestError, TooLargeError
from kimera_stream.protocol.objects import GeoidBody


def request(*messages: dict, **headers: str) -> Request:
    """A request whose body comes as ``messages``, and then nothing more."""
    waiting = list(messages)

    async def receive() -> dict:
        if waiting:
            return waiting.pop(0)
        await anyio.sleep_forever()
        raise AssertionError

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": raw}, receive)


def part(body: bytes, *, more: bool) -> dict:
    return {"type": "http.request", "body": body, "more_body": more}


@pytest.mark.anyio
async def test_a_body_in_parts_is_put_together():
    assert await read_body(request(part(b"ab", more=True), part(b"", more=True), part(b"c", more=False)), 3) == b"abc"


@pytest.mark.anyio
async def test_a_body_over_the_limit_is_refused_as_soon_as_that_is_known():
    with pytest.raises(TooLargeError):
        await read_body(request(part(b"abcd", more=True)), 3)
    with pytest.raises(TooLargeError):
        await read_body(request(content_length="4"), 3)


@pytest.mark.anyio
async def test_a_client_that_stops_sending_is_not_waited_for_for_ever():
    with pytest.raises(RequestTimeoutError) as refused:
        await read_body(request(part(b"a", more=True)), 3, patience=0.01)
    assert refused.value.status == 408


@pytest.mark.anyio
async def test_a_client_that_leaves():
    with pytest.raises(ClientGone):
        await read_body(request(part(b"a", more=True), {"type": "http.disconnect"}), 3)


@pytest.mark.parametrize(
    ("accept", "encoding"),
    [
        ("", "json"),
        ("*/*", "json"),
        ("application/json", "json"),
        ("application/msgpack", "msgpack"),
        ("application/x-msgpack, */*;q=0.1", "msgpack"),
        ("application/json;q=0.9, application/msgpack", "msgpack"),
        ("application/json, application/msgpack;q=0.9", "json"),
        ("application/json, application/msgpack", "json"),
        ("application/msgpack;q=0", "json"),
        ("text/html", "json"),
        (";;,,q=", "json"),
    ],
)
def test_the_preferred_encoding(accept, encoding):
    assert answer_encoding(request(accept=accept)) == encoding


def refusal(data: bytes, encoding: str, where: str = "") -> BadRequestError | None:
    """How ``data`` is refused as a geoid body; None where it is one. Any other error is the test's."""
    try:
        decode(data, GeoidBody, encoding, where=where)
    except BadRequestError as error:
        return error
    return None


@given(st.binary(max_size=200), st.sampled_from(["json", "msgpack"]))
def test_whatever_the_bytes_the_error_is_ours(data, encoding):
    error = refusal(data, encoding)
    assert error is None or error.message


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_whatever_the_value_the_error_names_a_place(value):
    error = refusal(msgspec.json.encode(value), "json", "[3]")
    assert error is None or error.message.startswith("[3]")


@pytest.mark.parametrize(
    ("data", "encoding", "told"),
    [
        (b'{"text": NaN}', "json", "body: expected valid JSON: invalid character (byte 9)"),
        (b'{"text": "a', "json", "body: expected valid JSON: input data was truncated"),
        (b"\xc1", "msgpack", "body: expected valid MessagePack: invalid opcode '\\xc1' (byte 0)"),
    ],
)
def test_bytes_that_are_no_value_are_told_in_plain_words(data, encoding, told):
    with pytest.raises(BadRequestError) as caught:
        decode(data, GeoidBody, encoding)
    assert caught.value.message == told
