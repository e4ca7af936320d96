"""What a scorer takes for stored: no older than the entries that it has read, whenever it hears of what its own engine committed."""

from collections.abc import Sequence

import anyio
import msgspec
import pytest

from kimera_stream.core.geoid import built
from kimera_stream.core.geoid_cache import GeoidCache
from kimera_stream.core.interfaces import LogPage, StoredGeoid
from kimera_stream.engines.cluster.pages import EVERYTHING, PageReader, ScoredPage
from kimera_stream.protocol.log import LogEntry
from kimera_stream.protocol.objects import GeoidBody

pytestmark = pytest.mark.anyio


def said(geoid_id: str, offset: int) -> StoredGeoid:
    body = GeoidBody(text="The door is open.")
    geoid = built(body, geoid_id=geoid_id, session_id=None, now=1, offset=offset, previous=None)
    return StoredGeoid(geoid, None, "p", 0, offset)


class Vault:
    """A log, and what is stored by now; reads of the latter wait for ``go_on``."""

    def __init__(self, types: Sequence[str], *stored: StoredGeoid) -> None:
        self.entries = [
            LogEntry(offset, type, 1, (), msgspec.Raw(b'{"id":"a"}')) for offset, type in enumerate(types, 1)
        ]
        self.stored = {each.geoid.id: each for each in stored}
        self.reading, self.go_on = anyio.Event(), anyio.Event()

    async def read(
        self, channel: str | None, *, after: int, limit: int, until: int | None = None, reverse: bool = False
    ) -> LogPage:
        return LogPage(self.entries, len(self.entries), more=False)

    async def geoids(self, ids: Sequence[str]) -> dict[str, StoredGeoid]:
        found = {each: self.stored[each] for each in ids if each in self.stored}
        self.reading.set()
        await self.go_on.wait()
        return found


@pytest.mark.parametrize("heard", ["while it reads", "after it has read"])
async def test_what_another_engine_has_deleted_since_is_gone(heard: str) -> None:
    vault = Vault(["geoid.created", "geoid.deleted"])
    cache = GeoidCache(vault, 1_000_000)
    pages: list[ScoredPage] = []

    async def read() -> None:
        pages.append(await PageReader(vault, cache).read(0, EVERYTHING))

    async with anyio.create_task_group() as group:
        group.start_soon(read)
        await vault.reading.wait()
        if heard == "while it reads":
            cache.committed([said("a", 1)], [])
        vault.go_on.set()
    if heard == "after it has read":
        cache.committed([said("a", 1)], [])
    (page,) = pages
    assert (page.upto, page.gone, page.newest, page.fresh) == (2, ["a"], {}, [])
    assert await cache.get("a") is None


async def test_what_another_engine_has_said_since_is_what_stands() -> None:
    vault = Vault(["geoid.created", "geoid.updated"], said("a", 2))
    vault.go_on.set()
    cache = GeoidCache(vault, 1_000_000)
    cache.committed([said("a", 1)], [])
    page = await PageReader(vault, cache).read(0, EVERYTHING)
    assert ([each.geoid.offset for each in page.fresh], page.gone) == ([2], [])
