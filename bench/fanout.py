"""Fan-out against the limit and against peers: ``python -m bench.fanout --json``.

Every server runs in a process of its own on one core, the C load client on another. Rounds are paired: within a round each server
does the same work one after the other, and only ratios within a round are compared; medians are reported. Where the machine is busy with
other things, ``per_cpu_second`` (deliveries per second of the server's processor time) says more than ``per_second``. The client checks order,
gaps and repeats for every subscriber, and a run with one missing event does not count.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE, CLIENT_CORE = CORES[0], CORES[-1]


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

    def end(self) -> None:
        self.child.kill()
        self.child.wait()


class Rig:
    """One server with its subscribers connected."""

    def __init__(self, name: str, tools: Path, subscribers: int, filters: int = 1, **env: str) -> None:
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
        if name == "kimera":
            body: dict[str, Any] = {"channel": "geoids"}
            text = json.dumps({"op": "connect", "id": 1, "subs": [body]})
            if filters > 1:
                filter = ',"filter":{"field":"data.k","op":"eq","value":%d}}]'
                text = text.replace("}]", filter)
            hello = text
        self.before = self.usage()
        begun = time.monotonic()
        self.client = Process(
            [str(tools / "fanout_client"), self.port, str(subscribers), str(filters), hello], CLIENT_CORE
        )
        assert self.client.hear() == "ready"
        self.handshakes = subscribers / (time.monotonic() - begun)

    def usage(self) -> dict[str, float]:
        """Resident bytes and processor seconds of the server so far."""
        fields = Path(f"/proc/{self.server.child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks = os.sysconf("SC_CLK_TCK")
        return {
            "rss": int(fields[21]) * os.sysconf("SC_PAGESIZE"),
            "cpu": (int(fields[11]) + int(fields[12])) / ticks,
        }

    def push(self, batch: int, seconds: float, rate: float = 0) -> dict[str, float]:
        """One run; the figures of server and client together."""
        self.client.say(f"reset {self.next}")
        assert self.client.hear() == "reset"
        before = self.usage()["cpu"]
        self.server.say(f"push {batch} {seconds} {rate} {self.next} {self.filters}")
        served = json.loads(self.server.hear())
        self.next = int(served["last"]) + 1
        self.client.say(f"until {self.next - 1}")
        seen = json.loads(self.client.hear())
        # Up to the last delivery: a server that queues goes on working when it has been told everything.
        used = self.usage()["cpu"] - before
        expected = served["events"] * self.subscribers / self.filters
        if seen["wrong"] or seen["lost"] or abs(seen["deliveries"] - expected) > self.subscribers:
            raise RuntimeError(
                f"{self.name}: an event is missing, repeated or out of order: {seen}, expected {expected}"
            )
        if self.filters == 1 and seen["deliveries"] != expected:
            raise RuntimeError(f"{self.name}: {seen['deliveries']} deliveries, expected {expected}")
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
    """The same run on every rig, round by round; figures by server and ratios to the C server within each round."""
    results: dict[str, list[dict[str, float]]] = {rig.name: [] for rig in rigs}
    for _ in range(rounds):
        for rig in rigs:
            results[rig.name].append(rig.push(**run))  # type: ignore[arg-type]
    out: dict[str, Any] = {}
    for name, runs in results.items():
        out[name] = {key: round(statistics.median(run[key] for run in runs), 4) for key in runs[0]}
        out[name]["ratios_to_c"] = {
            key: round(statistics.median(a[key] / b[key] for a, b in zip(runs, results["c"], strict=True) if b[key]), 3)
            for key in ("per_second", "per_cpu_second", "cpu", "p50_ms", "p99_ms")
        }
    return out


def build(folder: Path) -> None:
    for name in ("fanout_client", "fanout_server"):
        subprocess.run(["cc", "-O2", "-o", str(folder / name), str(HERE / f"{name}.c")], check=True)


def throughput(tools: Path, names: list[str], rounds: int, seconds: float, subscribers: int) -> dict[str, Any]:
    rigs = [Rig(name, tools, subscribers) for name in names]
    try:
        return {f"batch_{batch}": paired(rigs, rounds, batch=batch, seconds=seconds) for batch in (1, 32)}
    finally:
        for rig in rigs:
            rig.end()


def filtered(tools: Path, rounds: int, seconds: float, subscribers: int) -> dict[str, Any]:
    rigs = [Rig(name, tools, subscribers, filters=10) for name in ("c", "kimera")]
    try:
        return paired(rigs, rounds, batch=320, seconds=seconds)
    finally:
        for rig in rigs:
            rig.end()


def steady(tools: Path, rounds: int, seconds: float, subscribers: int) -> dict[str, Any]:
    rigs = [Rig("c", tools, subscribers), Rig("kimera", tools, subscribers, BENCH_TICK="0.001")]
    try:
        return {
            f"{rate}_per_second": paired(rigs, rounds, batch=rate // 100, seconds=seconds, rate=rate)
            for rate in (100, 1000)
        }
    finally:
        for rig in rigs:
            rig.end()


def reconnect(tools: Path, subscribers: int, behind: int) -> dict[str, Any]:
    """Everyone comes back at once, each ``behind`` events late, while 200 events a second go on being published."""
    rig = Rig("kimera", tools, 1, BENCH_TICK="0.001")
    watcher, others = rig.client, None
    try:
        while rig.next <= behind:
            rig.push(100, 0.005)
        since = {"epoch": "bench", "offset": rig.next - 1 - behind}
        hello = json.dumps({"op": "connect", "id": 1, "subs": [{"channel": "geoids", "since": since}]})
        watcher.say(f"reset {rig.next}")
        assert watcher.hear() == "reset"
        others = Process([str(tools / "fanout_client"), rig.port, str(subscribers), "1", hello], CLIENT_CORE)
        others.say(f"reset {since['offset'] + 1}")
        rig.server.say(f"push 2 8 200 {rig.next} 1")
        begun = time.monotonic()
        heard = sorted([others.hear(), others.hear()])
        assert heard == ["ready", "reset"], heard
        caught_up_from = time.monotonic()
        others.say(f"until {rig.next - 1}")
        seen = json.loads(others.hear())
        caught_up = time.monotonic() - begun
        served = json.loads(rig.server.hear())
        others.say(f"until {served['last']}")
        watcher.say(f"until {served['last']}")
        rest, live = json.loads(others.hear()), json.loads(watcher.hear())
        if seen["wrong"] or rest["wrong"] or live["wrong"]:
            raise RuntimeError("an event is missing, repeated or out of order")
        return {
            "subscribers": subscribers,
            "behind": behind,
            "seconds_until_all_caught_up": round(caught_up, 3),
            "of_which_handshakes": round(caught_up_from - begun, 3),
            "live_p50_ms": live["p50_ms"],
            "live_p99_ms": live["p99_ms"],
            "deliveries_checked": rest["deliveries"],
        }
    finally:
        if others is not None:
            others.end()
        rig.end()


def idle(tools: Path, names: list[str], subscribers: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    last: dict[str, float] = {}
    for name in names:
        rig = Rig(name, tools, subscribers)
        try:
            after = rig.usage()
            out[name] = {
                "handshakes_per_second": round(rig.handshakes),
                "handshakes_per_cpu_second": round(subscribers / max(0.01, after["cpu"] - rig.before["cpu"])),
                "kib_per_connection": round((after["rss"] - rig.before["rss"]) / subscribers / 1024, 2),
            }
            runs = [rig.push(1, 0.0001)["max_ms"] for _ in range(5)] if name in ("c", "kimera") else []
            if runs:
                last[name] = statistics.median(runs)
                out[name]["last_of_one_event_ms"] = round(last[name], 2)
        finally:
            rig.end()
    if len(last) == 2:
        out["last_delivery_ratio"] = round(last["kimera"] / last["c"], 3)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--subscribers", type=int, default=1000)
    parser.add_argument("--idle", type=int, default=10_000)
    parser.add_argument("--only", nargs="*", choices=["throughput", "filters", "steady", "reconnect", "idle"])
    parser.add_argument("--peers", nargs="*", default=["starlette", "websockets"])
    arguments = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    peers = list(arguments.peers) + (["bun"] if shutil.which("bun") else [])
    wanted = arguments.only or ["throughput", "filters", "steady", "reconnect", "idle"]
    result: dict[str, Any] = {"subscribers": arguments.subscribers, "rounds": arguments.rounds}
    with tempfile.TemporaryDirectory() as folder:
        tools = Path(folder)
        build(tools)
        if "throughput" in wanted:
            names = ["c", "kimera", *peers]
            result["throughput"] = throughput(tools, names, arguments.rounds, arguments.seconds, arguments.subscribers)
        if "filters" in wanted:
            result["filters_10"] = filtered(tools, arguments.rounds, arguments.seconds, arguments.subscribers)
        if "steady" in wanted:
            result["steady"] = steady(tools, arguments.rounds, arguments.seconds, arguments.subscribers)
        if "reconnect" in wanted:
            result["reconnect"] = reconnect(tools, 2000, 1000)
        if "idle" in wanted:
            result["idle"] = idle(tools, ["c", "kimera", *[p for p in peers if p != "bun"]], arguments.idle)
    print(json.dumps(result, indent=None if arguments.json else 2))


if __name__ == "__main__":
    main()
