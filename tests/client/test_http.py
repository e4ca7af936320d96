"""The blocking client: what it sends, and what it makes of answers that are not what they should be."""

from collections.abc import Callable

import httpx
import pytest

from kimera_stream.client.http import HttpClient
from kimera_stream.client.wire import http_base, stream_url
from kimera_stream.protocol.errors import (
    BadRequestError,
    InternalError,
    OverloadedError,
    TooLargeError,
    UnauthorizedError,
    UnavailableError,
)


def client(answer: Callable[[httpx.Request], httpx.Response], token: str | None = None) -> HttpClient:
    return HttpClient("http://server", token=token, transport=httpx.MockTransport(answer))


def answering(status: int, body: bytes, **headers: str) -> HttpClient:
    return client(lambda _: httpx.Response(status, content=body, headers=headers))


def test_the_token_and_the_key_are_headers() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(400, json={"code": "bad_request", "detail": "no"})

    with client(answer, "secret") as http, pytest.raises(BadRequestError, match="no"):
        http.publish("x", key="k1")
    assert seen[0].headers["authorization"] == "Bearer secret"
    assert seen[0].headers["idempotency-key"] == "k1"
    assert seen[0].content == b'{"text":"x"}'
    assert "secret" not in str(seen[0].url)


@pytest.mark.parametrize(
    ("status", "body", "error", "message"),
    [
        (401, b'{"code":"unauthorized","detail":"no token"}', UnauthorizedError, "no token"),
        (413, b'{"code":"too_large","detail":"text: too long","field":"text"}', TooLargeError, "text: too long"),
        (503, b'{"code":"overloaded","detail":"full","retry_after":1.5}', OverloadedError, "full"),
        (500, b'{"code":"brand_new","detail":"what?"}', InternalError, "what"),
        (502, b"<html>bad gateway</html>", UnavailableError, "HTTP 502"),
        (500, b"", InternalError, "HTTP 500"),
    ],
)
def test_problems_become_errors(status: int, body: bytes, error: type[Exception], message: str) -> None:
    with answering(status, body) as http, pytest.raises(error, match=message):
        http.stats()


def test_retry_after_is_kept() -> None:
    with answering(503, b'{"code":"overloaded","detail":"full","retry_after":1.5}') as http:
        with pytest.raises(OverloadedError) as caught:
            http.stats()
        assert caught.value.retry_after == 1.5


def test_an_answer_that_is_not_the_contracts_is_told() -> None:
    with answering(200, b'{"nonsense": 1}') as http, pytest.raises(InternalError, match="contract"):
        http.publish("x")


def test_a_server_that_is_not_there(unused_port: int) -> None:
    with HttpClient(f"http://127.0.0.1:{unused_port}", timeout=2) as http:
        with pytest.raises(UnavailableError, match="cannot reach"):
            http.stats()
        assert not http.ready()


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("http://h:1", "http://h:1"),
        ("h:8765", "http://h:8765"),
        ("ws://h:1/v1/stream", "http://h:1"),
        ("wss://h/prefix/", "https://h/prefix"),
    ],
)
def test_addresses(given: str, base: str) -> None:
    assert http_base(given) == base
    assert stream_url(given) == "ws" + base.removeprefix("http") + "/v1/stream"


@pytest.mark.parametrize("given", ["ftp://h", "http://", "file:///etc"])
def test_addresses_that_are_none(given: str) -> None:
    with pytest.raises(BadRequestError, match="url"):
        http_base(given)
