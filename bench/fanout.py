"""Fan-out against the limit and against peers: ``python -m bench.fanout --json`` (about five minutes; ``--quick``: one).

Every server runs in a process of its own on one core, the C load client on another. Rounds are paired: within a round each server
does the same work one after the other, and only ratios within a round are compared; medians are reported. Where the machine is busy with
other things, ``per_cpu_second`` (deliveries per second of the server's processor time) says more than ``per_second``. The client checks order,
gaps and repeats for every subscriber, and a run with one missing event does not count: it ends the bench.

Peers are measured where they are installed: Bun (``npm install -g bun``) and socketify (``pip install .[bench]``, needs libuv).
"""

import argparse
import importlib.util
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.fanout_rig import CLIENT_CORE, Process, Rig, build, paired, ratios

RUNS = ("throughput", "filters", "steady", "handshakes", "idle", "reconnect", "ingest")


@dataclass(frozen=True)
class Plan:
    """How much is measured. Seconds, connections, rounds."""

    tools: Path
    peers: list[str]
    rounds: int
    seconds: float
    subscribers: int
    idle: int
    reconnecting: int


def throughput(plan: Plan) -> dict[str, Any]:
    """As fast as back-pressure allows, with one and with 32 events a tick."""
    rigs = [Rig(name, plan.tools, plan.subscribers) for name in ("c", "kimera", *plan.peers)]
    try:
        return {f"batch_{batch}": paired(rigs, plan.rounds, batch=batch, seconds=plan.seconds) for batch in (1, 32)}
    finally:
        for rig in rigs:
            rig.end()


def filtered(plan: Plan) -> dict[str, Any]:
    """The subscribers spread over ten filters; 32 events a tick for each."""
    rigs = [Rig(name, plan.tools, plan.subscribers, filters=10) for name in ("c", "kimera")]
    try:
        return paired(rigs, plan.rounds, batch=320, seconds=plan.seconds)
    finally:
        for rig in rigs:
            rig.end()


