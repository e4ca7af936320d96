"""Recently used geoids, decoded, in front of the vault: bounded in bytes, and never older than the last commit."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import msgspec

from kimera_stream.core.interfaces import StoredGeoid

ENTRY_OVERHEAD = 1_500
"""Bytes of objects around a small geoid's strings (measured)."""


class GeoidSource(Protocol):
    """What the cache asks of the vault."""

    async def geoids(self, ids: Sequence[str]) -> dict[str, StoredGeoid]: ...


class GeoidCache:
    """Least-recently-used cache of stored geoids.

    The one writer calls ``put`` and ``remove`` right after each commit. A load that was under way at that moment may
    have read the older version: what was written meanwhile is not overwritten by it. Where there are several writers, each of
    them follows the log (``follow``), and what it commits itself comes by ``committed``: late, perhaps, so that a load may as well
    have read a newer version than what it is told. Of two versions the one with the greater offset counts.

    Args:
        source: Where missing ones are read from.
        max_bytes: Bound, by estimate of what an entry takes.
    """

    def __init__(self, source: GeoidSource, max_bytes: int) -> None:
        self._source = source
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, tuple[StoredGeoid, int]] = OrderedDict()
        self._loading: list[dict[str, tuple[int, StoredGeoid | None]]] = []
        """Of each load under way, what was written since it began, and at which offset; None: deleted."""
        self._followed = 0
        self.bytes = 0
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        return len(self._entries)

    async def get_many(self, ids: Sequence[str], *, keep: bool = True) -> Mapping[str, StoredGeoid]:
        """Those of ``ids`` that exist. ``keep``: False leaves in the cache what is there, for who reads much and once."""
        found: dict[str, StoredGeoid] = {}
        missing: list[str] = []
        for each in dict.fromkeys(ids):
            entry = self._entries.get(each)
            if entry is None:
                missing.append(each)
            else:
                if keep:
                    self._entries.move_to_end(each)
                found[each] = entry[0]
        self.hits += len(found)
        if not missing:
            return found
        self.misses += len(missing)
        written: dict[str, tuple[int, StoredGeoid | None]] = {}
        self._loading.append(written)
        try:
            loaded = await self._source.geoids(missing)
        finally:
            self._loading = [each for each in self._loading if each is not written]
        for geoid_id, stored in loaded.items():
            found[geoid_id] = stored
            if keep and (geoid_id not in written or written[geoid_id][0] < stored.geoid.offset):
                self._keep(stored)
        for geoid_id in set(ids) & written.keys():  # those that were there before may be outdated as well by now
            offset, newer = written[geoid_id]
            known = found.get(geoid_id)
            if known is not None and known.geoid.offset > offset:
                continue
            if newer is not None:
                found[geoid_id] = newer
            else:
                found.pop(geoid_id, None)
        return found

    async def get(self, geoid_id: str) -> StoredGeoid | None:
        """One of them, or None."""
        return (await self.get_many([geoid_id])).get(geoid_id)

    def put(self, stored: StoredGeoid) -> None:
        """A geoid was committed in this version."""
        self._tell(stored.geoid.id, stored.geoid.offset, stored)
        self._keep(stored)

    def committed(self, geoids: Iterable[StoredGeoid], deleted: Iterable[tuple[str, int]]) -> None:
        """One of several writers has committed this. Where the log was followed beyond it, it may hear of its own commit after
        what others have made of it since: that is passed over.

        Args:
            deleted: Ids, and the offsets of their deletion.
        """
        for stored in geoids:
            if stored.geoid.offset > self._followed:
                self.put(stored)
        for geoid_id, offset in deleted:
            if offset > self._followed:
                self.remove(geoid_id, offset)

    def follow(self, upto: int, newest: Iterable[StoredGeoid], gone: Iterable[str]) -> None:
        """The log was read up to ``upto``; of what it tells of, this is there now, in this version, and that is not."""
        for stored in newest:
            self.put(stored)
        for geoid_id in gone:
            self.remove(geoid_id, upto)
        self._followed = max(self._followed, upto)

    def expect(self, geoid_id: str, offset: int) -> None:
        """The log tells of a version at ``offset``, which another node may have committed: an older one is forgotten."""
        entry = self._entries.get(geoid_id)
        if entry is not None and entry[0].geoid.offset < offset:
            self.forget(geoid_id)

    def forget(self, geoid_id: str) -> None:
        """What is kept of a geoid may be outdated. Unlike ``remove`` this says nothing about whether it is still there."""
        entry = self._entries.pop(geoid_id, None)
        if entry is not None:
            self.bytes -= entry[1]

    def remove(self, geoid_id: str, offset: int) -> None:
        """A geoid was deleted. ``offset``: after it, it may be there again."""
        self._tell(geoid_id, offset, None)
        self.forget(geoid_id)

    def clear(self) -> None:
        """Keep nothing; loads that are under way go on."""
        self._entries.clear()
        self.bytes = 0

    def _tell(self, geoid_id: str, offset: int, stored: StoredGeoid | None) -> None:
        """Have the loads under way know what was written."""
        for written in self._loading:
            if geoid_id not in written or written[geoid_id][0] <= offset:
                written[geoid_id] = (offset, stored)

    def _keep(self, stored: StoredGeoid) -> None:
        geoid = stored.geoid
        old = self._entries.get(geoid.id)
        if old is not None:
            if old[0].geoid.offset > geoid.offset:
                return
            self.forget(geoid.id)
        cost = ENTRY_OVERHEAD + 3 * len(geoid.text or "") + (0 if stored.vector is None else stored.vector.nbytes)
        for state in (geoid.semantic_state, geoid.symbolic_state, geoid.metadata):
            if state:
                cost += 4 * len(msgspec.json.encode(state))
        self._entries[geoid.id] = (stored, cost)
        self.bytes += cost
        while self.bytes > self._max_bytes and len(self._entries) > 1:
            _, (_, freed) = self._entries.popitem(last=False)
            self.bytes -= freed
