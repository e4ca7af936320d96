"""Whether what a server writes to can be written, looked at before anything is started."""

import errno
import os
from pathlib import Path

from sqlalchemy.engine import make_url

from kimera_stream.infrastructure.settings import Settings, database_url
from kimera_stream.protocol.errors import KimeraError


class FolderError(KimeraError):
    """A folder or file that the server needs cannot be written. As text one line, with what to do."""


def check_folders(settings: Settings) -> None:
    """Look at the data directory and, on SQLite, at the database and its folder. Nothing is made and nothing is written.

    A server does not start to read alone: SQLite opens a database that was closed only where it can make its log beside it, so that
    it would depend on how the last run ended. One that runs goes on serving reads and streams when its disk turns read-only.

    Raises:
        FolderError: one of them is not writable.
    """
    if settings.role != "edge":
        _check(settings.paths.data_dir.absolute(), "KIMERA_PATHS__DATA_DIR")
    url = database_url(settings)
    if url.startswith("sqlite"):
        file = Path(make_url(url).database or "")
        where = "KIMERA_DATABASE__URL" if settings.database.url.get_secret_value() else "KIMERA_PATHS__DATA_DIR"
        _check(file.absolute().parent, where)
        if _is_there(file):
            _check(file, where)


def _check(path: Path, variable: str) -> None:
    there = path
    while not _is_there(there) and there != there.parent:
        there = there.parent  # it will be made in this one
    if os.access(there, os.W_OK | os.X_OK if there.is_dir() else os.W_OK):
        return
    what = "is on a read-only file system" if _is_read_only(there) else "cannot be written by this user"
    help_ = "remount it writable" if _is_read_only(there) else "change its owner or permissions"
    raise FolderError(f"{variable}: {path} {what}; {help_}, or name another place")


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:
        return False  # a folder above it lets this user see nothing in it, nor make anything


def _is_read_only(path: Path) -> bool:
    try:
        return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    except OSError as error:
        return error.errno == errno.EROFS
