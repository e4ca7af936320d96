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


def _refused(message: str, *, disconnected: bool = False, lasting: bool = False) -> Failure:
    return Failure(message, disconnected, answered=True, lasting=lasting)


_LOST = Failure("the connection to the database was lost", disconnected=True, answered=False)
_SQLITE: dict[int, Failure] = {
    sqlite3.SQLITE_FULL: _refused("the disk of the database is full: nothing was written; free some space"),
    sqlite3.SQLITE_BUSY: _refused("the database is locked by another process: nothing was written"),
    sqlite3.SQLITE_LOCKED: _refused("the database is locked: nothing was written"),
    sqlite3.SQLITE_READONLY: _refused(
        "the database is read-only: nothing was written; check file and mount permissions", disconnected=True
    ),
    sqlite3.SQLITE_IOERR: _refused(
        "the disk of the database reports an error: nothing was written", disconnected=True, lasting=True
    ),
    sqlite3.SQLITE_CANTOPEN: _refused(
        "the database file cannot be opened; check its path and permissions", disconnected=True, lasting=True
    ),
    sqlite3.SQLITE_NOMEM: _refused("the database ran out of memory: nothing was written"),
    sqlite3.SQLITE_INTERRUPT: _refused("the database is shutting down"),
    sqlite3.SQLITE_PROTOCOL: _refused(
        "the database is locked by another process: nothing was written", disconnected=True
    ),
    sqlite3.SQLITE_CORRUPT: _refused(
        "the database file is damaged: run `kimera-stream db check`, then restore a backup or export what is left",
        disconnected=True,
        lasting=True,
    ),
    sqlite3.SQLITE_NOTADB: _refused(
        "the file is not a SQLite database; check KIMERA_DATABASE__URL", disconnected=True, lasting=True
    ),
}

# Classes and codes of PostgreSQL's SQLSTATE: connection, operator intervention, resources, and refusals for a while.
_LOST_STATES = ("08", "57P")
_REFUSED_STATES = ("53", "55P03", "40", "57014", "25P03")


def _sqlite_failure(error: sqlite3.Error) -> Failure | None:
    code = getattr(error, "sqlite_errorcode", None)
    if code is None and "decode to UTF-8" in str(error):  # the driver's own: what we wrote can be decoded
        code = sqlite3.SQLITE_CORRUPT
    return None if code is None else _SQLITE.get(code & 0xFF)


def _postgres_failure(error: BaseException, state: str | None) -> Failure | None:
    if state is None:
        text = str(error).lower()
        lost = "connection" in text and any(word in text for word in ("closed", "lost", "released", "reset"))
        # asyncpg's own words where the server ended the connection in the moment in which a statement was begun.
        return _LOST if lost or "cannot switch to state" in text else None
    if state.startswith(_LOST_STATES):
        return _LOST
    if state == "25006":
        return _refused(
            "the database is read-only (a standby?): nothing was written; point KIMERA_DATABASE__URL at the primary",
            disconnected=True,
        )
    if state == "53100":
        return _refused("the disk of the database is full: nothing was written")
    if state == "3D000" or state.startswith("28"):
        wrong = "has no such database" if state == "3D000" else "does not let this user in"
        return _refused(
            f"the database server {wrong} (SQLSTATE {state}): nothing was written; check KIMERA_DATABASE__URL",
            disconnected=True,
            lasting=True,
        )
    if state.startswith(_REFUSED_STATES):
        return _refused(
            f"the database refuses work for now (SQLSTATE {state}): nothing was written",
            disconnected=state.startswith("53"),
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
