"""Errors over HTTP: ``application/problem+json`` (RFC 9457) with the codes of the public contract."""

import math
from http import HTTPStatus
from typing import Any, Final

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from kimera_stream.protocol.errors import (
    BadRequestError,
    ErrorCode,
    ForbiddenError,
    InternalError,
    NotFoundError,
    OperationalError,
    TooLargeError,
    UnauthorizedError,
)

PROBLEM_JSON: Final = "application/problem+json"
TYPE_PREFIX: Final = "urn:kimera-stream:problem:"
CHALLENGE: Final = 'Bearer realm="kimera-stream"'
REQUEST_ID_KEY: Final = "kimera.request_id"
"""Where the scope holds the id of the request."""

TITLES: Final[dict[ErrorCode, str]] = {
    "bad_request": "The request is not what was expected",
    "unknown_op": "There is no such command",
    "unauthorized": "A valid token is needed",
    "forbidden": "Not allowed",
    "not_found": "There is no such thing",
    "conflict": "It conflicts with the present state",
    "already_subscribed": "Already subscribed to the channel",
    "not_subscribed": "Not subscribed to the channel",
    "bad_channel": "There is no such channel",
    "bad_filter": "The filter is not valid",
    "bad_position": "The position is not valid",
    "too_large": "Too large",
    "limit_exceeded": "A limit is exceeded",
    "rate_limited": "Too many requests",
    "overloaded": "Too much work at present",
    "unavailable": "Not available at present",
    "internal": "The server made a mistake",
}


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The body of every error. ``type`` is ``urn:kimera-stream:problem:<code>``."""

    type: str
    title: str
    status: int
    detail: str
    code: ErrorCode
    temporary: bool
    retry_after: float | None = None
    """Seconds after which another try is worth it; also the ``Retry-After`` header, rounded up."""
    field: str | None = None
    """Path of the offending field."""
    request_id: str | None = None


class MethodNotAllowedError(BadRequestError):
    status = 405


class NotAcceptableError(BadRequestError):
    status = 406


class RequestTimeoutError(BadRequestError):
    status = 408


class UnsupportedMediaTypeError(BadRequestError):
    status = 415


def problem_of(error: OperationalError, *, request_id: str | None = None) -> Problem:
    """The problem that tells of ``error``."""
    return Problem(
        type=TYPE_PREFIX + error.code,
        title=TITLES[error.code],
        status=error.status,
        detail=error.message,
        code=error.code,
        temporary=error.temporary,
        retry_after=error.retry_after,
        field=error.field,
        request_id=request_id,
    )


def problem_response(scope: Scope, error: OperationalError, *, headers: dict[str, str] | None = None) -> Response:
    """The response that tells of ``error`` to the request of ``scope``."""
    sent = {"cache-control": "no-store", **(headers or {})}
    if error.retry_after is not None:
        sent["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if error.status == HTTPStatus.UNAUTHORIZED:
        sent["www-authenticate"] = CHALLENGE
    return Response(
        msgspec.json.encode(problem_of(error, request_id=scope.get(REQUEST_ID_KEY))),
        status_code=error.status,
        headers=sent,
        media_type=PROBLEM_JSON,
    )


def _of_http_exception(request: Request, error: HTTPException) -> OperationalError:
    match error.status_code:
        case 404:
            return NotFoundError(f"{request.url.path}: there is no such path; /docs lists them")
        case 405:
            allowed = (error.headers or {}).get("Allow", "")
            return MethodNotAllowedError(f"{request.method} {request.url.path}: expected one of {allowed}")
        case 401:
            return UnauthorizedError(error.detail)
        case 403:
            return ForbiddenError(error.detail)
        case 413:
            return TooLargeError(error.detail)
        case status if 400 <= status < 500:
            return BadRequestError(error.detail)
        case _:
            return InternalError(error.detail)


async def answer_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own refusals (no such path, wrong method) as problems."""
    assert isinstance(error, HTTPException)
    return problem_response(request.scope, _of_http_exception(request, error), headers=dict(error.headers or {}))


async def answer_operational_error(request: Request, error: Exception) -> Response:
    """An expected error that an endpoint outside the operation table let through."""
    assert isinstance(error, OperationalError)
    return problem_response(request.scope, error)


EXCEPTION_HANDLERS: Final[dict[Any, Any]] = {
    HTTPException: answer_http_exception,
    OperationalError: answer_operational_error,
}
"""For ``Starlette(exception_handlers=...)``. Programming errors are the request middleware's."""
