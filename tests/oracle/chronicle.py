"""What a log that is trimmed has told before: read on and on while a run lasts, so that in the end all of it is known."""

from collections.abc import Callable, Sequence

import anyio

from tests.oracle.model import MAIN_CHANNELS, Entry, entry_of
from tests.oracle.wire import Gone, Web

PAGE = 1_000
EVERY = 0.3
"""Seconds between two readings: far less than what is kept takes to be written."""


class Chronicle:
    """Reads every channel from the beginning, and goes on where it was.

    Args:
        url: Base address of a node, as it is now.
    """

    def __init__(self, url: Callable[[], str], extra: Sequence[str]) -> None:
        self._url = url
        self.channels: dict[str, list[Entry]] = {name: [] for name in (*MAIN_CHANNELS, *extra)}
        self._read: dict[str, int] = {}
        self._epoch = ""
        self._moved = anyio.Event()
        self.broken: list[str] = []

    async def run(self) -> None:
        """Until cancelled, or until something is lost."""
        while not self.broken:
            try:
                async with Web(self._url()) as web:
                    _, health = await web.ask("GET", "/health")
                    for channel in self.channels:
                        await self._go_on(web, channel, int(health.get("offset", 0)))
            except Gone:
                pass
            self._moved.set()
            self._moved = anyio.Event()
            await anyio.sleep(EVERY)

    async def reach(self, head: int) -> None:
        """Wait until everything up to ``head`` is written down, or can never be."""
        while not self.broken and min(self._read.get(name, 0) for name in self.channels) < head:
            moved = self._moved
            await moved.wait()

    async def _go_on(self, web: Web, channel: str, head: int) -> None:
        """Read a channel to its end, which is at ``head`` or later."""
        more = True
        while more:
            since = f"{self._epoch}:{self._read[channel]}" if channel in self._read else None
            asked = {"channel": channel, "limit": PAGE, **({} if since is None else {"since": since})}
            status, page = await web.ask("GET", "/v1/history", params=asked)
            if status != 200:
                if status < 500:
                    self.broken.append(f"the harness has read {channel} too slowly: {page.get('detail')}")
                return
            self.channels[channel] += [entry_of(event) for event in page["events"]]
            self._epoch, more = page["epoch"], page["more"]
            self._read[channel] = page["offset"] if more else max(head, page["offset"])


def check_kept(channel: str, kept: Sequence[Entry], told: Sequence[Entry], *, head: int, keep: int) -> list[str]:
    """What a trimmed log still tells is the end of what it has told, and at least the last ``keep`` offsets of it."""
    place = len(told) - len(kept)
    if [each.digest for each in kept] != [each.digest for each in told[max(0, place) :]]:
        return [f"{channel}: what is kept is not the end of what was told"]
    lost = [each.offset for each in told[:place] if each.offset > head - keep]
    return [f"{channel}: {lost[:5]} are of the last {keep} and are not kept"] if lost else []
