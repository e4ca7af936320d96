"""Scanning through a sieve: what it may be asked, how far it is to be trusted, and how good its answers were.

The sieve is of a moment. Rows written since are scanned exactly and merged in; once they are many they go into a new sieve.
How much a bound may leave out is found by comparing with exact scans when a sieve is made, and from then on one query in
``CHECK_EVERY`` is also scanned exactly: where recall falls short the slacks grow, and beyond ``SLACKEST`` every scan is exact.

An exact pass reads each row once for up to 32 queries, a sieve asks for each query by itself: which is sooner for a block depends
on its size, on the rows and on the processor, and is measured when a sieve is made.
"""

import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from kimera_stream.core.index.probe import Scope, more_than, scan_rows
from kimera_stream.core.index.sieve import positions
from kimera_stream.kernels import Hits, Queries, Sieve, Weights
from kimera_stream.kernels.layout import F32, U64
from kimera_stream.kernels.sieving import LANES, most_lifts, scaled

TARGET_RECALL = 0.99
"""Of the exact result, measured; below it the slacks grow."""
CHECK_EVERY = 64
"""One query in so many is also scanned exactly."""
CHECKS = 64
"""Checks that the recall is the mean of."""
SLACKEST = 0.9
"""Slack of rows from which a sieve lets through too much to be worth asking."""
_ENOUGH_CHECKS = 8
_CALIBRATED = 0.996
_GROWTH = 1.05
BLOCKS = (4, 8, 16, 32)
"""Queries of the blocks with which both ways are timed."""
_TIMED = 3
MOST = 512
"""Hits per query for which a sieve is asked: it has been calibrated with fewer."""


@dataclass(slots=True, eq=False)
class Sifted:
    """A sieve in use.

    Attributes:
        sieve: Short codes of the rows.
        rows: Rows in it when it was made.
        trained: Rows there were when its cells were found.
        row_slack, cell_slack: See ``Kernel.sift``.
        largest: Queries up to which a block goes through it; more are sooner scanned exactly, in one pass.
    """

    sieve: Sieve
    rows: int
    trained: int
    row_slack: float
    cell_slack: float
    largest: int = sys.maxsize
    queries: int = 0
    read: int = 0
    """Rows read in full, over all queries."""
    _recalls: deque[float] = field(default_factory=lambda: deque(maxlen=CHECKS))

    @property
    def recall(self) -> float | None:
        """Mean over the queries last checked; None before the first."""
        return sum(self._recalls) / len(self._recalls) if self._recalls else None

    @property
    def is_trusted(self) -> bool:
        """Whether scans go through it."""
        return self.row_slack < SLACKEST

    def answers(self, queries: int, k: int) -> bool:
        """Whether a scan for so many queries and hits goes through it."""
        return self.is_trusted and queries <= self.largest and k <= MOST

    def due(self, queries: int) -> list[int]:
        """Which of the next so many queries are to be checked."""
        before, self.queries = self.queries, self.queries + queries
        return [i for i in range(queries) if (before + i) % CHECK_EVERY == CHECK_EVERY - 1]

    def measured(self, recall: float) -> bool:
        """Note the recall of one query; returns whether more is let through from now on."""
        self._recalls.append(recall)
        mean = self.recall
        if mean is None or mean >= TARGET_RECALL or len(self._recalls) < _ENOUGH_CHECKS:
            return False
        self.loosen()
        self._recalls.clear()
        return True

    def loosen(self) -> None:
        """Let more through."""
        self.row_slack *= _GROWTH
        self.cell_slack *= _GROWTH


def sift_rows(scope: Scope, sifted: Sifted, fresh: U64, block: Queries, weights: Weights, k: int) -> tuple[Hits, int]:
    """The same from a part of the rows: what the sieve lets through, all rows written since, and all oppositions.

    Args:
        fresh: Bit per slot: rows written since the sieve was made.

    Returns:
        The hits, and how many rows the sieve had read in full.
    """
    old = replace(scope, live=scope.live & ~fresh)
    parts = []
    hits, read = scope.kernel.sift(
        scope.view, old.live, block, weights, sifted.sieve, k=more_than(k), row_slack=sifted.row_slack,
        cell_slack=sifted.cell_slack, margin=scope.margin, rescore=True,
    )  # fmt: skip
    parts.append(hits)
    recent = scope.live & fresh
    if recent.any():
        parts.append(scan_rows(replace(scope, live=recent), block, weights, k))
    if block.keys.any():
        parts.append(scan_rows(old, block, weights, k, np.full(scope.view.count, 2, np.uint8)))
    return (
        (merged(parts, k), int(read.sum()))
        if len(parts) > 1
        else (replace(hits, counts=np.minimum(hits.counts, k)), int(read.sum()))
    )


def sift_and_check(
    scope: Scope, sifted: Sifted, fresh: U64, block: Queries, weights: Weights, k: int, due: list[int]
) -> tuple[Hits, int, list[float]]:
    """Through the sieve; the due queries are scanned exactly besides, to measure, and answered with that."""
    hits, read = sift_rows(scope, sifted, fresh, block, weights, k)
    recalls = []
    for i in due:
        exact = scan_rows(scope, block.only(i), weights, k)
        recalls.append(recall_of(hits.only(i), exact, 0))
        hits.take(i, exact)
    return hits, read, recalls


