"""How long a server takes from its start to ready with a large log: without a snapshot, with one, and with a tail to replay.

``python -m bench.restart --json`` prints one JSON object as its last line. The database is made once through the vault (no
encoder: vectors are drawn around topics), then a real server process is started on it again and again. Times are by
the wall clock from the start of the process to its ``listening on``; processor time is the server's until then.
"""

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import structlog
from prometheus_client import CollectorRegistry

from bench.publishes import BATCH, committed, fill, statement
from bench.server import PATIENCE, Running, server
from kimera_stream.core.embedding import BatchingEmbedder, make_provider
from kimera_stream.core.interfaces import WriteBatch
from kimera_stream.core.vault.vault import SqlVault
from kimera_stream.infrastructure.resources import Resources
from kimera_stream.infrastructure.settings import Settings, database_url
from kimera_stream.protocol.objects import Scalar

TOPICS = 40
_RNG = np.random.default_rng(7)
_CENTRES = _RNG.standard_normal((TOPICS, 384)).astype(np.float32)


def _vectors(count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    rows = _CENTRES[_RNG.integers(0, TOPICS, count)] + _RNG.standard_normal((count, 384)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32)


def batch_at(head: int, count: int, geoids: int) -> WriteBatch:
    """The next ``count`` publishes: new geoids until there are ``geoids``, then updates of them in turn."""
    stored = []
    for offset, vector in zip(range(head + 1, head + 1 + count), _vectors(count), strict=True):
        number, version = (offset - 1) % geoids, (offset - 1) // geoids + 1
        symbols: dict[str, Scalar] = {"subject": f"pump {number}", "pressure": version, "state": "open"}
        stored.append(statement(number, offset, vector, version=version, symbols=symbols if number % 4 == 0 else None))
    return committed(stored)


async def make(data_dir: Path, *, geoids: int, upto: int = 0, more: int = 0) -> int:
    """Write the log up to an offset, or ``more`` entries; returns its end."""
    settings = _settings(data_dir)
    vault = SqlVault(database_url(settings), settings.database)
    await vault.start()
    try:
        if vault.encoder is None:
            registry = CollectorRegistry()
            provider = make_provider(settings.embedding, Resources(settings.performance, registry))
            await vault.record_encoder(BatchingEmbedder(provider, settings.embedding, registry).model)
        upto = max(upto, vault.head + more)
        return await fill(vault, upto, partial(batch_at, geoids=geoids), most=min(BATCH, geoids))
    finally:
        await vault.close()


def _settings(data_dir: Path) -> Settings:
    return Settings.model_validate({"embedding": {"provider": "hashing"}, "paths": {"data_dir": data_dir}})


def started(running: Running) -> dict[str, Any]:
    """What its start has cost, and what it holds."""
    cpu, stats = running.processor_seconds(), running.stats()
    index = stats.get("index", {})
    snapshot = index.get("snapshot", {})
    told = {name: index.get(name) for name in ("geoids", "mapped_bytes")}
    told |= {name: snapshot.get(name) for name in ("source", "replayed")}
    return {"seconds": round(running.seconds, 2), "cpu_seconds": round(cpu, 2), **told}


def measure(folder: Path, *, entries: int, geoids: int, tail: int, rounds: int) -> dict[str, Any]:
    """All figures as one object."""
    data_dir, output = folder / "data", folder / "output.txt"
    data_dir.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    head = anyio.run(lambda: make(data_dir, upto=entries, geoids=geoids))
    result: dict[str, Any] = {"entries": head, "geoids": geoids, "filled_in": round(time.perf_counter() - began, 1)}

    def start(stop: int) -> dict[str, Any]:
        with server(data_dir, output, KIMERA_API__SHUTDOWN_DEADLINE="60") as running:
            told = started(running)
            stopping = time.perf_counter()
            running.process.send_signal(stop)
            running.process.wait(timeout=PATIENCE)
            told["stopped_in"] = round(time.perf_counter() - stopping, 2)
        return told

    def forget() -> None:
        for file in data_dir.glob("index-*.snapshot"):
            file.unlink()

    start(signal.SIGKILL)
    without = []
    for _ in range(rounds):
        forget()
        without.append(start(signal.SIGKILL))
    result["without_snapshot"] = min(without, key=lambda each: each["seconds"])
    result["graceful_stop"] = start(signal.SIGTERM)
    result["snapshot_bytes"] = sum(file.stat().st_size for file in data_dir.glob("index-*.snapshot"))
    with_snapshot = [start(signal.SIGKILL) for _ in range(rounds)]
    result["with_snapshot"] = min(with_snapshot, key=lambda each: each["seconds"])
    anyio.run(lambda: make(data_dir, more=tail, geoids=geoids))
    result["with_tail"] = {"tail": tail, **start(signal.SIGKILL)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--folder", type=Path, help="where the data is made and kept; otherwise thrown away")
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--geoids", type=int, default=200_000)
    parser.add_argument("--tail", type=int, default=20_000, help="entries written after the snapshot")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    folder = Path(tempfile.mkdtemp()) if options.folder is None else options.folder
    try:
        result = measure(
            folder, entries=options.entries, geoids=options.geoids, tail=options.tail, rounds=options.rounds
        )
    finally:
        if options.folder is None:
            shutil.rmtree(folder)
    print(json.dumps(result) if options.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
