"""The serial reference run: a fresh server is told the same statements in the log's order, one after the other and without
faults, and has to come to the same contradictions."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from tests.oracle.deployments import settings_of
from tests.oracle.model import Entry, Log
from tests.oracle.processes import Server
from tests.oracle.readers import read_log
from tests.oracle.shim import Shim
from tests.oracle.wire import Web, Wire, connected


@dataclass(frozen=True)
class Watched:
    """A watch of the run: what made it, and where it tells."""

    body: dict[str, Any]
    channel: str


_BODY = ("id", "text", "semantic_state", "symbolic_state", "metadata", "session_id", "originator_agent_id", "purpose")
TOLERANCE = 0.002
"""Difference of two scores of one pair: rows that were compared in the index and side by side differ in rounding."""


async def replay(log: Log, folder: Path, library: Path | None, watch: Watched) -> Log:
    """Tell a fresh server what the log tells; returns its log, in which the watch's channel has its name of the log put to the test.

    A contradiction that was resolved is resolved there, too, if it is open there at that place.

    Args:
        library: Of the shim: this server need not wait for the disk.
        watch: Stood there before anything was said.
    """
    await anyio.Path(folder).mkdir(parents=True, exist_ok=True)
    preload: dict[str, str] = {}
    if library is not None:
        shim = Shim(library, folder / "shim", folder)
        shim.sync_takes(-1)
        preload = shim.environment
    settings = settings_of({"KIMERA_EMBEDDING__BATCH_WAIT": "0"})
    server = Server(folder / "data", settings, folder / "reference.txt", preload)
    await server.start()
    try:
        async with Web(server.url) as web:
            _, made = await web.ask("POST", "/v1/watches", json=watch.body)
        async with connected(f"ws://{server.host}:{server.port}/v1/stream", "msgpack") as wire:
            await _tell(wire, log)
        reference = await read_log(server.url, (made["channel"],))
        reference.channels[watch.channel] = reference.channels.pop(made["channel"])
        return reference
    finally:
        with anyio.CancelScope(shield=True):
            await server.kill()


async def _tell(wire: Wire, log: Log) -> None:
    open_: dict[frozenset[str], str] = {}
    scars = {
        scar["contradiction_id"]: scar for scar in (e.data for e in log.channels["scars"] if e.type == "scar.formed")
    }
    for entry in log.entries.values():
        data = entry.data
        if entry.type in ("geoid.created", "geoid.updated"):
            body = {name: data[name] for name in _BODY if data.get(name) not in (None, {})}
            reply = await _done(wire, "publish", geoid=body)
            open_.update({frozenset((each["a"], each["b"])): each["id"] for each in reply["contradictions"]})
        elif entry.type == "geoid.deleted":
            await _done(wire, "delete", geoid_id=data["id"])
        elif entry.type == "contradiction.resolved":
            known = open_.get(frozenset((data["a"], data["b"])))
            if known is not None:
                message = {"contradiction_id": known, "decision": scars[data["id"]]["decision"]}
                await wire.answer(await wire.send("resolve", **message))


async def _done(wire: Wire, op: str, **fields: Any) -> dict[str, Any]:
    while True:
        reply = await wire.answer(await wire.send(op, **fields))
        if reply["op"] != "error":
            return reply
        assert reply["temporary"], reply
        await anyio.sleep(reply.get("retry_after") or 0.1)


Pair = tuple[str, str]


@dataclass
class _State:
    """Open contradictions as far as a log has been read."""

    open: dict[Pair, tuple[float, str]] = field(default_factory=dict)

    def take(self, entry: Entry) -> Pair | None:
        """Read one entry; the pair that it is about."""
        if not entry.type.startswith("contradiction."):
            return None
        data = entry.data
        pair = (min(data["a"], data["b"]), max(data["a"], data["b"]))
        if entry.type == "contradiction.found":
            self.open[pair] = (data["score"], data["gradient_type"])
        else:
            self.open.pop(pair, None)
        return pair


@dataclass
class Comparison:
    """What comparing two logs came to.

    Attributes:
        found: Contradictions that were found in the log put to the test.
        compared: States of pairs compared.
        differences: In words.
    """

    found: int = 0
    compared: int = 0
    differences: list[str] = field(default_factory=list)


def compare(log: Log, reference: Log, *, at_once: bool) -> Comparison:
    """Compare the open contradictions after each commit (``at_once``), or in the end.

    What one commit holds has one time. Of what it opens and closes again at once nobody needs to be told, and a serial run
    tells: hence commits are compared and not entries.

    Where contradictions follow their statements, somebody may resolve one whose end is already said and not yet found: then the end
    is compared, and without pairs that were ever resolved.
    """
    result = Comparison()
    ours, theirs = _State(), _State()
    result.found = sum(entry.type == "contradiction.found" for entry in log.entries.values())
    steps, reference_steps = list(_steps(log, at_once)), list(_steps(reference, at_once))
    settled: set[Pair] = set()
    if not at_once:
        ends = (entry.data for entry in log.entries.values() if entry.type == "contradiction.resolved")
        settled = {(min(each["a"], each["b"]), max(each["a"], each["b"])) for each in ends}
    same = 0
    while same < min(len(steps), len(reference_steps)) and steps[same][0].type == reference_steps[same][0].type:
        same += 1
    if same < max(len(steps), len(reference_steps)):
        where = steps[same][0].offset if same < len(steps) else log.head
        result.differences.append(f"from entry {where} on the reference run could not follow")
    touched: set[Pair] = set()
    for number, (step, reference_step) in enumerate(zip(steps[:same], reference_steps, strict=False)):
        for state, entries in ((ours, step), (theirs, reference_step)):
            touched |= {pair for entry in entries if (pair := state.take(entry)) is not None}
        last = number + 1 == same
        if last or (at_once and steps[number + 1][0].ts != step[0].ts):
            pairs = sorted(touched) if at_once else sorted((ours.open.keys() | theirs.open.keys()) - settled)
            for pair in pairs:
                result.compared += 1
                difference = _differ(ours.open.get(pair), theirs.open.get(pair))
                if difference:
                    lives = f"here {_lives(log, pair)}; in the serial run {_lives(reference, pair)}"
                    result.differences.append(
                        f"after entry {step[0].offset}, {' and '.join(pair)}: {difference}; {lives}"
                    )
            touched.clear()
    return result


def _lives(log: Log, pair: Pair) -> list[str]:
    """What the log tells of a pair: what to look into where two runs differ."""
    told: list[str] = []
    for entry in log.entries.values():
        data = entry.data
        if entry.type.startswith("geoid.") and data["id"] in pair:
            said = [data[name] for name in _BODY if name != "id" and data.get(name) not in (None, {})]
            told.append(f"{entry.offset} {entry.type} {data['id']} {said}")
        elif entry.type.startswith("contradiction.") and {data["a"], data["b"]} == set(pair):
            told.append(f"{entry.offset} {entry.type} {data['a']} {data['b']} {data['score']} {data.get('why')}")
    return told


def compare_matches(log: Log, reference: Log, channel: str) -> list[str]:
    """Compare what a watch told: of which statements, in which way, with which score."""
    ours, theirs = _matches(log, channel), _matches(reference, channel)
    wrong: list[str] = []
    for mark, kind in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get((mark, kind), []), theirs.get((mark, kind), [])
        if len(mine) != len(other):
            wrong.append(f"{channel}: {mark} matches {len(mine)} times as {kind}, in a serial run {len(other)} times")
        elif any(abs(one - two) > TOLERANCE for one, two in zip(sorted(mine), sorted(other), strict=True)):
            wrong.append(f"{channel}: {mark} matches as {kind} with {mine}, in a serial run with {other}")
    return wrong


def _matches(log: Log, channel: str) -> dict[tuple[str, str], list[float]]:
    """Scores by statement and kind."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for entry in log.channels[channel]:
        match = entry.data
        found[match["geoid"]["metadata"]["mark"], match["kind"]].append(match["score"])
    return found


def _steps(log: Log, at_once: bool) -> Iterator[list[Entry]]:
    """The log cut before each thing that somebody asked for; resolutions only where they have their place in the order."""
    step: list[Entry] = []
    for entry in log.entries.values():
        if entry.type.startswith("geoid.") or (at_once and entry.type == "contradiction.resolved"):
            if step:
                yield step
            step = []
        step.append(entry)
    if step:
        yield step


def _differ(ours: tuple[float, str] | None, theirs: tuple[float, str] | None) -> str:
    if ours is None and theirs is None:
        return ""
    if ours is None:
        return f"a serial run finds a contradiction {theirs}, it was not found"
    if theirs is None:
        return f"a contradiction {ours} was found, a serial run finds none"
    if abs(ours[0] - theirs[0]) > TOLERANCE or ours[1] != theirs[1]:
        return f"it was found with {ours}, a serial run finds it with {theirs}"
    return ""
