"""Whether a server under a steady load with churn stays as large as it is: memory, tasks, descriptors, tables, caches.

``python -m bench.memory --minutes 30 --json`` prints a line a minute and one JSON object as its last line. Caches are set small, so
that they are full, and go on being full, soon after the start. The slope of resident memory after the warm-up is a line fitted to
means of half a minute; its standard error takes into account that neighbours are alike (Newey and West, four lags).
Growth of at most two standard errors is within the noise. Exit status: 0 resident memory grew within the noise (or shrank), 1 it grew
by more, 3 the run was too short to say.
"""

import argparse
import json
import math
import os
import shutil
import signal
import sqlite3
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx
import numpy as np

from bench.churn import Load
from bench.server import Running, server

SAMPLE_EVERY = 5.0
MEAN_OF = 6
"""Samples of one mean: half a minute."""
LAGS = 4
NOISE = 2.0
"""Standard errors of the slope up to which growth is within the noise."""
FLAT, GROWS, TOO_SHORT = 0, 1, 3
"""Exit statuses; 2 is that of wrong arguments."""
SETTLE = 12.0
"""Seconds after the load: what closed without a handshake is noticed, and the server has looked at itself again."""
BOUNDED_TABLES = (
    "log_entry",
    "log_channel",
    "geoid",
    "idempotency_key",
    "session",
    "watch",
    "cursor",
    "contradiction",
    "dead_letter",
    "checkpoint_request",
    "request",
)
"""Those that a load about a bounded number of things leaves bounded."""
COUNTS = ("rss", "own", "descriptors", "threads", "tasks", "connections", "subscriptions", "sessions")
RECORDS = ("geoid_version", "scar", "usage", "audit_entry")
"""What is kept on purpose."""
SMALL = {
    "KIMERA_EMBEDDING__CACHE_BYTES": "4194304",
    "KIMERA_SCORING__READING_CACHE_BYTES": "4194304",
    "KIMERA_PERFORMANCE__GEOID_CACHE_BYTES": "4194304",
    "KIMERA_PERFORMANCE__SESSION_BYTES": "1048576",
    "KIMERA_PERFORMANCE__IDEMPOTENCY_WINDOW": "60",
    "KIMERA_STREAM__TAIL_BYTES": "2097152",
    "KIMERA_DATABASE__POOL_SIZE": "1",
    "KIMERA_DATABASE__PAGE_CACHE_BYTES": "1048576",
    "KIMERA_DATABASE__RETENTION_COUNT": "3000",
    "KIMERA_DATABASE__RETENTION_SESSIONS": "120",
    "KIMERA_API__COMMANDS_PER_SECOND": "10000",
    "KIMERA_API__COMMANDS_BURST": "10000",
}


@dataclass(frozen=True, slots=True)
class Sample:
    """``rss``: resident bytes; ``own``: of them what is no page of a file. ``seconds`` since the load began."""

    seconds: float
    rss: int
    own: int
    descriptors: int
    threads: int
    tasks: int
    connections: int
    subscriptions: int
    sessions: int
    caches: dict[str, int]


def process_memory(pid: int) -> tuple[int, int]:
    """Resident bytes, and of them those that are no pages of files."""
    fields = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()
    page = os.sysconf("SC_PAGE_SIZE")
    return int(fields[1]) * page, (int(fields[1]) - int(fields[2])) * page


