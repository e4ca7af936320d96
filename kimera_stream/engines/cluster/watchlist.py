"""The watches, as a node knows them that does not match them: whose they are, and which a principal has."""

from collections.abc import Awaitable, Callable, Sequence

import anyio

from kimera_stream.core.interfaces import Vector
from kimera_stream.protocol.objects import Watch


class WatchList:
    """Args: read: all watches, from the database."""

    def __init__(self, read: Callable[[], Awaitable[Sequence[tuple[Watch, Vector | None]]]]) -> None:
        self._read = read
        self._watches: dict[str, Watch] = {}
        self._stale = anyio.Event()
        self._reading = anyio.Lock()
        self._begun = self._done = 0

    def __len__(self) -> int:
        return len(self._watches)

    async def load(self) -> None:
        """Read them again, one reading after the other: who waits meanwhile shares the next one.

        Raises:
            UnavailableError: the database cannot be read.
        """
        wanted = self._begun + 1
        async with self._reading:
            if self._done < wanted:
                self._begun += 1
                self._watches = {watch.id: watch for watch, _ in await self._read()}
                self._done = self._begun

    def stale(self) -> None:
        """They may have changed: ``turned_stale`` ends."""
        self._stale.set()

    async def turned_stale(self) -> None:
        """Wait until they may have changed."""
        await self._stale.wait()
        self._stale = anyio.Event()

    def add(self, watch: Watch) -> None:
        """One that was just made or replaced."""
        self._watches[watch.id] = watch

    def remove(self, principal: str, name: str) -> None:
        """One that was just ended."""
        self._watches = {
            watch.id: watch for watch in self._watches.values() if (watch.principal, watch.watch) != (principal, name)
        }

    def owner(self, watch_id: str) -> str | None:
        """The principal whose watch it is, as far as known."""
        watch = self._watches.get(watch_id)
        return None if watch is None else watch.principal

    def of(self, principal: str) -> list[Watch]:
        """The watches of one principal."""
        return [watch for watch in self._watches.values() if watch.principal == principal]
