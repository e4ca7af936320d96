"""Following a log that other nodes write: what they tell is passed on in order, what they did not tell is read from the log.

    told on the bus ──> heard ──in order──> sink          a gap, or quiet for a while ──> the log is asked ──> sink

Nothing here trusts the bus: entries may be told twice, early, late or never. The log is asked ``poll`` seconds after the last time
at the latest, so what the bus loses costs that much time and nothing else.
"""

from collections.abc import Callable, Sequence
from typing import Final, Protocol

import anyio
import structlog

from kimera_stream.core.interfaces import LogReader
from kimera_stream.protocol.errors import UnavailableError
from kimera_stream.protocol.log import LogEntry

log = structlog.get_logger(__name__)

PAGE: Final = 1_000
PATIENCE: Final = 0.025
"""Seconds that a told entry may be missing before it is read: two nodes tell of neighbouring commits in any order."""
MOST_EARLY: Final = 8_192
"""Entries kept that came before their turn; beyond, all of them are read from the log."""
MOST_EARLY_BYTES: Final = 16 << 20
"""And their bytes."""
_OVERHEAD: Final = 600
"""Bytes counted for an entry besides its data."""


class SharedLog(LogReader, Protocol):
    """A log that other nodes write too."""

    async def refresh(self) -> int:
        """Read the ends of the log again; returns the head.

        Raises:
            UnavailableError: it cannot be read at present.
        """


class Following:
    """Passes a shared log on to ``sink``, each entry once and in order. Belongs to the event loop's thread.

    Args:
        log: The truth.
        sink: Where entries go; consecutive ones, unless retention has dropped what lies between.
        position: Everything up to here has been passed on.
        poll: Seconds between looks at the log.
    """

    def __init__(
        self, log: SharedLog, sink: Callable[[Sequence[LogEntry]], None], *, position: int, poll: float
    ) -> None:
        self._log = log
        self._sink = sink
        self._poll = poll
        self._early: dict[int, LogEntry] = {}
        self._early_bytes = 0
        self._wake = anyio.Event()
        self.position = position
        """Everything up to here has been passed on."""
        self.told = 0
        """Entries that came over the bus in time."""
        self.read = 0
        """Entries that had to be read from the log."""
        self.away = False
        """Whether the log could not be read when it was last asked."""

    @property
    def early_bytes(self) -> int:
        """Bytes of what came before its turn, estimated."""
        return self._early_bytes

    def heard(self, entries: Sequence[LogEntry]) -> None:
        """Entries as another node tells them: perhaps again, perhaps before their turn."""
        position = self.position
        for entry in entries:
            if entry.offset > position and entry.offset not in self._early:
                self._early[entry.offset] = entry
                self._early_bytes += _size(entry)
        self._pass_on()
        if len(self._early) > MOST_EARLY or self._early_bytes > MOST_EARLY_BYTES:
            self._early.clear()
            self._early_bytes = 0
            self._wake.set()
        elif self._early:
            self._wake.set()

    def lost(self) -> None:
        """Something may not have been told: ask the log."""
        self._wake.set()

    def _pass_on(self) -> None:
        """Pass on those whose turn it is."""
        turn = self.position + 1
        ready: list[LogEntry] = []
        while (entry := self._early.pop(turn, None)) is not None:
            ready.append(entry)
            self._early_bytes -= _size(entry)
            turn += 1
        if ready:
            self.told += len(ready)
            self.position = turn - 1
            self._sink(ready)

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            with anyio.move_on_after(self._poll):
                await self._wake.wait()
            self._wake = anyio.Event()
            if self._early:
                await anyio.sleep(PATIENCE)
                if not self._early:
                    continue
            try:
                await self._catch_up()
            except UnavailableError as error:
                if not self.away:
                    log.warning("the log cannot be read; subscribers wait", error=error.message)
                self.away = True
                await anyio.sleep(self._poll)
            else:
                self.away = False

    async def _catch_up(self) -> None:
        head = await self._log.refresh()
        if head > self.position:
            await anyio.sleep(PATIENCE)  # what was just committed is being told
        while self.position < head:
            page = await self._log.read(None, after=self.position, limit=PAGE, until=head)
            fresh = [entry for entry in page.entries if entry.offset > self.position]  # others were told meanwhile
            self.read += len(fresh)
            reached = fresh[-1].offset if fresh else page.scanned if page.more else head
            self.position = max(self.position, reached)
            if fresh:
                self._sink(fresh)
            self._early = {offset: entry for offset, entry in self._early.items() if offset > self.position}
            self._early_bytes = sum(map(_size, self._early.values()))
            self._pass_on()


def _size(entry: LogEntry) -> int:
    return memoryview(entry.data).nbytes + _OVERHEAD
