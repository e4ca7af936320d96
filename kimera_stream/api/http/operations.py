"""The table of HTTP operations: one entry per method and path, out of which routes and OpenAPI document are built alike."""

import ipaddress
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, Literal, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kimera_stream.api.auth.transport import extract_token
from kimera_stream.api.http.content import ClientGone, answer, decode, read_body, request_encoding
from kimera_stream.api.http.door import DoorServices, HttpDoor
from kimera_stream.api.problems import MethodNotAllowedError, problem_response
from kimera_stream.core.access import Principal, Role
from kimera_stream.protocol.channels import OF_AN_ID, is_id
from kimera_stream.protocol.errors import (
    BadRequestError,
    ForbiddenError,
    NotFoundError,
    OperationalError,
    UnauthorizedError,
)
from kimera_stream.protocol.explaining import bad_request

T = TypeVar("T")
Q = TypeVar("Q", bound=msgspec.Struct)
Access = Literal["open", "inside", "token"]
"""open: anyone. inside: anyone on this machine, elsewhere as ``token``. token: whoever has the role."""
Tag = Literal["geoids", "contradictions", "meaning", "stream", "operations", "documents"]

ROUTE_KEY: Final = "kimera.route"
"""Where the scope holds the path template of the operation, for metrics."""
ANONYMOUS: Final = Principal("anonymous", frozenset())
_INTEGER: Final = re.compile(r"-?[0-9]+")


class NoQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An operation without query parameters."""


@dataclass(frozen=True, slots=True, init=False)
class OneOf:
    """A body that has one of several shapes."""

    options: tuple[Any, ...]

    def __init__(self, *options: Any) -> None:
        object.__setattr__(self, "options", options)


@dataclass(frozen=True, slots=True)
class ListOf:
    """A body that is a list of one shape."""

    item: Any


@dataclass(frozen=True, slots=True)
class Content:
    """A body: its media type and its shape: a type, ``OneOf``, ``ListOf``, or None for free text."""

    type: Any
    media: str = "application/json"
    description: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """One possible answer."""

    description: str
    contents: tuple[Content, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)


class Call:
    """One request to one operation."""

    __slots__ = ("_query", "door", "operation", "principal", "request", "services")

    def __init__(
        self,
        door: HttpDoor,
        operation: "Operation",
        request: Request,
        principal: Principal,
        services: DoorServices | None,
        query: msgspec.Struct,
    ) -> None:
        self.door = door
        self.operation = operation
        self.request = request
        self.principal = principal
        self.services = services
        self._query = query

    @property
    def open_services(self) -> DoorServices:
        """The services; the operation is declared to need them."""
        assert self.services is not None, "the operation is declared with needs_services=False"
        return self.services

    def path_id(self, name: str = "id") -> str:
        """An id in the path.

        Raises:
            NotFoundError: nothing can have such an id.
        """
        value: str = self.request.path_params[name]
        if not is_id(value):
            raise NotFoundError(f"{name}: expected {OF_AN_ID}", field=name)
        return value

    def query(self, kind: type[Q]) -> Q:
        """The query parameters, as the operation declares them."""
        assert isinstance(self._query, kind), f"{self.operation.name} declares {self.operation.query.__name__}"
        return self._query

    async def body(self, kind: type[T]) -> T:
        """The body, strictly decoded.

        Raises:
            BadRequestError, TooLargeError, UnsupportedMediaTypeError: it is not what is expected.
        """
        encoding = request_encoding(self.request)
        data = await read_body(self.request, self.door.settings.api.max_body_bytes)
        return decode(data, kind, encoding)

    def answer(self, value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
        """A response in the encoding that the client prefers."""
        return answer(self.request, value, status=status, headers=headers)


@lru_cache(maxsize=256)
def _integers(kind: type[msgspec.Struct]) -> tuple[str, ...]:
    """Names of the parameters that take an integer."""
    found = []
    for each in msgspec.structs.fields(kind):
        told = msgspec.inspect.type_info(each.type)
        parts = told.types if isinstance(told, msgspec.inspect.UnionType) else (told,)
        while any(isinstance(part, msgspec.inspect.Metadata) for part in parts):
            parts = tuple(part.type if isinstance(part, msgspec.inspect.Metadata) else part for part in parts)
        if any(isinstance(part, msgspec.inspect.IntType) for part in parts):
            found.append(each.encode_name)
    return tuple(found)


def parse_query(request: Request, kind: type[Q]) -> Q:
    """The query parameters, strictly: an unknown or repeated one is refused.

    Raises:
        BadRequestError: names the parameter and what was expected.
    """
    given: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name in given:
            raise BadRequestError(f"{name[:80]}: given more than once", field=name[:80])
        given[name] = value
    for name in _integers(kind):
        # The decoder takes 1.0 and 1e2 for integers, which no list of ours has as a place or a length.
        if name in given and not _INTEGER.fullmatch(given[name]):
            raise BadRequestError(f"{name}: expected `int`, got {given[name][:40]!r}", field=name)
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as error:
        told = bad_request(error)
        message = told.message.replace(", got `str`", f", got {given.get(told.field or '', '')[:40]!r}")
        if message.endswith(": unknown field"):
            known = ", ".join(each.encode_name for each in msgspec.structs.fields(kind)) or "none"
            message = f"{told.field}: unknown parameter; expected {known}"
        raise BadRequestError(message, field=told.field) from error


Handler = Callable[[Call], Awaitable[ASGIApp]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method on one path.

    Attributes:
        name: Its ``operationId``.
        role: What the principal must be allowed to do; None: nothing in particular.
        query: Struct of the query parameters.
        path_fields: Description of each parameter in the path.
        body: What may be sent.
        answers: Possible answers by status; errors of ``fails`` are added by the document.
        fails: Status codes of the errors that are its own, beyond those that any operation can have.
        needs_services: Refused while the server has not loaded.
    """

    method: Literal["GET", "POST", "PATCH", "DELETE"]
    path: str
    name: str
    summary: str
    handler: Handler
    tag: Tag
    description: str = ""
    access: Access = "token"
    role: Role | None = None
    query: type[msgspec.Struct] = NoQuery
    path_fields: Mapping[str, str] = field(default_factory=dict)
    body: tuple[Content, ...] = ()
    body_required: bool = True
    header_fields: Mapping[str, str] = field(default_factory=dict)
    answers: Mapping[int, Answer]
    fails: tuple[int, ...] = ()
    needs_services: bool = True


