"""How fast statements get in: ``python -m bench.ingest --data ../shared/data --json``.

A real server in a process of its own, its last line one JSON object:

- start to ready on an empty store, files warm, with the hashing encoder and with encoder and verifier;
- NDJSON over one HTTP connection into the log, per second, verified and not, and how resident memory grows meanwhile;
- from publishing a statement to its contradiction on a WebSocket while nothing else goes on, with ``--geoids`` stored;
- with ``--store``: the same on copies of a prepared data directory, which ``--keep`` makes;
- the encoder alone beside sentence-transformers in float32 on the same threads, in alternating rounds.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import httpx
import numpy as np
from websockets.asyncio.client import connect

from bench.fit_rules import rows

SOURCES = (
    "snli_dev", "mnli_train", "wikifactcheck_part", "cad_train", "conjnli_train",
    "semantoneg_part", "breaking_nli_part", "mnli_dev_part", "conjnli_dev", "cad_dev",
)  # fmt: skip
"""Pairs whose statements are said in this order; then those of the clusters of ``corpus``."""
MODES = {
    "hashing_rules": {"KIMERA_EMBEDDING__PROVIDER": "hashing", "KIMERA_SCORING__VERIFIER": "off"},
    "minilm_rules": {"KIMERA_EMBEDDING__PROVIDER": "minilm", "KIMERA_SCORING__VERIFIER": "off"},
    "minilm_verified": {"KIMERA_EMBEDDING__PROVIDER": "minilm", "KIMERA_SCORING__VERIFIER": "auto"},
}


@dataclass(slots=True)
class Running:
    """A server: its address, the seconds from its start to ready, and its process."""

    address: str
    ready_s: float
    pid: int

    @property
    def resident_mb(self) -> float:
        """Resident memory, MB."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text(encoding="ascii").split()[1])
        return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)

    @property
    def processor_s(self) -> float:
        """Seconds of processors that it has used."""
        used = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[11:13]
        return sum(map(int, used)) / os.sysconf("SC_CLK_TCK")

    @property
    def geoids(self) -> int:
        """Statements stored."""
        return int(httpx.get(f"{self.address}/v1/stats", timeout=60).json()["geoids"])


@contextlib.contextmanager
def copied(store: Path | None) -> Iterator[str]:
    """A folder with a copy of a data directory, or an empty one, until the end of the block."""
    with tempfile.TemporaryDirectory() as folder:
        if store is not None:
            shutil.copytree(store, folder, dirs_exist_ok=True)
        yield folder


@contextlib.contextmanager
def server(extra: dict[str, str], folder: str | None = None) -> Iterator[Running]:
    """A server until the end of the block, on ``folder`` or an empty one of its own."""
    with tempfile.TemporaryDirectory() as own:
        environment = {**os.environ, "KIMERA_PATHS__DATA_DIR": folder or own, "KIMERA_API__PORT": "0",
                       "KIMERA_TELEMETRY__LOG_LEVEL": "error", **extra}  # fmt: skip
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "kimera_stream.api.cli.main", "serve"],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            address = next((line.split()[-1] for line in process.stdout if line.startswith("listening on ")), None)
            if address is None:
                raise RuntimeError(f"the server ended with {process.wait()} before it listened")
            yield Running(address, round(time.perf_counter() - began, 2), process.pid)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def starts(rounds: int) -> dict[str, float]:
    """Seconds from start to ready: the median, after one start that warms the files."""
    found: dict[str, float] = {}
    for mode in ("hashing_rules", "minilm_verified"):
        times = []
        for _ in range(rounds + 1):
            with server(MODES[mode]) as running:
                times.append(running.ready_s)
        found[mode] = statistics.median(times[1:])
    return found


