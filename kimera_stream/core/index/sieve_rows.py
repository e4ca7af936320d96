"""Rows of the index as a sieve is made from them. In worker threads: a scope's pin keeps them as they are."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kimera_stream.core.index.sieve import Coded, Rows, code
from kimera_stream.core.index.storage import CHUNK_ROWS, Chunk
from kimera_stream.kernels import Sieve
from kimera_stream.kernels.layout import U64


def _live_rows(chunk: Chunk, live: U64) -> npt.NDArray[np.int64]:
    words = live[chunk.base // 64 : (chunk.base + CHUNK_ROWS) // 64]
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))


def _rows_of(chunk: Chunk, rows: npt.NDArray[np.int64]) -> Rows:
    assert chunk.exact is not None
    return Rows(chunk.exact[rows], chunk.text[rows], rows + chunk.base)


def sample_of(chunks: Sequence[Chunk], live: U64, count: int) -> Rows:
    """Some of the live rows, at random. In a worker thread: the scope's pin keeps them as they are."""
    rng = np.random.default_rng(0)
    counts = np.array([len(_live_rows(chunk, live)) for chunk in chunks])
    chosen = np.sort(rng.choice(int(counts.sum()), min(count, int(counts.sum())), replace=False))
    starts = np.cumsum(counts) - counts
    parts = []
    for i, chunk in enumerate(chunks):
        own = chosen[(chosen >= starts[i]) & (chosen < starts[i] + counts[i])] - starts[i]
        if len(own):
            parts.append(_rows_of(chunk, _live_rows(chunk, live)[own]))
    if not parts:
        return Rows(np.zeros((0, 1), np.float32), np.zeros(0, np.uint32), np.zeros(0, np.int64))
    order = rng.permutation(len(chosen))
    return Rows(
        np.concatenate([part.vectors for part in parts])[order],
        np.concatenate([part.text for part in parts])[order],
        np.concatenate([part.slots for part in parts])[order],
    )


def coded(sieve: Sieve, chunks: Sequence[Chunk], live: U64) -> list[Coded]:
    found = [(chunk, _live_rows(chunk, live)) for chunk in chunks]
    return [code(sieve, _rows_of(chunk, rows)) for chunk, rows in found if len(rows)]