def routes_of(door: HttpDoor, operations: Sequence[Operation]) -> list[Route]:
    """One route per path; a wrong method is answered with those that exist."""
    by_path: dict[str, dict[str, Operation]] = {}
    for operation in operations:
        methods = by_path.setdefault(operation.path, {})
        assert operation.method not in methods, f"{operation.method} {operation.path} is declared twice"
        methods[operation.method] = operation
    return [Route(path, endpoint=PathEndpoint(door, path, methods), name=path) for path, methods in by_path.items()]


class PathEndpoint:
    """ASGI application of one path."""

    def __init__(self, door: HttpDoor, path: str, methods: Mapping[str, Operation]) -> None:
        self._door = door
        self._path = path
        self._methods = methods
        allowed = {*methods, "OPTIONS", *(["HEAD"] if "GET" in methods else [])}
        self._allow = ", ".join(sorted(allowed))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[ROUTE_KEY] = self._path
        started = False

        async def noting_send(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            response = await self._respond(Request(scope, receive, send))
            await response(scope, receive, noting_send)
        except ClientGone:
            return
        except OperationalError as error:
            if started:
                raise
            self._door.metrics.error("http", error.code)
            headers = {"allow": self._allow} if isinstance(error, MethodNotAllowedError) else None
            problem = problem_response(scope, error, headers=headers)
            await problem(scope, receive, send)

    async def _respond(self, request: Request) -> ASGIApp:
        method = request.method
        if method == "OPTIONS":
            return Response(status_code=204, headers={"allow": self._allow})
        operation = self._methods.get("GET" if method == "HEAD" else method)
        if operation is None:
            raise MethodNotAllowedError(f"{method[:20]}: expected one of {self._allow}")
        principal = await authorize(self._door, operation, request)
        # A probe or a reader of documents may carry a parameter that somebody put there to get past a cache.
        query = NoQuery() if operation.access != "token" else parse_query(request, operation.query)
        services = self._door.opened() if operation.needs_services else None
        return await operation.handler(Call(self._door, operation, request, principal, services, query))


async def authorize(door: HttpDoor, operation: Operation, request: Request) -> Principal:
    """Who asks, if they may.

    Raises:
        UnauthorizedError: no valid token where one is needed.
        ForbiddenError: the token does not carry the role.
    """
    if operation.access == "open" or (operation.access == "inside" and from_this_machine(request)):
        return ANONYMOUS
    principal = await door.authenticator.authenticate(_token(request))
    if operation.role is not None and not principal.may(operation.role):
        raise ForbiddenError(f"authorization: this needs the role {operation.role}", field="authorization")
    return principal


def _token(request: Request) -> str | None:
    if len(request.headers.getlist("authorization")) > 1:
        raise UnauthorizedError("authorization: expected one such header", field="authorization")
    return extract_token(request.headers)


def from_this_machine(request: Request) -> bool:
    """Whether the request comes from a loopback address, and not through a proxy that sits there."""
    if request.client is None or any(name in request.headers for name in ("forwarded", "x-forwarded-for", "via")):
        return False
    try:
        return ipaddress.ip_address(request.client.host.partition("%")[0]).is_loopback
    except ValueError:
        return False
