"""The blocking face over HTTP: for scripts, notebooks and the command line."""

import ssl as ssl_module
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import msgspec

from kimera_stream.client.errors import error_of
from kimera_stream.client.wire import http_base
from kimera_stream.protocol.errors import InternalError, OperationalError, UnavailableError
from kimera_stream.protocol.messages import Published
from kimera_stream.protocol.objects import (
    Contradiction,
    Decision,
    Geoid,
    GeoidBody,
    Position,
    Scar,
    ScoredGeoid,
    ScoreResult,
    WatchKind,
)

T = TypeVar("T")


class Problem(msgspec.Struct):
    """An ``application/problem+json`` body (RFC 9457), as far as it matters here. Unknown fields are ignored."""

    code: str = "internal"
    detail: str = ""
    title: str = ""
    field: str | None = None
    retry_after: float | None = None

    def error(self) -> OperationalError:
        """The error class that the problem stands for."""
        return error_of(
            self.code, self.detail or self.title or self.code, field=self.field, retry_after=self.retry_after
        )


class _SearchHits(msgspec.Struct):
    items: list[ScoredGeoid]


class _Page(msgspec.Struct):
    items: list[msgspec.Raw]
    next: int | None = None


class _Resolved(msgspec.Struct):
    scar: Scar
    offset: int


def problem_of(status: int, body: bytes) -> OperationalError:
    """The error of a response with an error status, whatever its body is."""
    try:
        problem = msgspec.json.decode(body, type=Problem)
    except msgspec.DecodeError:
        text = body[:200].decode(errors="replace").strip()
        message = f"HTTP {status}: {text}" if text else f"HTTP {status}"
        return UnavailableError(message) if status in (429, 502, 503, 504) else InternalError(message)
    return problem.error()


class HttpClient:
    """Blocking calls, each returning the public objects and raising the protocol's errors.

    Args:
        url: Address of the server.
        token: Bearer token.
        timeout: Seconds a call may take.
        ssl: TLS context for ``https``.
        transport: Replaces the network, in tests.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout: float = 30.0,
        ssl: ssl_module.SSLContext | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = http_base(url)
        headers = {"user-agent": "kimera-stream-python", "accept": "application/json"}
        if token is not None:
            headers["authorization"] = f"Bearer {token}"
        self._http = httpx.Client(
            base_url=self.url,
            headers=headers,
            timeout=timeout,
            transport=transport,
            trust_env=False,
            verify=True if ssl is None else ssl,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def request(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        params: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
        accept_status: Sequence[int] = (),
    ) -> bytes:
        """One request; the body of a successful response (or of one whose status is in ``accept_status``).

        Raises:
            OperationalError: the server's problem, or ``UnavailableError`` if it cannot be reached.
        """
        content = None if body is None else msgspec.json.encode(body)
        sent = dict(headers or {})
        if content is not None:
            sent["content-type"] = "application/json"
        given = {name: value for name, value in (params or {}).items() if value is not None}
        try:
            response = self._http.request(method, path, content=content, params=given, headers=sent)
        except httpx.HTTPError as exc:
            raise UnavailableError(f"cannot reach {self.url}: {str(exc) or type(exc).__name__}") from exc
        if response.is_error and response.status_code not in accept_status:
            raise problem_of(response.status_code, response.content)
        return response.content

    def _get(self, path: str, kind: type[T], **params: Any) -> T:
        return _decode(self.request("GET", path, params=params), kind)

    def publish(self, geoid: GeoidBody | str, *, key: str | None = None) -> Published:
        """Publish one statement; durable, scored and in the log when this returns."""
        body = GeoidBody(text=geoid) if isinstance(geoid, str) else geoid
        headers = {} if key is None else {"idempotency-key": key}
        return _decode(self.request("POST", "/v1/geoids", body=body, headers=headers), Published)

    def geoid(self, geoid_id: str) -> Geoid:
        """A geoid by id."""
        return self._get(f"/v1/geoids/{geoid_id}", Geoid)

    def delete(self, geoid_id: str) -> None:
        """Delete a geoid."""
        self.request("DELETE", f"/v1/geoids/{geoid_id}")

    def contradictions(
        self, *, after: int = 0, limit: int = 100, state: str | None = None, min_score: float | None = None
    ) -> tuple[list[Contradiction], int | None]:
        """A page of contradictions, and the ``after`` of the next one (None at the end)."""
        page = self._get(
            "/v1/contradictions", _Page, after=after or None, limit=limit, state=state, min_score=min_score
        )
        return [_decode(bytes(raw), Contradiction) for raw in page.items], page.next

    def contradiction(self, contradiction_id: str) -> Contradiction:
        """A contradiction by id."""
        return self._get(f"/v1/contradictions/{contradiction_id}", Contradiction)

    def resolve(self, contradiction_id: str, decision: Decision, reason: str | None = None) -> tuple[Scar, int]:
        """Resolve a contradiction: the scar, and its offset in the log."""
        body: dict[str, Any] = {"decision": decision}
        if reason is not None:
            body["reason"] = reason
        answer = self.request("POST", f"/v1/contradictions/{contradiction_id}/resolve", body=body)
        resolved = _decode(answer, _Resolved)
        return resolved.scar, resolved.offset

    def search(
        self, text: str, *, relation: WatchKind = "related", k: int = 10, filter: dict[str, Any] | None = None
    ) -> list[ScoredGeoid]:
        """Statements related to ``text``, or contradicting it, best first."""
        body: dict[str, Any] = {"text": text, "relation": relation, "k": k}
        if filter is not None:
            body["filter"] = filter
        answer = self.request("POST", "/v1/search", body=body)
        loose = msgspec.json.decode(answer)
        if isinstance(loose, list):
            return msgspec.convert(loose, list[ScoredGeoid])
        return _decode(answer, _SearchHits).items

    def score(self, a: GeoidBody | str, b: GeoidBody | str, *, explain: bool = False) -> ScoreResult:
        """How two statements stand to each other; nothing is stored. ``explain``: with what each stage said of them."""
        pair = [GeoidBody(text=item) if isinstance(item, str) else item for item in (a, b)]
        path = "/v1/score?explain=1" if explain else "/v1/score"
        return _decode(self.request("POST", path, body={"a": pair[0], "b": pair[1]}), ScoreResult)

    def position(self) -> Position:
        """The log's newest position."""
        page = self._get("/v1/history", dict[str, Any], channel="geoids", limit=1, reverse="true")
        return Position(str(page["epoch"]), int(page["offset"]))

    def stats(self) -> dict[str, Any]:
        """Newest value of the ``stats`` channel."""
        return self._get("/v1/stats", dict[str, Any])

    def health(self) -> dict[str, Any]:
        """The server's health in detail, healthy or not."""
        return _decode(self.request("GET", "/health", accept_status=(503,)), dict[str, Any])

    def ready(self) -> bool:
        """Whether the server takes work. False as well while it cannot be reached."""
        try:
            self.request("GET", "/readyz")
        except OperationalError:
            return False
        return True


def _decode(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as exc:
        raise InternalError(f"the server's answer is not what the contract says: {exc}") from exc
