"""Making a sieve: principal axes, cells around them, and the short codes of all rows in their cells.

    sample of rows ──> axes (eigenvectors) ──> centres (k-means, apart for each kind of text) ──┐
    all rows ──blocks──> codes, nearest centre ──────────────────────────────────────────> lay out by cell

Everything here blocks: for a worker thread. Rows are taken in blocks, so that other threads get their turns.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kimera_stream.kernels import Sieve
from kimera_stream.kernels.layout import F32, I8, I64, U8, U32, U64
from kimera_stream.kernels.sieving import KINDS, LANES, UNUSED, kinds_of, pack, unpack

AXES = 96
"""Principal axes kept: 96 of 384 hold two thirds of the square of a sentence's vector, in a quarter of the bytes."""
SAMPLE = 20_000
"""Rows from which the axes are found."""
PER_CENTRE = 32
"""Rows of the sample of k-means per centre."""
ROUNDS = 5
BLOCK = 16_384


@dataclass(frozen=True, slots=True)
class Rows:
    """A block of what the sieve is made from: float32 (n, dim) unit vectors, uint32 (n,) text signatures, int64 (n,) slots."""

    vectors: F32
    text: U32
    slots: I64


def cells_for(rows: int) -> int:
    """Cells in all for so many rows: their number grows with the root, so that finding the cells costs no more than reading them."""
    return max(LANES, round(4 * math.sqrt(rows)))


def sample_size(rows: int) -> int:
    """Rows that ``begin`` wants to see of so many."""
    return max(SAMPLE, PER_CENTRE * cells_for(rows))


