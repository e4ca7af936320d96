"""The scan through torch on a GPU, against the bandwidth of the GPU's memory and against the kernel on the processor.

``python -m bench.kernel_torch --json`` prints one JSON object as its last line. Where there is no CUDA device it says so, and
runs the same code on the processor with few rows, which shows that it works and nothing about a GPU.

``dense`` is the device's part alone (all rows, masks, flags, top k); ``scan`` is everything that a scan does, with the kernel's
look for oppositions and the exact cosines. Bandwidth is what a sum over the same array of rows reaches.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from kimera_stream import kernels
from kimera_stream.core.index.device import DeviceScan
from kimera_stream.core.index.probe import Scope, scan_rows
from kimera_stream.core.index.slots import LOOSE, Slots
from kimera_stream.core.index.storage import CHUNK_ROWS, Chunk, RowStore

DIM = 384
K = 64
WEIGHTS = kernels.Weights(min_related=0.35, flag=0.5)


def rows_of(count: int) -> tuple[Slots, list[Chunk]]:
    """Unit vectors around topics, texts of all kinds, no symbols."""
    rng = np.random.default_rng(1)
    centres = rng.standard_normal((200, DIM)).astype(np.float32)
    slots, chunks, store = Slots(), [], RowStore(None, DIM)
    for _ in range(-(-count // CHUNK_ROWS)):
        base = slots.add_chunk(LOOSE)
        codes, exact, mapped = store.take()
        chunk = Chunk(base, codes, exact, mapped=mapped)
        vectors = centres[rng.integers(0, 200, CHUNK_ROWS)] + rng.standard_normal((CHUNK_ROWS, DIM)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        exact[:] = vectors
        assert chunk.codes is not None
        assert chunk.grades is not None
        chunk.codes[:], chunk.grades[:], _ = kernels.quantize(exact)
        chunk.text[:] = rng.choice(np.array([0, 1 << 31, 3 << 30, 1 << 31 | 5], np.uint32), CHUNK_ROWS)
        for slot in range(base, base + CHUNK_ROWS):
            slots.publish(slot)
        chunks.append(chunk)
    return slots, chunks


class Timer:
    """Seconds of calls on a device, the median of several."""

    def __init__(self, device: str, rounds: int) -> None:
        self._wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
        self._rounds = rounds

    def __call__(self, fn: Callable[[], Any]) -> float:
        fn()
        times = []
        for _ in range(self._rounds):
            self._wait()
            began = time.perf_counter()
            fn()
            self._wait()
            times.append(time.perf_counter() - began)
        return statistics.median(times)


def measure(count: int, rounds: int) -> dict[str, Any]:
    """All figures as one object."""
    has_cuda = torch.cuda.is_available()
    device = DeviceScan("cuda" if has_cuda else "torch-cpu", DIM)
    slots, chunks = rows_of(count)
    device.attach(slots, chunks)
    timer = Timer(device.kind, rounds)
    began = time.perf_counter()
    if not device.prepare():
        raise RuntimeError(device.trouble)
    copied = time.perf_counter() - began
    kernel = kernels.load(threads=len(os.sched_getaffinity(0)))
    view = kernel.view([chunk.segment() for chunk in chunks])
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name()
        if has_cuda
        else "processor: torch sees no CUDA device, no figure is of a GPU",
        "rows": len(chunks) * CHUNK_ROWS,
        "device_bytes": device.bytes,
        "copy_s": round(copied, 3),
    }
    blocks = device._blocks
    read = sum(block.vectors.numel() * 2 for block in blocks)
    words = [block.vectors.view(torch.int32) for block in blocks]
    seconds = timer(lambda: [each.sum() for each in words])
    result["read_GB_per_s"] = round(read / seconds / 1e9, 1)
    with slots.pin() as live:
        scope = Scope(kernel, view, live, np.array(slots.kinds, np.int64), 0.05)
        for queries in (1, 32):
            rows = np.stack([chunks[i % len(chunks)].exact_row(17 * i) for i in range(queries)])
            block = kernels.Queries.build(rows, text=[1 << 31] * queries)
            dense = timer(lambda block=block: device._dense(scope, block, WEIGHTS, K))  # type: ignore[misc]
            whole = timer(lambda block=block: device.scan_rows(scope, block, WEIGHTS, K))  # type: ignore[misc]
            plain = timer(lambda block=block: scan_rows(scope, block, WEIGHTS, K))  # type: ignore[misc]
            found, expected = device.scan_rows(scope, block, WEIGHTS, K), scan_rows(scope, block, WEIGHTS, K)
            result[f"{queries} queries"] = {
                "dense_ms": round(1e3 * dense, 3),
                "scan_ms": round(1e3 * whole, 3),
                "kernel_ms": round(1e3 * plain, 3),
                "dense_of_read_bandwidth": round(seconds / dense, 3),
                "kernel_over_scan": round(plain / whole, 2),
                "same_hits": round(float(np.mean([
                    len(set(mine[:n]) & set(theirs[:n])) / n
                    for mine, theirs, n in zip(found.slots, expected.slots, expected.counts, strict=True)
                ])), 5),
            }  # fmt: skip
    if device.trouble is not None:
        raise RuntimeError(device.trouble)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--rows", type=int, help="500,000, without a GPU 20,000")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    rows = options.rows or (500_000 if torch.cuda.is_available() else 20_000)
    result = measure(rows, options.rounds)
    print(json.dumps(result) if options.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
