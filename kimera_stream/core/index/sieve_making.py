"""Making a sieve of what a scope sees, step by step in worker threads, and calibrating it with stored statements."""

from collections.abc import Sequence
from functools import partial

from kimera_stream.core.index.probe import Scope
from kimera_stream.core.index.sieve import begin, filled, kept, sample_size
from kimera_stream.core.index.sieve_rows import coded, sample_of
from kimera_stream.core.index.sifting import Sifted, calibrate
from kimera_stream.core.index.storage import Chunk
from kimera_stream.core.interfaces import Threads
from kimera_stream.kernels import Queries, Weights
from kimera_stream.kernels.layout import U64

_CHECKED = 128
"""Stored statements that a new sieve is calibrated with."""
_CHUNKS_AT_ONCE = 8


async def sieve_of(
    scope: Scope,
    chunks: Sequence[Chunk],
    size: int,
    *,
    former: Sifted | None,
    fresh: U64 | None,
    threads: Threads,
    weights: Weights,
    k: int,
) -> Sifted | None:
    """A sieve of the live rows, or None where there are too few for one.

    Args:
        scope: What is seen, while it is pinned.
        chunks: Those with vectors.
        size: Geoids there are.
        former: The last one. Its rows go into the new one as they are, unless there are twice as many as it was made for.
        fresh: Bits of the slots written since then.
        threads: Where the work is done.
        weights, k: What it is calibrated for.
    """
    if former is not None and fresh is not None and size < 2 * former.trained:
        sieve, trained = former.sieve, former.trained
        parts = [await threads.run("io", kept, sieve, scope.live & ~fresh)]
        left = scope.live & fresh
    else:
        sample = await threads.run("io", sample_of, chunks, scope.live, sample_size(size))
        if len(sample.slots) < 2:
            return None
        trained = size
        sieve = await threads.run("io", partial(begin, sample, trained))
        parts, left = [], scope.live
    for start in range(0, len(chunks), _CHUNKS_AT_ONCE):
        parts += await threads.run("io", coded, sieve, chunks[start : start + _CHUNKS_AT_ONCE], left)
    sieve = await threads.run("io", filled, sieve, parts)
    rows = sum(len(part.slots) for part in parts)
    queries = await threads.run("io", sample_of, chunks, scope.live, _CHECKED)
    block = Queries.build(queries.vectors, text=queries.text.tolist(), exclude=queries.slots.tolist())
    return await threads.run("score", calibrate, scope, sieve, rows, trained, block, weights, k)