def begin(sample: Rows, rows: int, *, axes: int = AXES, seed: int = 0) -> Sieve:
    """A sieve without rows: axes and cells for about ``rows`` of them.

    Args:
        sample: Some rows; at least one.
        rows: How many there will be.
        axes: Numbers of a short code, at most; a multiple of 4. There are no more than a quarter of the vectors' own.
        seed: Of the choice of first centres.
    """
    rng = np.random.default_rng(seed)
    dim = sample.vectors.shape[1]
    axes = min(axes, max(4, dim // 16 * 4))
    some = sample.vectors[:SAMPLE].astype(np.float64)
    _, columns = np.linalg.eigh(some.T @ some)
    if dim < 4:
        columns = np.pad(columns, ((0, 0), (4 - dim, 0)))
    kept: F32 = np.ascontiguousarray(columns[:, ::-1][:, :axes], np.float32)
    short = sample.vectors @ kept
    steps = (np.maximum(np.abs(short).max(axis=0), 1e-3) * 1.05 / 127).astype(np.float32)
    kinds = kinds_of(sample.text)
    cells = cells_for(rows)
    centres, cell_kinds = [], []
    for kind in range(KINDS):
        own = short[kinds == kind]
        count = max(1, round(cells * len(own) / len(short)))
        centres.append(_k_means(own, count, rng) if len(own) else np.zeros((1, axes), np.float32))
        cell_kinds.append(np.full(len(centres[-1]), kind, np.uint8))
    made = np.concatenate(centres)
    total = -(-len(made) // LANES) * LANES
    rounded = np.zeros((total, axes), np.int8)
    rounded[: len(made)] = np.clip(np.rint(made / steps), -127, 127)
    all_kinds = np.full(total, KINDS, np.uint8)
    all_kinds[: len(made)] = np.concatenate(cell_kinds)
    return Sieve(
        kept, steps, pack(rounded), np.zeros(total, np.float32), all_kinds, np.zeros(total + 1, np.int64),
        np.zeros((0, axes // 4, LANES, 4), np.int8), np.zeros(0, np.uint8), np.zeros(0, np.uint32),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Coded:
    """Rows as they go into a sieve: codes int8 (n, axes), rests uint8 (n,), slots uint32 (n,), cells int64 (n,)."""

    codes: I8
    rests: U8
    slots: U32
    cells: I64


def kept(sieve: Sieve, valid: U64) -> Coded:
    """The rows of a sieve whose slots are still what they were (``valid``: bit per slot)."""
    slots = sieve.slots.astype(np.int64)
    keep = np.flatnonzero(slots != UNUSED)
    keep = keep[(valid[slots[keep] >> 6] >> (slots[keep] & 63).astype(np.uint64) & np.uint64(1)) == 1]
    cell_of = np.repeat(np.arange(sieve.cells), np.diff(sieve.starts) * LANES)
    return Coded(unpack(sieve.codes)[keep], sieve.rest[keep], sieve.slots[keep], cell_of[keep])


def code(sieve: Sieve, rows: Rows) -> Coded:
    """Further rows for the cells of a sieve."""
    codes, rests = sieve.encode(rows.vectors)
    centres = unpack(sieve.centres) * sieve.steps
    cells = _nearest(codes * sieve.steps, kinds_of(rows.text), centres, sieve.kinds)
    return Coded(codes, rests, rows.slots.astype(np.uint32), cells)


def filled(sieve: Sieve, parts: Sequence[Coded]) -> Sieve:
    """A new sieve with the axes and cells of ``sieve`` and these rows."""
    codes, rests, slots, cells = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("codes", "rests", "slots", "cells")
    )
    centres = unpack(sieve.centres) * sieve.steps
    counts = np.bincount(cells, minlength=sieve.cells)
    starts = np.concatenate([[0], np.cumsum(-(-counts // LANES))]).astype(np.int64)
    total = int(starts[-1]) * LANES
    order = np.argsort(cells, kind="stable")
    sorted_cells = cells[order]
    to = starts[sorted_cells] * LANES + np.arange(len(cells)) - (np.cumsum(counts) - counts)[sorted_cells]
    all_codes, all_rests = np.zeros((total, codes.shape[1]), np.int8), np.zeros(total, np.uint8)
    all_slots = np.full(total, UNUSED, np.uint32)
    left = np.zeros(sieve.cells)
    squares = np.square(centres).sum(axis=1)
    for at in range(0, len(order), BLOCK):
        source, target, cell = order[at : at + BLOCK], to[at : at + BLOCK], sorted_cells[at : at + BLOCK]
        own = codes[source]
        all_codes[target], all_rests[target], all_slots[target] = own, rests[source], slots[source]
        along = np.einsum("nd,nd->n", own * sieve.steps, centres[cell])
        left += np.bincount(cell, 1 - 2 * along + squares[cell], minlength=sieve.cells)
    spread = np.sqrt(np.maximum(0, left / np.maximum(counts, 1))).astype(np.float32)
    return Sieve(
        sieve.axes, sieve.steps, sieve.centres, spread, sieve.kinds, starts, pack(all_codes), all_rests, all_slots
    )


def _nearest(short: F32, kinds: U8, centres: F32, cell_kinds: U8) -> I64:
    cells = np.zeros(len(short), np.int64)
    for kind in range(KINDS):
        rows, own = np.flatnonzero(kinds == kind), np.flatnonzero(cell_kinds == kind)
        if len(rows):
            cells[rows] = own[_closest(short[rows], centres[own])]
    return cells


def _closest(rows: F32, centres: F32) -> I64:
    half = np.square(centres).sum(axis=1) / 2
    parts = [(part @ centres.T - half).argmax(axis=1) for part in _parts(rows)]
    return np.concatenate(parts).astype(np.int64)


def _parts(rows: F32) -> Iterator[F32]:
    return (rows[i : i + 2048] for i in range(0, len(rows), 2048))


def _k_means(rows: F32, count: int, rng: np.random.Generator) -> F32:
    """Centres, float32 (count or fewer, axes)."""
    if count >= len(rows):
        return rows
    sample = rows[rng.choice(len(rows), min(len(rows), PER_CENTRE * count), replace=False)]
    centres: F32 = sample[rng.choice(len(sample), count, replace=False)]
    for _ in range(ROUNDS):
        nearest = _closest(sample, centres)
        order = np.argsort(nearest, kind="stable")
        used, first, members = np.unique(nearest[order], return_index=True, return_counts=True)
        means = np.add.reduceat(sample[order], first) / members[:, None].astype(np.float32)
        centres = sample[rng.choice(len(sample), count)]  # an empty cell starts anew somewhere
        centres[used] = means
    return centres


def positions(sieve: Sieve, slots: I64) -> I64:
    """Where the sieve has each slot; -1 where it lacks it."""
    table = np.full(sieve.end + 1, -1, np.int64)
    used = np.flatnonzero(sieve.slots != UNUSED)
    table[sieve.slots[used]] = used
    return table[np.minimum(slots, sieve.end)]
