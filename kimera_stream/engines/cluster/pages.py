"""Pages of the log as a scorer reads them: with what is stored now of the geoids that they tell of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from kimera_stream.core.geoid_cache import GeoidCache
from kimera_stream.core.interfaces import LogReader, StoredGeoid
from kimera_stream.protocol.log import LogEntry

PAGE = 128
"""Entries in one page: one step of the scorer."""
EVERYTHING = 2**62
"""As far as the log goes, of which this node may not have heard."""


class _Named(msgspec.Struct):
    id: str


_named = msgspec.json.Decoder(_Named).decode


@dataclass(frozen=True, slots=True)
class ScoredPage:
    """Entries ``after`` to ``upto`` of the log, and what is stored now of the geoids they tell of.

    Attributes:
        touched: Newest entry in the page by geoid.
        fresh: Statements that an entry of the page made and that still stand, in order.
        gone: Geoids that are not there any more.
    """

    after: int
    upto: int
    entries: Sequence[LogEntry]
    touched: Mapping[str, int]
    newest: Mapping[str, StoredGeoid]
    fresh: Sequence[StoredGeoid]
    gone: Sequence[str]


class PageReader:
    """Reads pages, and keeps the cache from being older than what was read."""

    def __init__(self, log: LogReader, cache: GeoidCache) -> None:
        self._log = log
        self._cache = cache

    async def read(self, after: int, until: int) -> ScoredPage:
        """The next entries after ``after``, up to ``until`` at most.

        Raises:
            UnavailableError: the vault cannot be read.
        """
        page = await self._log.read(None, after=after, limit=PAGE, until=until)
        upto = page.scanned
        touched: dict[str, int] = {}
        for entry in page.entries:
            if entry.type.startswith("geoid."):
                touched[_named(entry.data).id] = entry.offset
        for geoid_id, offset in touched.items():
            self._cache.expect(geoid_id, offset)
        found = await self._cache.get_many(list(touched)) if touched else {}
        # Older than its entry is only what this node has committed itself and heard of while it read, and what is gone since.
        newest = {geoid_id: each for geoid_id, each in found.items() if each.geoid.offset >= touched[geoid_id]}
        gone = [geoid_id for geoid_id in touched if geoid_id not in newest]
        self._cache.follow(upto, newest.values(), gone)  # whoever was loading an older one meanwhile does not keep it
        offsets = range(after + 1, upto + 1)
        fresh = sorted((each for each in newest.values() if each.stated in offsets), key=lambda each: each.stated)
        return ScoredPage(after, upto, page.entries, touched, newest, fresh, gone)
