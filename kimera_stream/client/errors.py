"""What can go wrong on the way to the server, in the classes of the protocol's error tree."""

from kimera_stream.protocol.close_codes import CloseCode
from kimera_stream.protocol.errors import (
    ERRORS_BY_CODE,
    ForbiddenError,
    InternalError,
    KimeraError,
    LimitExceededError,
    OperationalError,
    UnauthorizedError,
    UnavailableError,
)


class ConnectionLostError(UnavailableError):
    """The connection broke before the reply came: whether the command was carried out is not known."""


class ConnectionEndedError(KimeraError):
    """The server ended the connection for good (close codes 4500-4999 and the final ones of the RFC).

    Attributes:
        code: The close code.
        reason: The server's one-word reason, or the code's own.
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"the server closed the connection with {code} {reason}".rstrip())
        self.code = code
        self.reason = reason


def error_of(
    code: str, message: str, *, field: str | None = None, retry_after: float | None = None
) -> OperationalError:
    """The error class of a code of the contract; an unknown code (a newer server) is an internal error."""
    return ERRORS_BY_CODE.get(code, InternalError)(message, field=field, retry_after=retry_after)


def may_reconnect(code: int | None) -> bool:
    """Whether the close code allows another attempt; no code (a broken connection) does."""
    if code is None:
        return True
    try:
        return CloseCode(code).reconnect
    except ValueError:  # a code this version does not name: its range decides
        return code < 4500


def error_of_close(code: int, reason: str) -> KimeraError:
    """The error that a final close code stands for."""
    refused = f"the server refused the connection: {code} {reason}".rstrip()
    if code == CloseCode.UNAUTHORIZED:
        return UnauthorizedError(f"{refused}; give a valid token")
    if code in (CloseCode.FORBIDDEN, CloseCode.ORIGIN_REFUSED):
        return ForbiddenError(refused)
    if code == CloseCode.CONNECTION_LIMIT:
        return LimitExceededError(refused)
    return ConnectionEndedError(code, reason)