def ingest(running: Running, texts: list[str], parts: int = 4) -> dict[str, Any]:
    """Statements a second through one connection; resident memory after each of ``parts``."""
    results: list[dict[str, Any]] = []
    memory = [running.resident_mb]
    stored, used = running.geoids, running.processor_s
    rates: list[float] = []
    took = 0.0
    size = max(1, -(-len(texts) // parts))
    with httpx.Client(timeout=3600) as client:
        for start in range(0, len(texts), size):
            body = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts[start : start + size])
            began = time.perf_counter()
            answer = client.post(
                f"{running.address}/v1/geoids", content=body, headers={"Content-Type": "application/x-ndjson"}
            )
            seconds = time.perf_counter() - began
            took += seconds
            answer.raise_for_status()
            lines = [json.loads(line) for line in answer.text.splitlines()]
            rates.append(round(sum("geoid" in each for each in lines) / seconds, 1))
            results += lines
            memory.append(running.resident_mb)
    accepted = [each for each in results if "geoid" in each]
    found = [each for result in accepted for each in result["contradictions"]]
    return {
        "stored_before": stored,
        "statements": len(texts),
        "committed": len(accepted),
        "per_second": round(len(accepted) / took, 1),
        "per_second_by_part": rates,
        "per_processor_second": round(len(accepted) / (running.processor_s - used), 1),
        "contradictions": len(found),
        "provisional": sum(bool(each.get("provisional")) for each in found),
        "resident_mb": memory,
    }


async def latency(address: str, rounds: int) -> dict[str, Any]:
    """Milliseconds from sending a publish to receiving the contradiction it makes."""
    times: list[float] = []
    missed = 0
    async with connect(address.replace("http", "ws", 1) + "/v1/stream", subprotocols=["kimera.v1.json"]) as socket:  # type: ignore[list-item]
        number = 0

        async def ask(command: dict[str, Any]) -> None:
            nonlocal number
            number += 1
            await socket.send(json.dumps({"id": number, **command}))

        await ask({"op": "connect", "subs": [{"channel": "contradictions"}]})
        await socket.recv()
        for turn in range(rounds):
            for state in ("open", "closed"):
                began = time.perf_counter()
                await ask({"op": "publish", "geoid": {"text": f"The valve V{turn}-{rounds} is {state}."}})
                replied = seen = state == "open"
                if state == "open":
                    replied = False
                with anyio.move_on_after(5):
                    while not (replied and seen):
                        message = json.loads(await socket.recv())
                        replied = replied or message["op"] == "published"
                        if message["op"] == "event" and message["type"] == "contradiction.found" and not seen:
                            seen = True
                            times.append((time.perf_counter() - began) * 1000)
                missed += not seen
    if not times:
        return {"measured": 0, "missed": missed}
    return {
        "measured": len(times),
        "missed": missed,
        "p50_ms": round(statistics.median(times), 1),
        "p99_ms": round(float(np.quantile(times, 0.99)), 1),
    }


def encoder(texts: list[str]) -> dict[str, Any]:
    """The packaged encoder at batch 32 beside sentence-transformers in float32, on the same threads."""
    import torch
    from sentence_transformers import SentenceTransformer

    from kimera_stream.core.embedding.minilm import load_encoder, model_path
    from kimera_stream.infrastructure.compute import plan_compute

    plan = plan_compute("cpu", "auto")
    torch.set_num_threads(plan.threads)
    ours = load_encoder(plan, 32)
    theirs = SentenceTransformer(str(model_path()), device="cpu", local_files_only=True)
    rates: dict[str, list[float]] = {"ours": [], "sentence_transformers": []}
    for _ in range(5):
        began = time.perf_counter()
        mine = ours.encode(texts)
        rates["ours"].append(len(texts) / (time.perf_counter() - began))
        began = time.perf_counter()
        reference = theirs.encode(texts, batch_size=32, normalize_embeddings=True)
        rates["sentence_transformers"].append(len(texts) / (time.perf_counter() - began))
    ratios = [a / b for a, b in zip(rates["ours"], rates["sentence_transformers"], strict=True)]
    return {
        "precision": plan.precision,
        "threads": plan.threads,
        "per_second": round(statistics.median(rates["ours"]), 1),
        "sentence_transformers_fp32_per_second": round(statistics.median(rates["sentence_transformers"]), 1),
        "ratio": round(statistics.median(ratios), 2),
        "least_cosine_to_fp32": round(float((mine * reference).sum(axis=1).min()), 5),
    }


def statements(data: Path) -> list[str]:
    """About 110,000 different ones, in the same order every time."""
    pairs = (row for name in SOURCES for row in rows(data / f"{name}.jsonl.gz"))
    clusters = (row for path in sorted((data / "corpus").glob("*.jsonl.gz")) for row in rows(path))
    said = [row[side] for row in pairs for side in ("premise", "hypothesis")]
    for row in clusters:
        said += [row["anchor"], *(item["text"] for item in row["items"])]
    return list(dict.fromkeys(said))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", action="store_true", help="only the one JSON line")
    parser.add_argument("--statements", type=int, default=2000, help="ingested in each mode")
    parser.add_argument("--geoids", type=int, default=100_000, help="stored before latency is measured")
    parser.add_argument(
        "--store", type=Path, help="data directory that copies are made of; it holds the first of --data's statements"
    )
    parser.add_argument("--keep", type=Path, help="where the data directory with --geoids statements goes")
    parser.add_argument("--rounds", type=int, default=200, help="publishes that latency is measured on")
    parser.add_argument("--starts", type=int, default=3, help="starts that are timed; 0: none")
    parser.add_argument("--modes", nargs="*", choices=list(MODES), default=list(MODES))
    parser.add_argument("--no-encoder", action="store_true", help="leave out sentence-transformers")
    arguments = parser.parse_args()
    if arguments.store and "hashing_rules" in arguments.modes:
        parser.error("--store: its vectors are minilm's; name the other modes: --modes minilm_rules minilm_verified")
    texts = statements(arguments.data)
    result: dict[str, Any] = {"processors": os.cpu_count(), "load_at_start": os.getloadavg()[0]}
    if arguments.starts:
        result["start_to_ready_s"] = starts(arguments.starts)
    for mode in arguments.modes:
        with copied(arguments.store) as folder, server(MODES[mode], folder) as running:
            unsaid = texts[running.geoids :] if arguments.store else texts
            result[mode] = ingest(running, unsaid[: arguments.statements])
    if arguments.geoids:
        with copied(arguments.store) as folder:
            with server(MODES["minilm_rules"], folder) as running:
                if missing := texts[running.geoids : arguments.geoids]:
                    result["filled"] = ingest(running, missing)
            if arguments.keep:
                shutil.copytree(folder, arguments.keep)
            with server(MODES["minilm_verified"], folder) as running:
                result["latency"] = {
                    "geoids": running.geoids,
                    "restart_to_ready_s": running.ready_s,
                    **anyio.run(latency, running.address, arguments.rounds),
                }
    if not arguments.no_encoder:
        result["encoder"] = encoder(texts[:512])
    if not arguments.json:
        print(json.dumps(result, indent=2))
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
