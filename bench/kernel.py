"""How fast the scoring kernel is, side by side with the limit and with others.

    python -m bench.kernel [--json] [--rows 500000] [--rounds 15] [--vectors FILE.npy]

Contenders take turns within a round, so that what else the machine does falls on all of them; times are of processor time,
the best of the rounds; a ratio is that of two bests, with the median of the rounds' own ratios beside it. ``--json`` prints one JSON
object as the last line. ``--vectors``: float32 unit vectors of real statements for the recall figures; see
``bench/kernel_vectors.py``. Rows lie in memory as the index keeps them: on pages of their own, huge ones where the system has them.
"""

import argparse
import asyncio
import ctypes
import gc
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kimera_stream import kernels
from kimera_stream.core.index.storage import anonymous
from kimera_stream.kernels import Queries, Segment, Weights, _kernel, bitmap, build_record

DIM = 384
K = 100


class Rounds:
    """Times of contenders that take turns.

    Ratios are of processor time, which a busy machine falsifies least (waiting for memory counts, waiting for a processor
    does not). What is gained by threads is told by the wall clock, and by the processor time of the calling thread.
    """

    def __init__(self, contenders: dict[str, Callable[[], Any]], rounds: int) -> None:
        self.processor: dict[str, list[float]] = {name: [] for name in contenders}
        self.wall: dict[str, list[float]] = {name: [] for name in contenders}
        self.caller: dict[str, list[float]] = {name: [] for name in contenders}
        for run in contenders.values():
            run()
        for i in range(rounds):
            names = list(contenders)
            for name in names[i % len(names) :] + names[: i % len(names)]:
                before = time.perf_counter(), time.process_time(), time.thread_time()
                contenders[name]()
                after = time.perf_counter(), time.process_time(), time.thread_time()
                for times, start, end in zip((self.wall, self.processor, self.caller), before, after, strict=True):
                    times[name].append(end - start)

    def best(self, name: str) -> float:
        """Seconds of processor time."""
        return min(self.processor[name])

    def ratio(self, slower: str, faster: str, scale: float = 1.0) -> dict[str, float]:
        """How many times faster ``faster`` is, times ``scale``."""
        return self._ratio(self.processor, slower, faster, scale)

    def threads(self, one: str, more: str) -> dict[str, Any]:
        """How much faster more threads are."""
        return {"wall": self._ratio(self.wall, one, more), "caller": self._ratio(self.caller, one, more)}

    @staticmethod
    def _ratio(times: dict[str, list[float]], slower: str, faster: str, scale: float = 1.0) -> dict[str, float]:
        pairs = [a / b for a, b in zip(times[slower], times[faster], strict=True)]
        return {
            "best": round(scale * min(times[slower]) / min(times[faster]), 3),
            "median": round(scale * float(np.median(pairs)), 3),
        }


def unit(rows: np.ndarray) -> np.ndarray:
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def clustered(rng: np.random.Generator, n: int) -> np.ndarray:
    """Points around 2,000 centres, as near-duplicates and topics make them."""
    centres = unit(rng.standard_normal((2000, DIM), np.float32))
    rows = 0.055 * rng.standard_normal((n, DIM), np.float32)
    rows += centres[rng.integers(0, len(centres), n)]
    return unit(rows)


def as_stored(rows: np.ndarray) -> np.ndarray:
    """A copy in memory as the index allocates it; numpy's own begins anywhere, and every load would touch two cache lines."""
    memory = anonymous(len(rows), rows.itemsize * rows.shape[1]).view(rows.dtype)
    memory[:] = rows
    return memory


