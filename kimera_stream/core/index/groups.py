"""Groups of geoids that are compared only among themselves: a number per slot, out of which a scan makes its mask.

The kernel looks at the rows whose live bit is set. A scan for one group clears the bits of all others, so its result is the exact
top k of the group, and it costs little more than reading the group's own rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import blake2b

import numpy as np

from kimera_stream.core.groups import Within, group_of
from kimera_stream.core.index.probe import Scope
from kimera_stream.core.index.storage import CHUNK_ROWS
from kimera_stream.core.interfaces import StoredGeoid
from kimera_stream.kernels import Hits, Queries, Weights
from kimera_stream.kernels.layout import U64

Scan = Callable[[Scope, Queries, Weights, int], Hits]


def number_of(group: str | None) -> int:
    """64 bits that stand for a group: two of a million groups share them once in 37 million stores."""
    return 0 if group is None else int.from_bytes(blake2b(group.encode(), digest_size=8).digest(), "little") | 1


class Groups:
    """The group of each slot. Written on the event loop; scans hold the array as it was when they began.

    Args:
        within: What makes a group; ``all``: nothing is noted.
    """

    def __init__(self, within: Within) -> None:
        self._within = within
        self._numbers = np.zeros(0, np.uint64)

    @property
    def bytes(self) -> int:
        return self._numbers.nbytes

    @property
    def numbers(self) -> U64:
        """uint64 (slots,). What a scan can see of it is not written before the scan ends."""
        return self._numbers

    def put(self, slot: int, stored: StoredGeoid) -> None:
        """A geoid is in a slot."""
        if self._within != "all":
            self.note(slot, group_of(stored, self._within))

    def wanted(self, queries: Sequence[StoredGeoid]) -> list[int] | None:
        """The group of each query; None where all are compared with all."""
        if self._within == "all":
            return None
        return [number_of(group_of(query, self._within)) for query in queries]

    def note(self, slot: int, group: str | None) -> None:
        """The geoid in a slot belongs to a group."""
        if slot >= len(self._numbers):
            wanted = max(2 * len(self._numbers), (slot // CHUNK_ROWS + 1) * CHUNK_ROWS)
            grown = np.zeros(wanted, np.uint64)
            grown[: len(self._numbers)] = self._numbers
            self._numbers = grown
        self._numbers[slot] = number_of(group)


def scan_groups(
    scan: Scan, scope: Scope, numbers: U64, wanted: Sequence[int], block: Queries, weights: Weights, k: int
) -> Hits:
    """Each query among the rows of its own group alone. Blocking: for a worker thread.

    Args:
        scan: What scans all rows that ``scope`` sees.
        numbers: The group of each slot.
        wanted: The group of each query.
    """
    members: dict[int, list[int]] = {}
    for query, number in enumerate(wanted):
        members.setdefault(number, []).append(query)
    hits = Hits.empty(len(block), k)
    for number, queries in members.items():
        own = replace(scope, live=scope.live & _mask(numbers, number, len(scope.live)))
        if own.live.any():
            found = scan(own, block.chosen(np.array(queries)), weights, k)
            for place, query in enumerate(queries):
                hits.take(query, found.only(place))
    return hits


def _mask(numbers: U64, number: int, words: int) -> U64:
    """Bit per slot: whether it is of this group."""
    same = np.zeros(64 * words, np.bool_)
    known = min(len(numbers), len(same))
    np.equal(numbers[:known], np.uint64(number), out=same[:known])
    mask: U64 = np.packbits(same, bitorder="little").view(np.uint64)
    return mask
