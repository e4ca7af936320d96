"""How fast statements get in: ``python -m bench.ingest --data ../shared/data --json``.

A real server in a process of its own, on an empty data directory: NDJSON over one HTTP connection into the log, and the
time from publishing a statement to its contradiction on a WebSocket while nothing else goes on. And the encoder alone,
beside sentence-transformers in float32 on the same threads, in alternating rounds.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import numpy as np
from websockets.asyncio.client import connect

from bench.fit_rules import rows

MODES = {
    "hashing_rules": {"KIMERA_EMBEDDING__PROVIDER": "hashing", "KIMERA_SCORING__VERIFIER": "off"},
    "minilm_rules": {"KIMERA_EMBEDDING__PROVIDER": "minilm", "KIMERA_SCORING__VERIFIER": "off"},
    "minilm_verified": {"KIMERA_EMBEDDING__PROVIDER": "minilm", "KIMERA_SCORING__VERIFIER": "auto"},
}


@contextlib.contextmanager
def server(extra: dict[str, str]) -> Iterator[str]:
    """A server until the end of the block; gives its address."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "KIMERA_PATHS__DATA_DIR": folder, "KIMERA_API__PORT": "0",
                       "KIMERA_TELEMETRY__LOG_LEVEL": "error", **extra}  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-m", "kimera_stream.api.cli.main", "serve"],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            address = next((line.split()[-1] for line in process.stdout if line.startswith("listening on ")), None)
            if address is None:
                raise RuntimeError(f"the server ended with {process.wait()} before it listened")
            yield address
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def ingest(address: str, texts: list[str]) -> dict[str, Any]:
    body = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    began = time.perf_counter()
    answer = httpx.post(
        f"{address}/v1/geoids", content=body, headers={"Content-Type": "application/x-ndjson"}, timeout=600
    )
    took = time.perf_counter() - began
    answer.raise_for_status()
    results = [json.loads(line) for line in answer.text.splitlines()]
    accepted = [each for each in results if "geoid" in each]
    return {
        "statements": len(texts),
        "committed": len(accepted),
        "per_second": round(len(accepted) / took, 1),
        "contradictions": sum(len(each["contradictions"]) for each in accepted),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", action="store_true", help="only the one JSON line")
    parser.add_argument("--statements", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=50, help="publishes that latency is measured on")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    arguments = parser.parse_args()
    texts = list(dict.fromkeys(
        row[side] for row in rows(arguments.data / "snli_dev.jsonl.gz") for side in ("premise", "hypothesis")
    ))[: arguments.statements]  # fmt: skip
    result: dict[str, Any] = {"processors": os.cpu_count(), "load_at_start": os.getloadavg()[0]}
    for mode in arguments.modes:
        with server(MODES[mode]) as address:
            result[mode] = {"ingest": ingest(address, texts), "latency": anyio.run(latency, address, arguments.rounds)}
    result["encoder"] = encoder(texts[:512])
    if not arguments.json:
        print(json.dumps(result, indent=2))
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
