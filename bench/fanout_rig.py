"""What bench/fanout.py measures with: a pinned server, the C load client on another core, and runs that are paired."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE, CLIENT_CORE = CORES[0], CORES[-1]
HELLO = json.dumps({"op": "connect", "id": 1, "subs": [{"channel": "geoids"}]})


class Process:
    """A pinned child that is spoken to line by line."""

    def __init__(self, arguments: list[str], core: int, **env: str) -> None:
        self.child = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | env,
            cwd=HERE.parent,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),  # noqa: PLW1509
        )

    def say(self, line: str) -> None:
        assert self.child.stdin is not None
        self.child.stdin.write(line + "\n")
        self.child.stdin.flush()

    def hear(self) -> str:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.child.args} ended")
        return line.strip()

    def usage(self) -> dict[str, float]:
        """Resident bytes and processor seconds so far, all threads."""
        fields = Path(f"/proc/{self.child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks = os.sysconf("SC_CLK_TCK")
        return {
            "rss": int(fields[21]) * os.sysconf("SC_PAGESIZE"),
            "cpu": (int(fields[11]) + int(fields[12])) / ticks,
        }

    def end(self) -> None:
        self.child.kill()
        self.child.wait()


class Rig:
    """One server with its subscribers connected.

    Args:
        filters: Subscribers are spread over this many distinct filters.
        bare: With ours: only the handshake, no ``connect`` and no subscription.
    """

    def __init__(
        self, name: str, tools: Path, subscribers: int, filters: int = 1, *, bare: bool = False, **env: str
    ) -> None:
        self.name = name
        self.subscribers = subscribers
        self.filters = filters
        self.next = 1
        command = {
            "c": [str(tools / "fanout_server")],
            "bun": ["bun", str(HERE / "fanout_bun.js")],
        }.get(name, [sys.executable, "-m", "bench.fanout_servers", name])
        self.server = Process(command, SERVER_CORE, **env)
        self.port = self.server.hear()
        hello = ""
        if name == "kimera" and not bare:
            hello = HELLO
            if filters > 1:
                hello = hello.replace("}]", ',"filter":{"field":"data.k","op":"eq","value":%d}}]')
        self.before = self.server.usage()
        begun = time.monotonic()
        self.client = Process(
            [str(tools / "fanout_client"), self.port, str(subscribers), str(filters), hello], CLIENT_CORE
        )
        assert self.client.hear() == "ready"
        self.handshakes = subscribers / (time.monotonic() - begun)
        self.handshakes_per_cpu = subscribers / max(0.01, self.server.usage()["cpu"] - self.before["cpu"])

    def push(self, batch: int, seconds: float, rate: float = 0) -> dict[str, float]:
        """One run; the figures of server and client together."""
        self.client.say(f"reset {self.next}")
        assert self.client.hear() == "reset"
        before = self.server.usage()["cpu"]
        self.server.say(f"push {batch} {seconds} {rate} {self.next} {self.filters}")
        served = json.loads(self.server.hear())
        first, self.next = self.next, int(served["last"]) + 1
        self.client.say(f"until {self.next - 1}")
        seen = json.loads(self.client.hear())
        # Up to the last delivery: a server that queues goes on working when it has been told everything.
        used = self.server.usage()["cpu"] - before
        expected = sum(
            len(range(first + (i - first) % self.filters, self.next, self.filters)) for i in range(self.subscribers)
        )
        if seen["wrong"] or seen["lost"] or seen["deliveries"] != expected:
            raise RuntimeError(
                f"{self.name}: an event is missing, repeated or out of order: {seen}, expected {expected} deliveries"
            )
        return {
            "per_second": seen["deliveries"] / seen["from_reset"],
            "per_cpu_second": seen["deliveries"] / max(used, 0.005),
            "cpu": served["cpu"] / served["seconds"],
            "p50_ms": seen["p50_ms"],
            "p99_ms": seen["p99_ms"],
            "max_ms": seen["max_ms"],
        }

    def end(self) -> None:
        self.client.end()
        self.server.end()


def paired(rigs: list[Rig], rounds: int, **run: float) -> dict[str, Any]:
    """The same run on every rig, round by round; medians by server, and of the ratios within each round to the C server's
    and, for ours, to every peer's.
    """
    results: dict[str, list[dict[str, float]]] = {rig.name: [] for rig in rigs}
    for number in range(rounds):
        # Every other round backwards: what drifts within a round then favours nobody.
        for rig in rigs if number % 2 == 0 else rigs[::-1]:
            results[rig.name].append(rig.push(**run))  # type: ignore[arg-type]
    out: dict[str, Any] = {}
    for name, runs in results.items():
        out[name] = {key: round(statistics.median(run[key] for run in runs), 4) for key in runs[0]}
        if name != "c":
            out[name]["ratios_to_c"] = ratios(
                runs, results["c"], ("per_second", "per_cpu_second", "cpu", "p50_ms", "p99_ms")
            )
    if "kimera" in results:
        out["kimera_to_peers"] = {
            name: ratios(results["kimera"], runs, ("per_second", "per_cpu_second"))
            for name, runs in results.items()
            if name not in ("c", "kimera")
        }
    return out


def ratios(ours: list[dict[str, float]], theirs: list[dict[str, float]], keys: tuple[str, ...]) -> dict[str, float]:
    """Medians of the ratios within each round."""
    return {
        key: round(statistics.median(a[key] / b[key] for a, b in zip(ours, theirs, strict=True) if b[key]), 3)
        for key in keys
    }


def build(folder: Path) -> None:
    """Compile the C server and client into ``folder``."""
    for name in ("fanout_client", "fanout_server"):
        subprocess.run(["cc", "-O2", "-o", str(folder / name), str(HERE / f"{name}.c")], check=True)
