"""What a driver's error means: unavailable for now, or a defect."""

import sqlite3
from dataclasses import dataclass

from sqlalchemy.exc import DBAPIError

from kimera_stream.protocol.errors import UnavailableError

RETRY_AFTER = 1.0
"""Seconds after which a refused write is worth another try, where nothing better is known."""


class CommitInDoubtError(UnavailableError):
    """The connection was lost while the server was committing: the transaction may or may not have happened."""


@dataclass(frozen=True, slots=True)
class Failure:
    """How an error of a driver is to be taken.

    Attributes:
        message: For the person who sent the request: what is wrong and what helps.
        disconnected: The connection is of no more use; another one may well be.
        answered: The server itself refused, so that nothing was written.
        lasting: It does not pass by itself: nobody need wait for it.
    """

    message: str
    disconnected: bool
    answered: bool
    lasting: bool = False


_LASTING = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR}
_SQLITE: dict[int, tuple[str, bool]] = {
    sqlite3.SQLITE_FULL: ("the disk of the database is full: nothing was written; free some space", False),
    sqlite3.SQLITE_BUSY: ("the database is locked by another process: nothing was written", False),
    sqlite3.SQLITE_LOCKED: ("the database is locked: nothing was written", False),
    sqlite3.SQLITE_READONLY: ("the database is read-only: nothing was written; check file and mount permissions", True),
    sqlite3.SQLITE_IOERR: ("the disk of the database reports an error: nothing was written", True),
    sqlite3.SQLITE_CANTOPEN: ("the database file cannot be opened; check its path and permissions", True),
    sqlite3.SQLITE_NOMEM: ("the database ran out of memory: nothing was written", False),
    sqlite3.SQLITE_INTERRUPT: ("the database is shutting down", False),
    sqlite3.SQLITE_PROTOCOL: ("the database is locked by another process: nothing was written", True),
    sqlite3.SQLITE_CORRUPT: (
        "the database file is damaged: run `kimera-stream db check`, then restore a backup or export what is left",
        True,
    ),
    sqlite3.SQLITE_NOTADB: ("the file is not a SQLite database; check KIMERA_DATABASE__URL", True),
}

# Classes and codes of PostgreSQL's SQLSTATE: connection, operator intervention, resources, and refusals for a while.
_LOST_STATES = ("08", "57P")
_REFUSED_STATES = ("53", "55P03", "25006", "40", "57014", "25P03")


def _sqlite_failure(error: sqlite3.Error) -> Failure | None:
    code = getattr(error, "sqlite_errorcode", None)
    if code is None and "decode to UTF-8" in str(error):  # the driver's own: what we wrote can be decoded
        code = sqlite3.SQLITE_CORRUPT
    if code is None:
        return None
    known = _SQLITE.get(code & 0xFF)
    if known is None:
        return None
    message, disconnected = known
    return Failure(message, disconnected=disconnected, answered=True, lasting=code & 0xFF in _LASTING)


def _postgres_failure(error: BaseException, state: str | None) -> Failure | None:
    if state is None:
        text = str(error).lower()
        lost = "connection" in text and any(word in text for word in ("closed", "lost", "released", "reset"))
        # asyncpg's own words where the server ended the connection in the moment in which a statement was begun.
        lost = lost or "cannot switch to state" in text
        if not lost:
            return None
        return Failure("the connection to the database was lost", disconnected=True, answered=False)
    if state.startswith(_LOST_STATES):
        return Failure("the connection to the database was lost", disconnected=True, answered=False)
    if state == "25006":
        return Failure(
            "the database is read-only (a standby?): nothing was written; point KIMERA_DATABASE__URL at the primary",
            disconnected=True,
            answered=True,
        )
    if state == "53100":
        return Failure("the disk of the database is full: nothing was written", disconnected=False, answered=True)
    if state == "3D000" or state.startswith("28"):
        wrong = "has no such database" if state == "3D000" else "does not let this user in"
        return Failure(
            f"the database server {wrong} (SQLSTATE {state}): nothing was written; check KIMERA_DATABASE__URL",
            disconnected=True,
            answered=True,
            lasting=True,
        )
    if state.startswith(_REFUSED_STATES):
        return Failure(
            f"the database refuses work for now (SQLSTATE {state}): nothing was written",
            disconnected=state.startswith("53"),
            answered=True,
        )
    return None


def failure_of(error: BaseException) -> Failure | None:
    """How ``error`` is to be taken; None for anything that is a defect of ours."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        return failure_of(error.orig)
    if isinstance(error, sqlite3.Error):
        return _sqlite_failure(error)
    if isinstance(error, (OSError, TimeoutError, EOFError)):
        return Failure("the database cannot be reached", disconnected=True, answered=False)
    module = type(error).__module__
    if module.startswith(("asyncpg", "sqlalchemy.dialects.postgresql")):
        return _postgres_failure(error, getattr(error, "sqlstate", None))
    return None


def unavailable(failure: Failure) -> UnavailableError:
    """The error that a caller sees."""
    return UnavailableError(failure.message, retry_after=None if failure.lasting else RETRY_AFTER)
