"""The backend in C: arrays in, arrays out. Imports only where the extension was built."""

from collections.abc import Sequence

import numpy as np

from kimera_stream.kernels import _kernel
from kimera_stream.kernels.layout import F32, I64, U8, U64, Hits, Queries, Segment, Weights, stride_of
from kimera_stream.kernels.sieving import Sieve


class Compiled:
    """One instruction-set variant and its threads. Safe to share between threads."""

    def __init__(self, variant: str | None, threads: int) -> None:
        self._backend = _kernel.Backend(variant, threads)
        self.variant = self._backend.variant
        self.threads = self._backend.threads

    def view(self, segments: Sequence[Segment]) -> _kernel.View:
        return _kernel.View(segments)

    def scan(
        self,
        view: _kernel.View,
        live: U64,
        queries: Queries,
        weights: Weights,
        *,
        k: int,
        margin: float,
        rescore: bool,
        select: U8 | None,
    ) -> Hits:
        hits = Hits.empty(len(queries), k)
        self._backend.scan(
            view,
            live,
            queries.vectors,
            queries.has_vector,
            queries.text,
            queries.keys,
            queries.subjects,
            queries.layers,
            queries.record,
            queries.pool,
            queries.exclude,
            weights,
            stride_of(queries.dim),
            margin,
            rescore,
            select,
            hits.slots,
            hits.fused,
            hits.cosine,
            hits.opposed,
            hits.counts,
        )
        return hits

    def sift(
        self,
        view: _kernel.View,
        live: U64,
        queries: Queries,
        weights: Weights,
        sieve: Sieve,
        *,
        k: int,
        row_slack: float,
        cell_slack: float,
        margin: float,
        rescore: bool,
    ) -> tuple[Hits, I64]:
        hits, read = Hits.empty(len(queries), k), np.zeros(len(queries), np.int64)
        codes, steps, rest = sieve.ask(queries.vectors)
        self._backend.sift(
            view,
            live,
            queries.vectors,
            queries.has_vector,
            queries.text,
            queries.exclude,
            codes,
            steps,
            rest,
            sieve.centres,
            sieve.spread,
            sieve.kinds,
            sieve.starts,
            sieve.codes,
            sieve.rest,
            sieve.slots,
            weights,
            stride_of(queries.dim),
            margin,
            row_slack,
            cell_slack,
            rescore,
            hits.slots,
            hits.fused,
            hits.cosine,
            hits.counts,
            read,
        )
        return hits, read

    def pair_head(self, query: F32, rows: F32, extra: F32, w1: F32, b1: F32, w2: F32, b2: float) -> F32:
        out = np.empty(len(rows), np.float32)
        self._backend.pair_head(query, rows, extra, w1, b1, w2, b2, out)
        return out

    def match(self, vector: F32, rows: F32, thresholds: F32) -> tuple[I64, F32]:
        indices, cosines = np.empty(len(rows), np.int64), np.empty(len(rows), np.float32)
        found = self._backend.match(vector, rows, thresholds, indices, cosines)
        return indices[:found], cosines[:found]
