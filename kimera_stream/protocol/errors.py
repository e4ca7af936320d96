"""The one error tree.

``KimeraError``
├── ``OperationalError``: expected in normal operation; handled where it is expected and shown to the caller
│   ├── ``BadRequestError`` ``UnknownOpError`` ``BadChannelError`` ``BadFilterError`` ``BadPositionError`` ``TooLargeError``
│   ├── ``UnauthorizedError`` ``ForbiddenError``
│   ├── ``NotFoundError`` ``ConflictError`` ``AlreadySubscribedError`` ``NotSubscribedError``
│   ├── ``LimitExceededError`` ``RateLimitedError`` ``OverloadedError`` ``UnavailableError``
│   └── ``InternalError``: the caller's view of a defect; the defect itself is logged, never sent
└── ``Disconnect``: ends a connection with a close code; the code's range says whether to reconnect

Anything outside this tree is a programming error: it propagates to the supervisor, which logs it once and restarts the
service. ``OSError`` and library errors are translated at the edge that knows what they mean.
"""

from typing import ClassVar, Literal

from kimera_stream.protocol.close_codes import CloseCode

ErrorCode = Literal[
    "bad_request",
    "unknown_op",
    "unauthorized",
    "forbidden",
    "not_found",
    "conflict",
    "already_subscribed",
    "not_subscribed",
    "bad_channel",
    "bad_filter",
    "bad_position",
    "too_large",
    "limit_exceeded",
    "rate_limited",
    "overloaded",
    "unavailable",
    "internal",
]


class KimeraError(Exception):
    """Root of every error that Kimera Stream raises on purpose."""


class OperationalError(KimeraError):
    """An expected failure with a code of the public contract.

    Args:
        message: One sentence for the person who sent the request; names the field and what was expected.
        field: Path of the offending field (``geoid.text``), where there is one.
        retry_after: Seconds after which a temporary error is worth another try.
    """

    code: ClassVar[ErrorCode] = "internal"
    temporary: ClassVar[bool] = False
    status: ClassVar[int] = 500
    """HTTP status of the same error."""

    def __init__(self, message: str, *, field: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after = retry_after


class BadRequestError(OperationalError):
    code = "bad_request"
    status = 400


class UnknownOpError(OperationalError):
    code = "unknown_op"
    status = 400


class BadChannelError(OperationalError):
    code = "bad_channel"
    status = 400


class BadFilterError(OperationalError):
    code = "bad_filter"
    status = 400


class BadPositionError(OperationalError):
    code = "bad_position"
    status = 400


class TooLargeError(OperationalError):
    code = "too_large"
    status = 413


class UnauthorizedError(OperationalError):
    code = "unauthorized"
    status = 401


class ForbiddenError(OperationalError):
    code = "forbidden"
    status = 403


class NotFoundError(OperationalError):
    code = "not_found"
    status = 404


class ConflictError(OperationalError):
    code = "conflict"
    status = 409


class AlreadySubscribedError(OperationalError):
    code = "already_subscribed"
    status = 409


class NotSubscribedError(OperationalError):
    code = "not_subscribed"
    status = 409


class LimitExceededError(OperationalError):
    code = "limit_exceeded"
    status = 403


class RateLimitedError(OperationalError):
    code = "rate_limited"
    temporary = True
    status = 429


class OverloadedError(OperationalError):
    code = "overloaded"
    temporary = True
    status = 503


class UnavailableError(OperationalError):
    code = "unavailable"
    temporary = True
    status = 503


class InternalError(OperationalError):
    code = "internal"
    temporary = True
    status = 500


ERRORS_BY_CODE: dict[str, type[OperationalError]] = {
    cls.code: cls
    for cls in (
        BadRequestError,
        UnknownOpError,
        BadChannelError,
        BadFilterError,
        BadPositionError,
        TooLargeError,
        UnauthorizedError,
        ForbiddenError,
        NotFoundError,
        ConflictError,
        AlreadySubscribedError,
        NotSubscribedError,
        LimitExceededError,
        RateLimitedError,
        OverloadedError,
        UnavailableError,
        InternalError,
    )
}


class Disconnect(KimeraError):  # noqa: N818 - an outcome of a session, named as the field names it
    """The connection ends with ``code``; the reason is one short machine-readable word."""

    def __init__(self, code: CloseCode, reason: str | None = None) -> None:
        self.code = code
        self.reason = code.reason if reason is None else reason
        super().__init__(f"{int(code)} {self.reason}")