def table_sizes(database: Path) -> dict[str, int]:
    """Rows of every table that there is, read beside the server."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=10) as connection:
        names = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        return {
            name: connection.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0]
            for name in (*BOUNDED_TABLES, *RECORDS)
            if name in names
        }


def take(pid: int, stats: dict[str, Any], seconds: float) -> Sample:
    """What the process and its ``stats`` say now."""
    rss, own = process_memory(pid)
    return Sample(
        round(seconds, 1),
        rss,
        own,
        len(list(Path(f"/proc/{pid}/fd").iterdir())),
        stats["process"]["threads"],
        stats["process"]["tasks"],
        stats["connections"],
        stats["subscribers"],
        stats["sessions"]["sessions"],
        stats["caches"],
    )


def slope(samples: list[Sample], read: Any) -> tuple[float, float]:
    """Bytes a minute, and its standard error, of a line through means of half a minute."""
    groups = [samples[i : i + MEAN_OF] for i in range(0, len(samples) - MEAN_OF + 1, MEAN_OF)]
    x = np.array([statistics.fmean(each.seconds for each in group) / 60 for group in groups])
    y = np.array([statistics.fmean(read(each) for each in group) for group in groups])
    if len(x) < 4:
        return float("nan"), float("nan")
    x = x - x.mean()
    found = float((x * (y - y.mean())).sum() / (x * x).sum())
    score = x * (y - y.mean() - found * x)
    total = float(score @ score)
    for lag in range(1, min(LAGS, len(x) - 1) + 1):
        total += 2 * (1 - lag / (LAGS + 1)) * float(score[lag:] @ score[:-lag])
    return found, float(np.sqrt(max(total, 0.0) * len(x) / (len(x) - 2)) / (x * x).sum())


def within_noise(found: tuple[float, float]) -> bool | None:
    """Whether a slope with its standard error is no growth that can be told from noise; None: there is none."""
    return None if math.isnan(found[0]) else found[0] <= NOISE * found[1]


def status(result: dict[str, Any]) -> int:
    """What the process exits with."""
    return {True: FLAT, False: GROWS, None: TOO_SHORT}[result["rss_slope_within_noise"]]


def _figure(value: float) -> float | None:
    """kB with two places; None where there is no number."""
    return None if math.isnan(value) else round(value / 1e3, 2)


async def watch(pid: int, load: Load, data_dir: Path, seconds: float) -> tuple[list[Sample], list[dict[str, int]]]:
    """Samples, and table sizes once a minute, while the load runs."""
    samples: list[Sample] = []
    tables: list[dict[str, int]] = []
    began = time.monotonic()
    async with httpx.AsyncClient(base_url=f"http://{load.address}", timeout=30, trust_env=False) as web:
        while (passed := time.monotonic() - began) < seconds:
            samples.append(take(pid, (await web.get("/v1/stats")).json(), passed))
            if passed >= 60 * len(tables):
                tables.append(await anyio.to_thread.run_sync(table_sizes, data_dir / "kimera.sqlite3"))
                newest = samples[-1]
                print(
                    f"{passed / 60:5.1f} min  {newest.rss / 1e6:7.1f} MB ({newest.own / 1e6:.1f} own)  "
                    f"{newest.tasks} tasks  {newest.descriptors} fds  {newest.connections} connections  "
                    f"caches {sum(newest.caches.values()) / 1e6:.1f} MB  {load.done['published']} published  {tables[-1]}",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
            await anyio.sleep(SAMPLE_EVERY)
    return samples, tables


async def under_load(running: Running, data_dir: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What is seen of a server while the load runs, before it and after."""
    load = Load(
        running.url.removeprefix("http://"),
        publishes=options.rate,
        connections=options.rate / 5,
        watches=options.rate / 25,
        reads=options.rate / 10,
    )
    pid = running.process.pid
    before = take(pid, await anyio.to_thread.run_sync(running.stats), 0.0)
    async with anyio.create_task_group() as group:
        group.start_soon(load.run, name="load")
        samples, tables = await watch(pid, load, data_dir, options.minutes * 60)
        group.cancel_scope.cancel()
    await anyio.sleep(SETTLE)
    after = take(pid, await anyio.to_thread.run_sync(running.stats), samples[-1].seconds + SETTLE)
    warm = [each for each in samples if each.seconds >= options.warm_up * 60]
    rss, own = slope(warm, lambda each: each.rss), slope(warm, lambda each: each.own)
    return {
        "minutes": options.minutes,
        "publishes_per_second": round(load.done["published"] / samples[-1].seconds, 1),
        "done": dict(load.done.most_common()),
        "warm_up_minutes": options.warm_up,
        "rss_slope_kb_per_minute": _figure(rss[0]),
        "rss_slope_error": _figure(rss[1]),
        "rss_slope_within_noise": within_noise(rss),
        "own_slope_kb_per_minute": _figure(own[0]),
        "own_slope_error": _figure(own[1]),
        "own_slope_within_noise": within_noise(own),
        "before": asdict(before),
        "warm": {
            name: [min(getattr(each, name) for each in warm), max(getattr(each, name) for each in warm)]
            for name in COUNTS
        },
        "after": asdict(after),
        "most_cache_bytes": {name: max(each.caches[name] for each in warm) for name in warm[0].caches},
        "tables": {
            "at_a_third": tables[len(tables) // 3],
            "at_two_thirds": tables[2 * len(tables) // 3],
            "last": tables[-1],
        },
    }


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All figures as one object."""
    data_dir, output = folder / "data", folder / "output.txt"
    with server(data_dir, output, **SMALL) as running:
        result = anyio.run(under_load, running, data_dir, options)
        running.process.send_signal(signal.SIGTERM)
        code = running.process.wait(timeout=60)
    logged = [json.loads(line) for line in output.read_text(errors="replace").splitlines() if line.startswith("{")]
    return result | {
        "errors_logged": sum(record.get("level") in ("error", "critical") for record in logged),
        "leak_reports": [record for record in logged if "leak" in str(record.get("event", ""))],
        "exit_code": code,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--warm-up", type=float, default=8.0, help="minutes that the slope leaves out")
    parser.add_argument("--rate", type=float, default=50.0, help="publishes a second; churn in proportion")
    parser.add_argument("--folder", type=Path, help="where the data is kept; otherwise thrown away")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp()) if options.folder is None else options.folder
    folder.mkdir(parents=True, exist_ok=True)
    try:
        result = measure(folder, options)
    finally:
        if options.folder is None:
            shutil.rmtree(folder)
    print(json.dumps(result) if options.json else json.dumps(result, indent=2))
    sys.exit(status(result))


if __name__ == "__main__":
    main()