def merged(parts: list[Hits], k: int) -> Hits:
    """The k best per query of several scans. A row found twice counts once, with its higher score."""
    queries = len(parts[0].counts)
    result = Hits.empty(queries, k)
    for i in range(queries):
        slots, fused, cosine, opposed = (
            np.concatenate([getattr(part, name)[i, : int(part.counts[i])] for part in parts])
            for name in ("slots", "fused", "cosine", "opposed")
        )
        order = np.lexsort((slots, -fused))
        _, first = np.unique(slots[order], return_index=True)
        order = order[np.sort(first)][:k]
        n = len(order)
        result.slots[i, :n], result.fused[i, :n] = slots[order], fused[order]
        result.cosine[i, :n], result.opposed[i, :n], result.counts[i] = cosine[order], opposed[order], n
    return result


def recall_of(found: Hits, exact: Hits, query: int) -> float:
    """Share of a query's exact hits that were found; 1 where there are none."""
    wanted = set(exact.slots[query, : int(exact.counts[query])].tolist())
    got = set(found.slots[query, : int(found.counts[query])].tolist())
    return len(wanted & got) / len(wanted) if wanted else 1.0


def calibrate(scope: Scope, sieve: Sieve, rows: int, trained: int, block: Queries, weights: Weights, k: int) -> Sifted:
    """A sieve ready for use, with the least slacks by which these queries find what exact scans find.

    ``scope`` sees just the rows of the sieve. Blocking: for a worker thread.
    """
    exact = scan_rows(scope, block, weights, k)
    needs = _needs(sieve, block, weights, exact, k)
    slacks = [float(np.quantile(need, 0.99)) if len(need) else 0.3 for need in needs]
    sifted = Sifted(sieve, rows, trained, max(slacks[0], 0.2), max(slacks[1], 0.2))
    fresh = np.zeros_like(scope.live)
    while sifted.is_trusted:
        found, _ = sift_rows(scope, sifted, fresh, block, weights, k)
        if sum(recall_of(found, exact, i) for i in range(len(block))) >= _CALIBRATED * len(block):
            break
        sifted.loosen()
    sifted.largest = _largest(scope, sifted, block, weights, k)
    return sifted


def _largest(scope: Scope, sifted: Sifted, block: Queries, weights: Weights, k: int) -> int:
    """Queries up to which the sieve answers sooner than an exact pass; at least 1."""
    fresh, largest = np.zeros_like(scope.live), 1
    for size in BLOCKS:
        if size > len(block):
            return largest
        some = block.first(size)
        sieve = _seconds(partial(sift_rows, scope, sifted, fresh, some, weights, k))
        if sieve > _seconds(partial(scan_rows, scope, some, weights, k)):
            return largest
        largest = size
    return sys.maxsize


def _seconds(run: Callable[[], object]) -> float:
    """The shortest of a few runs."""
    times = []
    for _ in range(_TIMED):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def _needs(sieve: Sieve, block: Queries, weights: Weights, exact: Hits, k: int) -> tuple[F32, F32]:
    """The row slack and the cell slack that each exact hit needs to be let through."""
    codes, steps, rests = sieve.ask(block.vectors)
    rows, cells = [np.zeros(0, np.float32)], [np.zeros(0, np.float32)]
    for i in range(len(block)):
        n = int(exact.counts[i])
        at = positions(sieve, exact.slots[i, :n])
        at = at[at >= 0]
        if not len(at):
            continue  # nothing is related to that statement: it says nothing about slacks
        group, lane = at // LANES, at % LANES
        cell = np.searchsorted(sieve.starts, group, side="right") - 1
        lift = most_lifts(weights.flag, int(block.text[i]))[sieve.kinds[cell]]
        floor = float(exact.fused[i, n - 1]) if n == k else weights.threshold
        bar = np.maximum(weights.min_related, floor - lift)
        own = sieve.codes[group, :, lane].reshape(len(at), -1).astype(np.int32) @ codes[i] * steps[i]
        centre = (
            sieve.centres[cell // LANES, :, cell % LANES].reshape(len(at), -1).astype(np.int32) @ codes[i] * steps[i]
        )
        scale = scaled(1.0, bar)
        rows.append((bar - own) / scale / np.maximum(rests[i] * sieve.rest[at] / 255, 1e-6))
        cells.append((bar - centre) / scale / np.maximum(sieve.spread[cell], 1e-6))
    return np.concatenate(rows).astype(np.float32), np.concatenate(cells).astype(np.float32)


def sieve_numbers(sifted: Sifted | None) -> dict[str, Any]:
    """What the statistics of an index say of its sieve."""
    if sifted is None:
        return {}
    return {
        "sieved": sifted.rows if sifted.is_trusted else 0,
        "sieve_bytes": sifted.sieve.bytes,
        "cells": sifted.sieve.cells,
        "recall": None if sifted.recall is None else round(sifted.recall, 5),
        "read": round(sifted.read / sifted.queries / max(1, sifted.rows), 5) if sifted.queries else None,
    }
