"""The kernels in numpy: the fallback without a compiler, and the oracle of the tests. Plain rather than fast."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kimera_stream.kernels.layout import (
    F32,
    I32,
    I64,
    KEY_BITS,
    NEGATED_BIT,
    NUMBERS_MASK,
    SAME,
    SYMBOLIC_BONUS,
    TEXT_BIT,
    U8,
    U32,
    U64,
    Hits,
    Queries,
    Segment,
    Weights,
    stride_of,
)
from kimera_stream.kernels.sieving import LANES, UNUSED, Sieve, most_lifts, scaled, unpack
from kimera_stream.kernels.texts import same_names

_STEPS: F32 = (np.exp2(-np.arange(256) / 32.0) / 127.0).astype(np.float32)


def quantize(vectors: F32) -> tuple[U8, U8, F32]:
    """Codes (n, stride), grades (n,) and the norm lost (n,) of unit rows. See ``ext/quantize.c``."""
    n, dim = vectors.shape
    largest = np.abs(vectors).max(axis=1) if dim else np.zeros(n, np.float32)
    holds = (np.float32(127.0) * _STEPS)[None, :] >= largest[:, None]
    holds[:, 0] = True
    grades = (255 - holds[:, ::-1].argmax(axis=1)).astype(np.uint8)
    step = _STEPS[grades][:, None]
    exact = np.clip(np.rint(vectors * (np.float32(1.0) / step)), -127, 127)
    codes = np.full((n, stride_of(dim)), 128, np.uint8)
    codes[:, :dim] = (exact + 128).astype(np.uint8)
    lost = np.sqrt(np.square(vectors - exact * step, dtype=np.float32).sum(axis=1, dtype=np.float32))
    return codes, grades, lost


def quantize_query(vector: F32) -> tuple[I32, np.float32, float]:
    """8-bit codes (dim,) of one query, held in 32 bits; their step; the norm lost."""
    largest = np.float32(np.abs(vector).max())
    step = np.float32(largest / np.float32(127.0))
    inverse = np.float32(np.float32(127.0) / largest) if largest > 0 else np.float32(0)
    codes = np.clip(np.rint(vector * inverse), -127, 127)
    return codes.astype(np.int32), step, float(np.linalg.norm(vector - codes * step))


def levels(query: int, rows: U32) -> F32:
    """How much texts are lifted, where both have text: 1 where the negation parity or the numbers differ (numbers only where
    both have some), and ``SAME`` where both name the same numbered thing."""
    mine, theirs = np.uint32(query & NUMBERS_MASK), rows & np.uint32(NUMBERS_MASK)
    both = (rows & np.uint32(query & TEXT_BIT)) != 0
    negated = ((rows ^ np.uint32(query)) & np.uint32(NEGATED_BIT)) != 0
    numbers = (mine != 0) & (theirs != 0) & (mine != theirs)
    differs = both & (negated | numbers)
    result: F32 = (differs + SAME * (both & same_names(query, rows))).astype(np.float32)
    return result


class _Parsed:
    """A record taken apart; see ``ext/symbolic.c``."""

    def __init__(self, pool: U64, at: int) -> None:
        head = int(pool[at])
        at += 1
        self.subject = self.moment = 0
        self.start, self.end = -(1 << 63), (1 << 63) - 1
        if head >> 32 & 1:
            self.subject = int(pool[at])
            at += 1
        if head >> 33 & 1:
            self.moment = int(pool[at])
            at += 1
        if head >> 34 & 1:
            self.start, self.end = (int(x) for x in pool[at : at + 2].view(np.int64))
            at += 2
        n, layers = head & 0xFFFF, head >> 16 & 0xFFFF
        self.symbols: dict[int, set[int]] = {}
        self.pairs = list(zip(pool[at : at + n].tolist(), pool[at + n : at + 2 * n].tolist(), strict=True))
        for key, value in self.pairs:
            self.symbols.setdefault(key, set()).add(value)
        self.layers = set(pool[at + 2 * n : at + 2 * n + layers].tolist())


def opposed(query: _Parsed, row: _Parsed) -> tuple[int, bool]:
    """Keys held with different values, and whether both are about the same subject."""
    same = query.subject != 0 and query.subject == row.subject
    if query.subject and row.subject and query.subject != row.subject:
        return 0, same
    if query.moment and row.moment and query.moment != row.moment:
        return 0, same
    if query.start > row.end or row.start > query.end:
        return 0, same
    return sum(1 for key, value in query.pairs if row.symbols.get(key, set()) - {value}), same


def layer_conflict(query: _Parsed, row: _Parsed) -> float:
    """Jaccard distance of the semantic keys; 0 where either has none."""
    if not query.layers or not row.layers:
        return 0.0
    return 1.0 - len(query.layers & row.layers) / len(query.layers | row.layers)


def _bits(live: U64, base: int, rows: int) -> npt.NDArray[np.bool_]:
    words = live[base // 64 : -(-(base + rows) // 64)]
    return np.unpackbits(words.view(np.uint8), bitorder="little")[:rows].astype(bool)


@dataclass(frozen=True, slots=True)
class _Found:
    """Candidates of one query, row by row."""

    slots: I64
    fused: F32
    cosine: F32
    opposed: I64
    conditional: npt.NDArray[np.bool_]

    @classmethod
    def join(cls, parts: "Sequence[_Found]") -> "_Found":
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in cls.__slots__))

    def best(self, k: int, keep: npt.NDArray[np.bool_]) -> "_Found":
        """The k best of those to keep, best first; ties fall to the lower slot."""
        order = np.lexsort((self.slots, -self.fused))
        order = order[keep[order]][:k]
        return _Found(*(getattr(self, name)[order] for name in self.__slots__))


def _scan_segment(
    segment: Segment, live: U64, queries: Queries, i: int, weights: Weights, margin: float, *, apart: bool
) -> _Found:
    n, dim = segment.rows, queries.dim
    vector = queries.vectors[i]
    has = bool(queries.has_vector[i]) and (segment.codes is not None or segment.exact is not None)
    cosine, fused = np.zeros(n, np.float32), np.zeros(n, np.float32)
    related = np.zeros(n, bool)
    if has:
        minimum = np.float32(weights.min_related)
        if segment.codes is not None and segment.grades is not None:
            codes, step, _ = quantize_query(vector)
            steps = _STEPS[segment.grades]
            dots = (segment.codes[:, :dim].astype(np.int32) - 128) @ codes
            cosine = dots.astype(np.float32) * (steps * step)
            minimum = minimum - np.float32(margin)
            own = np.clip(np.rint(vector[None, :] * (np.float32(1.0) / _STEPS)[:, None]), -127, 127).astype(np.int32)
            l1 = np.abs(segment.codes[:, :dim].astype(np.int32) - 128 - own[segment.grades]).sum(axis=1) * steps
        else:
            assert segment.exact is not None
            cosine = (segment.exact @ vector).astype(np.float32)
            l1 = np.abs(segment.exact - vector).sum(axis=1)
        fused = cosine + np.float32(weights.l1) * l1.astype(np.float32) * np.float32(0.5 / np.sqrt(dim))
        if segment.text is not None:
            fused = fused + np.float32(weights.flag) * levels(int(queries.text[i]), segment.text)
        related = cosine >= minimum
    passing = related & (not apart)
    counts, conditional = np.zeros(n, np.int64), np.ones(n, bool)
    keys, subject, layers = (int(x[i]) for x in (queries.keys, queries.subjects, queries.layers))
    record = int(queries.record[i])
    if record >= 0 and segment.keys is not None and segment.record is not None and segment.layers is not None:
        assert segment.pool is not None
        mine = _Parsed(queries.pool, record)
        rows = _bits(live, segment.base, n)
        fused = fused.copy()
        for row in np.flatnonzero(rows & ((segment.keys & np.uint64(keys)) != 0)).tolist():
            word = int(segment.keys[row])
            anonymous = subject == 0 or word >> KEY_BITS == 0
            alike = subject != 0 and word >> KEY_BITS == subject >> KEY_BITS
            if not (alike or (anonymous and (related[row] or not has))):
                continue
            count, same = opposed(mine, _Parsed(segment.pool, int(segment.record[row])))
            if count and (same or related[row]):
                counts[row], conditional[row], passing[row] = count, not same, True
                base = fused[row] if related[row] else cosine[row]
                fused[row] = base + np.float32(SYMBOLIC_BONUS) + np.float32(min(count, 63) / 64)
            elif count and not has:
                counts[row], conditional[row], passing[row] = count, False, True
                fused[row] = np.float32(min(count, 63) / 64 - 1)
        if weights.layer and layers:
            for row in np.flatnonzero(rows & passing & related & (segment.layers != 0)).tolist():
                conflict = layer_conflict(mine, _Parsed(segment.pool, int(segment.record[row])))
                fused[row] += np.float32(weights.layer) * np.float32(conflict)
    keep = passing & _bits(live, segment.base, n) & (fused >= np.float32(weights.threshold))
    at = np.flatnonzero(keep)
    slots = at + segment.base
    at, slots = at[slots != queries.exclude[i]], slots[slots != queries.exclude[i]]
    return _Found(slots, fused[at], cosine[at], counts[at], conditional[at])


_NOTHING = _Found(
    np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), np.zeros(0, bool)
)


def _rescored(found: _Found, view: Sequence[Segment], vector: F32, weights: Weights) -> _Found:
    exact, keep = found.cosine.copy(), np.ones(len(found.slots), bool)
    for segment in view:
        if segment.codes is None or segment.exact is None:
            continue
        here = (found.slots >= segment.base) & (found.slots < segment.end)
        exact[here] = segment.exact[found.slots[here] - segment.base] @ vector
        keep &= ~(here & found.conditional & (exact < np.float32(weights.min_related)))
    fused = found.fused + (exact - found.cosine)
    keep &= fused >= np.float32(weights.threshold)
    return _Found(found.slots, fused, exact, found.opposed, found.conditional).best(len(fused), keep)


class Reference:
    """The backend in numpy, one thread."""

    variant = "numpy"
    threads = 1

    def view(self, segments: Sequence[Segment]) -> tuple[Segment, ...]:
        """What ``scan`` reads."""
        return tuple(segments)

    def scan(
        self,
        view: Sequence[Segment],
        live: U64,
        queries: Queries,
        weights: Weights,
        *,
        k: int,
        margin: float,
        rescore: bool,
        select: U8 | None,
    ) -> Hits:
        """Top k per query; see ``Kernel.scan``."""
        hits = Hits.empty(len(queries), k)
        has = [i for i in range(len(queries)) if queries.has_vector[i]]
        if margin > 0 and has:
            margin += 1.01 * max(quantize_query(queries.vectors[i])[2] for i in has)
        for i in range(len(queries) if view else 0):
            chosen = [1] * len(view) if select is None else select.tolist()
            parts = [
                _scan_segment(segment, live, queries, i, weights, margin, apart=how == 2)
                for segment, how in zip(view, chosen, strict=True)
                if how
            ]
            found = _Found.join(parts) if parts else _NOTHING
            found = found.best(k, np.ones(len(found.slots), bool))
            if rescore and queries.has_vector[i]:
                found = _rescored(found, view, queries.vectors[i], weights)
            n = len(found.slots)
            hits.slots[i, :n], hits.fused[i, :n], hits.cosine[i, :n] = found.slots, found.fused, found.cosine
            hits.opposed[i, :n], hits.counts[i] = found.opposed, n
        return hits

    def sift(
        self,
        view: Sequence[Segment],
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
        """Top k per query of the rows let through; see ``Kernel.sift``. The cells' bounds are tried against what all rows give."""
        codes, steps, rest = sieve.ask(queries.vectors)
        rows, cell_of = (
            unpack(sieve.codes).astype(np.int32),
            np.repeat(np.arange(sieve.cells), np.diff(sieve.starts) * LANES),
        )
        centres = unpack(sieve.centres).astype(np.int32)
        hits, read = Hits.empty(len(queries), k), np.zeros(len(queries), np.int64)
        lost = {i: 1.01 * quantize_query(queries.vectors[i])[2] for i in np.flatnonzero(queries.has_vector).tolist()}
        total = margin + max(lost.values(), default=0.0) if margin > 0 else 0.0
        for i in lost:
            lift = most_lifts(weights.flag, int(queries.text[i]))[sieve.kinds]
            bar = np.maximum(np.float32(weights.min_related - total), np.float32(weights.threshold) - lift)
            cell = (centres @ codes[i]) * steps[i] + scaled(cell_slack, bar) * sieve.spread
            bar, opened = bar[cell_of], (cell >= bar)[cell_of] & (sieve.slots != UNUSED)
            row = (rows @ codes[i]) * steps[i] + scaled(row_slack, bar) * rest[i] / 255 * sieve.rest
            through = opened & (row >= bar)
            only = np.zeros_like(live)
            slots = sieve.slots[through].astype(np.int64)
            np.bitwise_or.at(only, slots >> 6, np.uint64(1) << (slots & 63).astype(np.uint64))
            one = queries.only(i).without_records()
            own = max(0.0, total - lost[i])  # the scan adds what this query lost
            found = self.scan(view, live & only, one, weights, k=k, margin=own, rescore=rescore, select=None)
            hits.slots[i], hits.fused[i], hits.cosine[i] = found.slots[0], found.fused[0], found.cosine[0]
            hits.counts[i], read[i] = found.counts[0], len(slots)
        return hits, read

    def pair_head(self, query: F32, rows: F32, extra: F32, w1: F32, b1: F32, w2: F32, b2: float) -> F32:
        """Logits (n,); see ``Kernel.pair_head``."""
        features = np.concatenate([np.abs(query - rows), query * rows, extra], axis=1)
        hidden: F32 = np.maximum(features @ w1.T + b1, 0)
        return np.asarray(hidden @ w2 + np.float32(b2), np.float32)

    def match(self, vector: F32, rows: F32, thresholds: F32) -> tuple[I64, F32]:
        """Indices and cosines; see ``Kernel.match``."""
        cosines: F32 = rows @ vector
        indices = np.flatnonzero(cosines >= thresholds)
        return indices, cosines[indices]