def symbols_for(rng: np.random.Generator, n: int, share: float) -> dict[str, np.ndarray]:
    """Four symbols and six semantic keys on a share of the rows; 20 symbol keys in all, half of the rows with subjects."""
    keys = rng.integers(1, 2**63, 20).tolist()
    layer_keys = rng.integers(1, 2**63, 200).tolist()
    words, record, bloom, layers = [0], np.zeros(n, np.uint32), np.zeros(n, np.uint64), np.zeros(n, np.uint64)
    cached = []
    for i in range(5000):
        chosen = rng.choice(20, 4, replace=False)
        cached.append(
            build_record(
                [(keys[c], int(rng.integers(1, 5))) for c in chosen],
                subject=int(rng.integers(1, 2**62)) if i % 2 else 0,
                layers=[layer_keys[c] for c in rng.choice(200, 6, replace=False)],
            )
        )
    for row in np.flatnonzero(rng.random(n) < share).tolist():
        r = cached[row % 5000]
        record[row], bloom[row], layers[row] = len(words), r.keys | r.subject, r.layers
        words += r.words
    return {"record": record, "keys": bloom, "layers": layers, "pool": np.array(words, np.uint64)}


def speed(n: int, rounds: int, threads: int) -> dict[str, Any]:
    """Every speed figure of issue 3 that needs no real text."""
    rng = np.random.default_rng(0)
    rows = as_stored(clustered(rng, n))
    codes, grades, _ = kernels.quantize(rows)
    codes = as_stored(codes)
    text = (rng.integers(0, 4, n, dtype=np.uint32) << 30) | rng.integers(0, 50, n, dtype=np.uint32)
    live = bitmap(np.ones(n, bool))
    one, two = kernels.load(threads=1), kernels.load(threads=threads)
    symbolic = symbols_for(rng, n, 0.5)
    plain8 = Segment(0, n, codes=codes, grades=grades, text=text)
    full8 = Segment(0, n, codes=codes, grades=grades, text=text, **symbolic)
    plain32 = Segment(0, n, exact=rows, text=text)
    vectors = rows[rng.integers(0, n, 32)].copy()
    states = [
        build_record([(k, 9) for k in np.unique(symbolic["pool"][3:7]).tolist()], subject=s, layers=[1, 2, 3, 4])
        for s in ([0, 5] * 16)
    ]
    q1 = Queries.build(vectors[:1], text=[0x8000_0001])
    q32 = Queries.build(vectors, text=[0x8000_0001] * 32)
    s0 = Queries.build(vectors[:1], text=[0x8000_0001], records=states[:1])
    s1 = Queries.build(vectors[:1], text=[0x8000_0001], records=states[1:2])
    s32 = Queries.build(vectors, text=[0x8000_0001] * 32, records=states)
    fused = Weights(min_related=0.35, flag=0.5)
    with_l1 = Weights(min_related=0.35, flag=0.5, l1=0.1)
    layered = Weights(min_related=0.35, flag=0.5, layer=0.1)
    raw32, raw8 = rows.reshape(-1).view(np.uint8), codes.reshape(-1)

    def scan(kernel: kernels.Kernel, segment: Segment, queries: Queries, weights: Weights) -> Callable[[], Any]:
        view = kernel.view([segment])
        return lambda: kernel.scan(view, live, queries, weights, k=K)

    single = {
        "read float32": lambda: _kernel.read_all(raw32),
        "read 8-bit": lambda: _kernel.read_all(raw8),
        "float32 dot": scan(one, plain32, q1, fused),
        "float32 dot+L1": scan(one, plain32, q1, with_l1),
        "8-bit dot": scan(one, plain8, q1, fused),
        "8-bit dot+L1": scan(one, plain8, q1, with_l1),
        "8-bit symbols": scan(one, full8, s0, layered),
        "8-bit symbols, subject": scan(one, full8, s1, layered),
        f"read 8-bit, {threads} threads": partial(_read_apart, raw8, threads),
        "8-bit 2 threads": scan(two, plain8, q1, fused),
        "float32 2 threads": scan(two, plain32, q1, fused),
    }
    batch = {
        "8-bit x32": scan(one, plain8, q32, fused),
        "8-bit x32 symbols": scan(one, full8, s32, layered),
        "8-bit x32 2 threads": scan(two, plain8, q32, fused),
        "float32 x32": scan(one, plain32, q32, fused),
        "8-bit dot": scan(one, plain8, q1, fused),
    }
    peers(rows, vectors, single, batch)
    slow = {"numpy dot+L1": lambda: (rows @ vectors[0], np.abs(rows - vectors[0]).sum(axis=1))}
    a, b, c = Rounds(single, rounds), Rounds(batch, max(3, rounds // 3)), Rounds(slow, 2)
    best = {name: round(1e3 * min(t), 3) for r in (a, b, c) for name, t in r.processor.items()}
    figures: dict[str, Any] = {
        "float32 of read bandwidth": a.ratio("read float32", "float32 dot"),
        "float32 dot+L1 of read bandwidth": a.ratio("read float32", "float32 dot+L1"),
        "float32 dot+L1 vs numpy": round(c.best("numpy dot+L1") / a.best("float32 dot+L1"), 1),
        "8-bit vs float32, rows per second": a.ratio("float32 dot", "8-bit dot"),
        "8-bit of read bandwidth": a.ratio("read 8-bit", "8-bit dot"),
        "8-bit dot+L1 of read bandwidth": a.ratio("read 8-bit", "8-bit dot+L1"),
        "symbols and layers, cost": a.ratio("8-bit symbols", "8-bit dot"),
        "symbols and layers with subject, cost": a.ratio("8-bit symbols, subject", "8-bit dot"),
        "32 queries a pass vs single, per query": b.ratio("8-bit dot", "8-bit x32", 32),
        "32 queries with symbols and layers, cost": b.ratio("8-bit x32 symbols", "8-bit x32"),
        f"{threads} threads vs 1, reading 8-bit rows: the limit": a.threads(
            "read 8-bit", f"read 8-bit, {threads} threads"
        ),
        f"{threads} threads vs 1, 8-bit": a.threads("8-bit dot", "8-bit 2 threads"),
        f"{threads} threads vs 1, float32": a.threads("float32 dot", "float32 2 threads"),
        f"{threads} threads vs 1, 32 queries": b.threads("8-bit x32", "8-bit x32 2 threads"),
    }
    for name in single:
        if name.startswith("faiss"):
            figures[f"float32 vs {name}"] = a.ratio(name, "float32 dot")
        elif name.startswith("usearch"):
            figures[f"8-bit vs {name}"] = a.ratio(name, "8-bit dot")
    for name in batch:
        if name.startswith(("faiss", "usearch")):
            figures[f"8-bit x32 vs {name}"] = b.ratio(name, "8-bit x32")
    return {
        "rows": n,
        "dim": DIM,
        "variant": one.variant,
        "read GB/s": round(raw32.nbytes / a.best("read float32") / 1e9, 1),
        "best ms": best,
        "figures": figures,
    }


def _read_apart(data: np.ndarray, threads: int) -> None:
    """Read a buffer by several threads at once: what they can gain where the bandwidth of memory is shared."""
    readers = [threading.Thread(target=_kernel.read_all, args=(part,)) for part in np.array_split(data, threads)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()


def peers(rows: np.ndarray, vectors: np.ndarray, single: dict[str, Any], batch: dict[str, Any]) -> None:
    """Exact search of others on the same vectors, one thread, where they are installed."""
    try:
        import faiss
    except ImportError:
        pass
    else:
        faiss.omp_set_num_threads(1)
        flat = faiss.IndexFlatIP(DIM)
        flat.add(rows)
        single["faiss IndexFlatIP"] = lambda: flat.search(vectors[:1], K)
        batch["faiss IndexFlatIP x32"] = lambda: flat.search(vectors, K)
        scalar = faiss.IndexScalarQuantizer(DIM, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
        scalar.train(rows[:50_000])
        scalar.add(rows)
        batch["faiss SQ8 x32"] = lambda: scalar.search(vectors, K)
    try:
        from usearch.index import MetricKind, search
    except ImportError:
        return
    eight = np.clip(np.rint(rows * 127 / np.abs(rows).max()), -127, 127).astype(np.int8)
    eight_queries = np.clip(np.rint(vectors * 127 / np.abs(rows).max()), -127, 127).astype(np.int8)
    single["usearch exact i8"] = lambda: search(eight, eight_queries[:1], K, MetricKind.IP, exact=True, threads=1)
    batch["usearch exact i8 x32"] = lambda: search(eight, eight_queries, K, MetricKind.IP, exact=True, threads=1)
    batch["usearch exact f32 x32"] = lambda: search(rows, vectors, K, MetricKind.IP, exact=True, threads=1)


def recall(rows: np.ndarray, queries: int) -> dict[str, float]:
    """Of the float32 top: how much the 8-bit scan finds before, and how much of the top 10 after rescoring."""
    n = len(rows)
    rng = np.random.default_rng(1)
    codes, grades, lost = kernels.quantize(rows)
    live = bitmap(np.ones(n, bool))
    picked = rng.choice(n, queries, replace=False)
    block = Queries.build(rows[picked].copy(), exclude=picked.tolist())
    kernel = kernels.load(threads=len(os.sched_getaffinity(0)))
    exact = kernel.scan(kernel.view([Segment(0, n, exact=rows)]), live, block, Weights(), k=K)
    before = kernel.scan(kernel.view([Segment(0, n, codes=codes, grades=grades)]), live, block, Weights(), k=K)
    view = kernel.view([Segment(0, n, codes=codes, grades=grades, exact=rows)])
    after = kernel.scan(view, live, block, Weights(), k=K, rescore=True)

    def share(found: np.ndarray, top: int) -> float:
        hits = sum(len(set(found[i, :top]) & set(exact.slots[i, :top])) for i in range(queries))
        return round(hits / (top * queries), 5)

    return {
        "rows": n,
        "norm lost, mean": round(float(lost.mean()), 5),
        "norm lost, worst": round(float(lost.max()), 5),
        "top 100 before rescoring": share(before.slots, 100),
        "top 10 before rescoring": share(before.slots, 10),
        "top 10 after rescoring": share(after.slots, 10),
    }


def index_figures(n: int) -> dict[str, Any]:
    """Appending, memory, saving and loading of the index."""
    from bench.kernel_support import InlineThreads, plain_geoid
    from kimera_stream.core.index import FlatIndex, LogPoint
    from kimera_stream.core.interfaces import StoredGeoid
    from kimera_stream.infrastructure.settings import PerformanceSettings, ScoringSettings

    rng = np.random.default_rng(0)
    block = unit(rng.standard_normal((2_000, DIM), np.float32))

    def make(directory: Path) -> FlatIndex:
        return FlatIndex(
            DIM, threads=InlineThreads(), performance=PerformanceSettings(), scoring=ScoringSettings(),
            directory=directory,
        )  # fmt: skip

    async def measure() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as name:
            where = Path(name)
            index = make(where)
            spent, copies = [], []

            resident = _resident()
            for start in range(0, n, len(block)):
                rows = block[: n - start]
                await index.reserve(len(rows))
                for i, row in enumerate(rows):
                    index.put(StoredGeoid(plain_geoid(f"{start + i:026d}"), row, "p"))
            grown = (_resident() - resident) / n
            copied = np.empty((2_000, DIM), np.float32)
            for start in range(0, 2_000, 500):
                items = [StoredGeoid(plain_geoid(f"{start + i:026d}"), block[start + i], "p") for i in range(500)]
                began = time.process_time()
                for item in items:
                    index.put(item)
                spent.append((time.process_time() - began) / 500)
                began = time.process_time()
                for i in range(500):
                    copied[i] = block[start + i]
                copies.append((time.process_time() - began) / 500)
            path = where / "snapshot"
            began = time.perf_counter()
            await index.save(path, model="bench", point=LogPoint("e", 1))
            saved = time.perf_counter() - began
            used, held = index.bytes, index.mapped_bytes
            began = time.perf_counter()
            with path.open("rb") as file:
                buffer = bytearray(1 << 22)
                while file.readinto(buffer):
                    pass
            reading = time.perf_counter() - began
            again = make(where)
            work, began = time.process_time(), time.perf_counter()
            await again.load(path, model="bench", epoch="e")
            loading, work = time.perf_counter() - began, time.process_time() - work
            return {
                "geoids": n,
                "put us": round(1e6 * min(spent), 2),
                "copy of the row us": round(1e6 * min(copies), 2),
                "bytes per geoid, counted": round(used / n, 1),
                "bytes per geoid, resident growth": round(grown, 1),
                "of the 8-bit row": round(used / n / (DIM + 1), 3),
                "mapped bytes per geoid": round(held / n, 1),
                "snapshot MB": round(path.stat().st_size / 1e6, 1),
                "save s": round(saved, 3),
                "read the file s": round(reading, 3),
                "load s": round(loading, 3),
                "load, processor s": round(work, 3),
            }

    return asyncio.run(measure())


def sieve_figures(sizes: list[int], vectors: np.ndarray, signatures: np.ndarray) -> list[dict[str, Any]]:
    """Scans through a sieve at growing sizes, one thread: processor time, rows read and recall beside the exact scan.

    The queries are statements that the index lacks. Times are the least of the rounds, of the scan alone, without the index
    around it.
    """
    from kimera_stream.core.index.probe import Scope, scan_rows
    from kimera_stream.core.index.sieve import BLOCK, Rows, begin, code, filled, sample_size
    from kimera_stream.core.index.sifting import calibrate, recall_of, sift_rows

    kernel = kernels.load(threads=1)
    weights, k, asked = Weights(min_related=0.35, flag=0.5), 64, 256
    rng = np.random.default_rng(3)
    held, rest, held_text, text = vectors[:asked], vectors[asked:], signatures[:asked], signatures[asked:]
    results = []
    for n in sizes:
        rows, own = as_stored(_displaced(rng, rest, n)), text[np.arange(n) % len(rest)]
        slots = np.arange(n)
        codes, grades, lost = kernels.quantize(rows)
        codes = as_stored(codes)
        view = kernel.view([Segment(0, n, codes=codes, grades=grades, exact=rows, text=own)])
        live = bitmap(np.ones(n, bool))
        scope = Scope(kernel, view, live, np.ones(1, np.int64), float(lost.max()))
        began = time.process_time()
        some = rng.choice(n, min(n, sample_size(n)), replace=False)
        sieve = begin(Rows(rows[some], own[some], some), n)
        parts = [slice(i, i + BLOCK) for i in range(0, n, BLOCK)]
        sieve = filled(sieve, [code(sieve, Rows(rows[at], own[at], slots[at])) for at in parts])
        made = time.process_time() - began
        some = rng.choice(n, 128, replace=False)
        block = Queries.build(rows[some], text=own[some].tolist(), exclude=some.tolist())
        sifted = calibrate(scope, sieve, n, n, block, weights, k)
        through = partial(sift_rows, scope, sifted, np.zeros_like(live))
        queries = Queries.build(held.copy(), text=held_text.tolist())
        exact, (found, read) = scan_rows(scope, queries, weights, k), through(queries, weights, k)
        recalls = [recall_of(found, exact, i) for i in range(asked)]
        alone, together = (
            [queries.only(i) for i in range(0, asked, 16)],
            Queries.build(held[:32].copy(), text=held_text[:32].tolist()),
        )
        times = Rounds(
            {
                "exact": partial(_each, partial(scan_rows, scope), alone, weights, k),
                "sieve": partial(_each, through, alone, weights, k),
                "exact x32": partial(scan_rows, scope, together, weights, k),
                "sieve x32": partial(through, together, weights, k),
            },
            5,
        )
        results.append(
            {
                "rows": n,
                "real": min(n, len(rest)),
                "cells": sieve.cells,
                "bytes a row": round(sieve.bytes / n, 1),
                "made in, processor s": round(made, 1),
                "blocks that go through it": min(sifted.largest, 10**6),
                "slacks": [round(sifted.row_slack, 3), round(sifted.cell_slack, 3)],
                "hits": round(float(exact.counts.mean()), 1),
                "rows read in full": round(read / asked / n, 5),
                "recall of the top 64": round(sum(recalls) / asked, 4),
                "exact ms": round(1e3 * times.best("exact") / len(alone), 3),
                "sieve ms": round(1e3 * times.best("sieve") / len(alone), 3),
                "exact x32 ms per query": round(1e3 * times.best("exact x32") / 32, 3),
                "sieve x32 ms per query": round(1e3 * times.best("sieve x32") / 32, 3),
                "single": times.ratio("exact", "sieve"),
                "32 queries": times.ratio("exact x32", "sieve x32"),
            }
        )
    return results


def _each(scan: Callable[..., Any], queries: list[Queries], weights: Weights, k: int) -> None:
    for query in queries:
        scan(query, weights, k)


def _displaced(rng: np.random.Generator, vectors: np.ndarray, n: int) -> np.ndarray:
    """Real statements, and where they do not suffice, others made from them.

    A made one is a statement plus 0.3 to 0.6 of the difference of two related ones (cosine 0.4 to 0.8): a step of a size and a
    direction that occur between statements. Noise around a statement would not do: it makes neighbours that no axis explains.
    """
    if n <= len(vectors):
        return vectors[:n].copy()
    made = n - len(vectors)
    some = rng.choice(len(vectors), min(len(vectors), 4000), replace=False)
    cosines = vectors[some] @ vectors[some].T
    one, other = np.nonzero((cosines > 0.4) & (cosines < 0.8))
    pairs = rng.integers(0, len(one), made)
    rows = np.concatenate([vectors, vectors[np.arange(made) % len(vectors)]])
    for start in range(0, made, 50_000):
        at = slice(start, min(made, start + 50_000))
        step = vectors[some[one[pairs[at]]]] - vectors[some[other[pairs[at]]]]
        rows[len(vectors) :][at] += step * rng.uniform(0.3, 0.6, (len(step), 1)).astype(np.float32)
    return unit(rows)


def _resident() -> int:
    """Bytes of anonymous memory of this process, with what the allocator merely keeps given back first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vectors", type=Path, help="unit vectors of real statements, float32 .npy")
    parser.add_argument("--only", choices=("speed", "recall", "index", "sieve"), action="append")
    parser.add_argument("--sieve-rows", type=int, nargs="+", default=[25_000, 50_000, 100_000, 200_000, 400_000])
    options = parser.parse_args()
    if kernels.IMPLEMENTATION != "compiled":
        sys.exit("bench.kernel: the compiled kernel was not built")
    only = options.only or ["speed", "recall", "index", "sieve"]
    result: dict[str, Any] = {}
    if "speed" in only:
        result["speed"] = speed(options.rows, options.rounds, options.threads)
    if "recall" in only:
        result["recall"] = {"clustered": recall(clustered(np.random.default_rng(2), min(options.rows, 200_000)), 200)}
        if options.vectors:
            result["recall"]["statements"] = recall(unit(np.load(options.vectors).astype(np.float32)), 500)
    if "index" in only:
        result["index"] = index_figures(options.rows)
    if "sieve" in only:
        rng = np.random.default_rng(4)
        if options.vectors:
            real = unit(np.load(options.vectors).astype(np.float32))
            signatures = np.load(options.vectors.with_suffix(".texts.npy"))
        else:  # runs anywhere, but says little: made vectors have no principal axes
            real = clustered(rng, 30_000)
            signatures = (rng.integers(2, 4, 30_000) << 30).astype(np.uint32)
        result["sieve"] = {"vectors": "real" if options.vectors else "made", "sizes": None}
        result["sieve"]["sizes"] = sieve_figures(options.sieve_rows, real, signatures)
    if not options.json:
        print(json.dumps(result, indent=2))
    else:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
