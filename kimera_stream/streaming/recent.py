"""Reading a channel out of memory where the hub still has it, out of the log where not."""

from typing import Final

from kimera_stream.core.interfaces import LogPage, LogReader
from kimera_stream.streaming.hub import Hub

_SCAN: Final = 8_192
"""Records of the tail looked through at once."""


class Recent:
    """A reader of what was said lately.

    Args:
        hub: Whose tail is looked at.
        log: Read where the tail does not reach.
    """

    def __init__(self, hub: Hub, log: LogReader) -> None:
        self._hub = hub
        self._log = log

    async def read(self, channel: str, *, after: int, limit: int, until: int) -> LogPage:
        """Entries of a channel with ``after < offset <= until``, as ``LogReader.read``.

        Raises:
            UnavailableError: the log had to be read, and cannot be.
        """
        tail = self._hub.tail
        if not tail.covers(after) or until > self._hub.delivered:
            return await self._log.read(channel, after=after, limit=limit, until=until)
        records, scanned = tail.between(channel, after, until, limit=limit, scan=_SCAN)
        return LogPage([record.entry for record in records], scanned, more=scanned < until)
