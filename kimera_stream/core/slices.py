"""Slices: the fixed parts that the geoids (and the lanes of the intake) fall into, and which engine should own which."""

from collections.abc import Iterable
from hashlib import blake2b


def slice_of(name: str, slices: int) -> int:
    """Number of the slice that a geoid's id belongs to, 0 to ``slices - 1``: the same on every node, for ever."""
    return int.from_bytes(blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") % slices


def lane_slice(principal: str, session_id: str | None, slices: int) -> int:
    """Number of the intake partition of a lane: everything of one session goes through one partition, in order."""
    return slice_of(f"{principal}\x1f{session_id or ''}", slices)


def shares(nodes: Iterable[str], slices: int) -> dict[str, frozenset[int]]:
    """Which slices each node should own: rendezvous hashing, with no node above its even share.

    Every node comes to the same answer by itself. A node that joins or leaves moves few slices besides its own.
    """
    names = sorted(set(nodes))
    if not names:
        return {}
    most = -(-slices // len(names))
    given: dict[str, set[int]] = {name: set() for name in names}
    for number in range(slices):
        wishes = sorted(names, key=lambda name: (_weight(name, number), name), reverse=True)
        owner = next(name for name in wishes if len(given[name]) < most)
        given[owner].add(number)
    return {name: frozenset(numbers) for name, numbers in given.items()}


def _weight(name: str, number: int) -> bytes:
    return blake2b(f"{number}\x1f{name}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
