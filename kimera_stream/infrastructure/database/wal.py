"""SQLite's write-ahead log after a crash: is what cannot be read of it a write that was interrupted, or one that had been synced?

SQLite reads the frames up to the first one whose checksum is wrong and drops the rest, which is right where a power cut tore the
last transaction, and loses committed ones without a word where a bit flipped in an earlier one. The two can be told apart: every
commit is synced before the next transaction begins, so that behind the place where an interrupted write is torn no two commits can
follow that belong together. What belongs together is known from the checksums, which are cumulative: a frame's is computed from
the one before it, whether or not that one is whole.

A last transaction that is damaged cannot be told from one that was interrupted.
"""

from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from kimera_stream.protocol.errors import UnavailableError

_HEADER: Final = 32
_FRAME_HEADER: Final = 24
_MAGIC_LITTLE: Final = 0x377F0682
_MAGIC_BIG: Final = 0x377F0683

Words = npt.NDArray[np.uint32]


def refuse_damaged_wal(database: str) -> None:
    """Look at the write-ahead log beside ``database``, if there is one, before anything opens it: opening it drops what is damaged.

    Raises:
        UnavailableError: committed transactions in it cannot be read.
        OSError: it cannot be read at all.
    """
    path = Path(f"{database}-wal")
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER)
    except FileNotFoundError:
        return
    lost = _lost_commits(str(path), header)
    if lost:
        raise UnavailableError(
            f"{path.name} is damaged: {lost} committed transactions in it cannot be read; restore a backup, "
            f"or move {path.name} away to go on without what it holds"
        )


@lru_cache(maxsize=16)
def _lost_commits(path: str, header: bytes) -> int:
    """Commits that were synced and that SQLite would drop. Looked at once for each header: it changes with each new beginning."""
    with Path(path).open("rb") as file:
        content = file.read()
        file.seek(0)
        if file.read(_HEADER) != content[:_HEADER]:
            return 0  # in use, and just now begun anew
    return lost_commits(content)


def lost_commits(content: bytes) -> int:
    """Of a write-ahead log: the commits behind its first damaged frame that must have been synced; 0 if it is as a crash may leave it."""
    if len(content) < _HEADER or int.from_bytes(content[:4], "big") not in (_MAGIC_LITTLE, _MAGIC_BIG):
        return 0
    page = int.from_bytes(content[8:12], "big")
    size = _FRAME_HEADER + page
    count = (len(content) - _HEADER) // size
    if page < 512 or page % 8 or not count:
        return 0
    frames = np.frombuffer(content, dtype=np.uint8, count=count * size, offset=_HEADER).reshape(count, size)
    heads = np.ascontiguousarray(frames[:, :_FRAME_HEADER]).view(">u4").astype(np.uint32)
    salts = np.frombuffer(content, dtype=">u4", count=2, offset=16).astype(np.uint32)
    # A frame of an earlier beginning has another salt; one whose salt was hit still holds the checksum of the next.
    ours = np.flatnonzero((heads[:, 2:4] == salts).any(axis=1))
    if not ours.size:
        return 0
    count = int(ours[-1]) + 1
    linked = _linked(frames[:count], heads[:count], content, page)
    linked &= (heads[:count, 2:4] == salts).all(axis=1)  # which no checksum covers, and SQLite asks for
    broken = np.flatnonzero(~linked)
    if not broken.size:
        return 0
    commits = heads[:count, 1] != 0
    most = 0
    for begin, end in zip(broken, [*broken[1:], count], strict=True):
        most = max(most, int(commits[begin:end].sum()))
    return most if most > 1 else 0


def _linked(frames: npt.NDArray[np.uint8], heads: Words, content: bytes, page: int) -> npt.NDArray[np.bool_]:
    """For each frame whether its checksum follows from the one before it, as that is stored or as it should be."""
    order = "<u4" if int.from_bytes(content[:4], "big") == _MAGIC_LITTLE else ">u4"
    first = np.frombuffer(content, dtype=">u4", count=2, offset=24).astype(np.uint32)
    before = np.vstack([first[None, :], heads[:-1, 4:6]])
    carry, weights = _weights((8 + page) // 8)
    sums = before @ carry.T
    step = 2_048
    for begin in range(0, len(frames), step):
        part = frames[begin : begin + step]
        words = np.concatenate([part[:, :8], part[:, _FRAME_HEADER:]], axis=1).view(order).astype(np.uint32)
        sums[begin : begin + step] += words @ weights
    found: npt.NDArray[np.bool_] = (sums == heads[:, 4:6]).all(axis=1)
    # Where it is the stored checksum itself that is damaged, the next frame follows from what it should be.
    suspects = np.flatnonzero(~found[1:] & ~found[:-1]) + 1
    found[suspects] = (
        sums[suspects] + (sums[suspects - 1] - heads[suspects - 1, 4:6]) @ carry.T == heads[suspects, 4:6]
    ).all(axis=1)
    return found


@lru_cache(maxsize=4)
def _weights(pairs: int) -> tuple[Words, Words]:
    """SQLite's checksum as sums with weights, modulo 2 to the 32.

    Of each pair of words x, y it computes ``s += x + t; t += y + s``: linear in both, so that after n pairs (s, t) is
    carry @ (s, t) + the words weighted.

    Returns:
        carry, shape (2, 2), and weights, shape (2 * pairs, 2).
    """
    weights = np.empty((2 * pairs, 2), dtype=np.uint32)
    power = np.eye(2, dtype=np.uint32)
    step = np.array([[1, 1], [1, 2]], dtype=np.uint32)
    of_x, of_y = np.array([1, 1], dtype=np.uint32), np.array([0, 1], dtype=np.uint32)
    for pair in range(pairs - 1, -1, -1):
        weights[2 * pair] = power @ of_x
        weights[2 * pair + 1] = power @ of_y
        power = power @ step
    return power, weights
