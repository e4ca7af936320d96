"""A small file that is read again when it has changed."""

from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import anyio
import structlog

from kimera_stream.core.interfaces import Threads

T = TypeVar("T")
Fingerprint = tuple[int, int, int, int]

log = structlog.get_logger(__name__)


class WatchedFile(Generic[T]):
    """What a file says, at most ``interval`` seconds old.

    Args:
        path: The file.
        parse: Its bytes, or None where there is no file that can be read, to what it says. Errors are the caller's at the first
            reading; later ones keep what was read before, and are logged.
        threads: Where the disk is waited for.
        clock: Seconds.
        interval: Seconds between looks at the file.
    """

    def __init__(
        self,
        path: Path,
        parse: Callable[[bytes | None], T],
        threads: Threads,
        clock: Callable[[], float],
        interval: float,
    ) -> None:
        self._path = path
        self._parse = parse
        self._threads = threads
        self._clock = clock
        self._interval = interval
        self._value: T | None = None
        self._fingerprint: Fingerprint | None = None
        self._look_at = float("-inf")
        self._lock = anyio.Lock()

    async def value(self) -> T:
        """What the file says.

        Raises:
            ValueError: at the first reading, it cannot be understood.
        """
        if self._value is None or self._clock() >= self._look_at:
            async with self._lock:
                if self._value is None or self._clock() >= self._look_at:
                    await self._look()
        assert self._value is not None
        return self._value

    async def _look(self) -> None:
        seen, content = await self._threads.run("io", self._read)
        if self._value is None or seen != self._fingerprint:
            try:
                self._value = self._parse(content)
            except ValueError as error:
                if self._value is None:
                    raise
                log.error("file_not_understood", path=str(self._path), error=str(error), kept="what it said before")  # noqa: TRY400
            else:
                if self._fingerprint is not None:
                    log.info("file_reloaded", path=str(self._path))
        self._fingerprint = seen
        self._look_at = self._clock() + self._interval

    def _read(self) -> tuple[Fingerprint | None, bytes | None]:
        """Fingerprint and, where it is a new one, content. In a worker thread."""
        try:
            stat = self._path.stat()
            seen = (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino)
            if self._value is not None and seen == self._fingerprint:
                return seen, None
            return seen, self._path.read_bytes()
        except OSError:
            return None, None