def steady(plan: Plan) -> dict[str, Any]:
    """100 and 1,000 events a second in ticks of 10 ms."""
    rigs = [Rig("c", plan.tools, plan.subscribers), Rig("kimera", plan.tools, plan.subscribers, BENCH_TICK="0.001")]
    try:
        return {
            f"{rate}_per_second": paired(rigs, plan.rounds, batch=rate // 100, seconds=plan.seconds * 1.5, rate=rate)
            for rate in (100, 1000)
        }
    finally:
        for rig in rigs:
            rig.end()


def handshakes(plan: Plan) -> dict[str, Any]:
    """Connections opened one after the other's answer, 128 at once; ours also with ``connect`` and a subscription each."""
    kinds = [("c", False), ("kimera", True), ("kimera", False), ("starlette", False)]
    results: dict[str, list[dict[str, float]]] = {}
    for _ in range(plan.rounds):
        for name, bare in kinds:
            rig = Rig(name, plan.tools, plan.idle // 3, bare=bare)
            rig.end()
            label = "kimera_with_connect_and_subscription" if name == "kimera" and not bare else name
            results.setdefault(label, []).append(
                {"per_second": rig.handshakes, "per_cpu_second": rig.handshakes_per_cpu}
            )
    out: dict[str, Any] = {
        name: {key: round(statistics.median(run[key] for run in runs)) for key in runs[0]}
        for name, runs in results.items()
    }
    for name in ("kimera", "kimera_with_connect_and_subscription"):
        out[name]["to_starlette"] = ratios(results[name], results["starlette"], ("per_second", "per_cpu_second"))
    return out


def idle(plan: Plan) -> dict[str, Any]:
    """Memory of connections that do nothing (ours have a subscription), and one event to all of them."""
    out: dict[str, Any] = {}
    rigs: list[Rig] = []
    try:
        for name in ("c", "kimera", *plan.peers):
            rig = Rig(name, plan.tools, plan.idle)
            kib = (rig.server.usage()["rss"] - rig.before["rss"]) / plan.idle / 1024
            out[name] = {"kib_per_connection": round(kib, 2)}
            if name in ("c", "kimera"):
                rigs.append(rig)
            else:
                rig.end()
        for rig in rigs:
            rig.push(1, 0.0001)
        out["one_event"] = paired(rigs, plan.rounds * 3, batch=1, seconds=0.0001)
        times = {rig.name: out["one_event"][rig.name]["max_ms"] for rig in rigs}
        out["last_delivery_ratio"] = round(times["kimera"] / times["c"], 3)
    finally:
        for rig in rigs:
            rig.end()
    return out


def reconnect(plan: Plan, behind: int = 1000, rate: int = 200, seconds: int = 8) -> dict[str, Any]:
    """Everyone comes back at once, each ``behind`` events late, while ``rate`` events a second go on being published."""
    rig = Rig("kimera", plan.tools, 1, BENCH_TICK="0.001")
    watcher, others = rig.client, None
    try:
        while rig.next <= behind:
            rig.push(100, 0.005)
        since = {"epoch": "bench", "offset": rig.next - 1 - behind}
        hello = json.dumps({"op": "connect", "id": 1, "subs": [{"channel": "geoids", "since": since}]})
        watcher.say(f"reset {rig.next}")
        assert watcher.hear() == "reset"
        used = rig.server.usage()["cpu"]
        others = Process([str(plan.tools / "fanout_client"), rig.port, str(plan.reconnecting), "1", hello], CLIENT_CORE)
        others.say(f"reset {since['offset'] + 1}")
        rig.server.say(f"push {rate // 100} {seconds} {rate} {rig.next} 1")
        begun = time.monotonic()
        heard = sorted([others.hear(), others.hear()])
        assert heard == ["ready", "reset"], heard
        connected = time.monotonic()
        others.say(f"until {rig.next - 1}")
        seen = json.loads(others.hear())
        caught_up = time.monotonic() - begun
        served = json.loads(rig.server.hear())
        others.say(f"until {served['last']}")
        watcher.say(f"until {served['last']}")
        rest, live = json.loads(others.hear()), json.loads(watcher.hear())
        expected = plan.reconnecting * (behind + served["events"])
        if seen["wrong"] or rest["wrong"] or live["wrong"] or rest["deliveries"] != expected:
            raise RuntimeError(f"an event is missing, repeated or out of order: {rest}, expected {expected} deliveries")
        return {
            "subscribers": plan.reconnecting,
            "behind": behind,
            "seconds_until_all_caught_up": round(caught_up, 3),
            "of_which_handshakes": round(connected - begun, 3),
            "server_cpu_seconds": round(rig.server.usage()["cpu"] - used, 2),
            "live_p50_ms": live["p50_ms"],
            "live_p99_ms": live["p99_ms"],
            "deliveries_checked": rest["deliveries"],
        }
    finally:
        if others is not None:
            others.end()
        rig.end()


def while_encoding(plan: Plan) -> dict[str, Any]:
    """100 events a second while the same process, on the same core, encodes statements without a pause; and without that."""
    out: dict[str, Any] = {}
    for name, busy in (("quiet", ""), ("encoding", "1")):
        rig = Rig("kimera", plan.tools, plan.subscribers, BENCH_TICK="0.001", BENCH_ENCODE=busy)
        try:
            run = rig.push(1, plan.seconds * 5, 100)
            out[name] = {key: run[key] for key in ("p50_ms", "p99_ms", "max_ms")}
            if busy:
                rig.server.say("encoded")
                out["statements_encoded"] = json.loads(rig.server.hear())
        finally:
            rig.end()
    return out


def installed(peers: list[str]) -> list[str]:
    """Those of ``peers`` that are here; says which are not."""
    there = {"bun": shutil.which("bun") is not None, "socketify": importlib.util.find_spec("socketify") is not None}
    missing = [peer for peer in peers if not there.get(peer, True)]
    if missing:
        sys.stderr.write(f"not installed, so not measured: {', '.join(missing)}\n")
    return [peer for peer in peers if peer not in missing]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds, fewer connections")
    parser.add_argument("--rounds", type=int, help="5; quick: 3")
    parser.add_argument("--seconds", type=float, help="of one round; 1.0; quick: 0.4")
    parser.add_argument("--subscribers", type=int, default=1000)
    parser.add_argument("--idle", type=int, help="connections; 10,000; quick: 3,000")
    parser.add_argument("--only", nargs="*", choices=RUNS)
    parser.add_argument("--peers", nargs="*", default=["bun", "socketify", "starlette", "websockets"])
    given = parser.parse_args()
    quick = given.quick
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(
            tools=Path(folder),
            peers=installed(given.peers),
            rounds=given.rounds or (3 if quick else 5),
            seconds=given.seconds or (0.4 if quick else 1.0),
            subscribers=given.subscribers,
            idle=given.idle or (3_000 if quick else 10_000),
            reconnecting=500 if quick else 2_000,
        )
        result: dict[str, Any] = {
            "processors": os.cpu_count(),
            "load_at_start": os.getloadavg()[0],
            "subscribers": plan.subscribers,
            "rounds": plan.rounds,
        }
        build(plan.tools)
        runs = {
            "throughput": lambda: throughput(plan),
            "filters": lambda: filtered(plan),
            "steady": lambda: steady(plan),
            "handshakes": lambda: handshakes(plan),
            "idle": lambda: idle(plan),
            "reconnect": lambda: reconnect(plan),
            "ingest": lambda: while_encoding(plan),
        }
        for name in given.only or RUNS:
            result[name] = runs[name]()
            if not given.json:
                print(json.dumps({name: result[name]}, indent=2), flush=True)
    result["load_at_end"] = os.getloadavg()[0]
    result["took_seconds"] = round(time.monotonic() - began)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
