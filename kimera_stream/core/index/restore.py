"""Filling the index, and what follows the log with it: everything from the vault, or the tail of the log after a snapshot."""

from collections.abc import AsyncIterator, Callable, Sequence

import anyio.lowlevel
import msgspec
import numpy as np

from kimera_stream.core.ahead import ahead
from kimera_stream.core.columns import GeoidColumns
from kimera_stream.core.index.flat import FlatIndex
from kimera_stream.core.index.rows import columns_of
from kimera_stream.core.interfaces import LogFollower, VaultService
from kimera_stream.protocol.log import LogEntry
from kimera_stream.protocol.objects import Contradiction

Progress = Callable[[str], None]

_PAGE = 1_000


class _Named(msgspec.Struct):
    """Of a geoid's event, who it is about."""

    id: str


_geoid_id = msgspec.json.Decoder(_Named).decode
_contradiction = msgspec.json.Decoder(Contradiction).decode


async def rebuild(index: FlatIndex, follower: LogFollower, vault: VaultService, progress: Progress) -> int:
    """Take in every geoid and every open contradiction of the vault; returns how many geoids.

    Raises:
        LimitExceededError: there are more geoids than the index may hold, and its policy is to refuse.
        UnavailableError: the vault cannot be read.
    """
    total, done = await vault.count_geoids(), 0

    async def take_in(batch: GeoidColumns) -> bool:
        nonlocal done
        await _take_in(index, follower, batch)
        done += len(batch)
        progress(f"{done:,} of {total:,} geoids")
        return True

    await ahead(vault.scan_columns(batch=_PAGE, dimension=index.dimension), take_in)
    after: int | None = 0
    while after is not None:
        page = await vault.list_contradictions(after=after, limit=_PAGE, state="open")
        follower.restore_contradictions(page.items)
        after = page.next
    return done


async def replay(index: FlatIndex, follower: LogFollower, vault: VaultService, after: int, progress: Progress) -> int:
    """Take in what the log holds after an offset, geoids as the vault has them now; returns how many entries.

    Raises:
        as ``rebuild``.
    """
    done = 0
    while True:
        page = await vault.read(None, after=after, limit=_PAGE)
        geoids, contradictions = _touched(page.entries)
        current = await vault.geoids(geoids)
        await _take_in(index, follower, columns_of(list(current.values()), index.dimension))
        for geoid_id in geoids:
            if geoid_id not in current:
                index.remove(geoid_id)
                follower.forget(geoid_id)
        follower.restore_contradictions(contradictions)
        done += len(page.entries)
        after = page.scanned
        if not page.more:
            return done
        progress(f"{done:,} entries of the log")


async def regroup(index: FlatIndex, pages: AsyncIterator[Sequence[tuple[str, str | None]]]) -> None:
    """Tell the index the group of each geoid (id, group): neither snapshots nor columns hold it."""
    async for page in pages:
        for geoid_id, group in page:
            index.set_group(geoid_id, group)
        await anyio.lowlevel.checkpoint()


def _touched(entries: Sequence[LogEntry]) -> tuple[list[str], list[Contradiction]]:
    """The geoids and, in their newest state, the contradictions that entries tell of."""
    geoids: dict[str, None] = {}
    contradictions: dict[str, Contradiction] = {}
    for entry in entries:
        if entry.type.startswith("geoid."):
            geoids[_geoid_id(entry.data).id] = None
        elif entry.type.startswith("contradiction."):
            found = _contradiction(entry.data)
            contradictions[found.id] = found
    return list(geoids), list(contradictions.values())


async def _take_in(index: FlatIndex, follower: LogFollower, batch: GeoidColumns) -> None:
    await index.reserve(len(batch))
    await anyio.lowlevel.checkpoint()  # /readyz and the others that start have their turn
    index.put_many(batch)
    held = np.array([geoid_id in index for geoid_id in batch.ids], np.bool_)
    await anyio.lowlevel.checkpoint()
    follower.restore(batch if held.all() else batch.kept(held))  # else some were evicted by the others
