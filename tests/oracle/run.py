"""One run: publishers and subscribers at work on a deployment, faults from a plan, and then every check."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import anyio
import anyio.to_thread

from tests.oracle import damage
from tests.oracle.asking import ask_around
from tests.oracle.checks import check_all, check_prefix
from tests.oracle.chronicle import Chronicle
from tests.oracle.deployments import Deployment, backup, check, deployed, restore
from tests.oracle.faults import FAULTS, World
from tests.oracle.healing import SESSION, WATCHED, NotHealed, Prober
from tests.oracle.listeners import Listener
from tests.oracle.model import Entry, Heard, Ledger, Log
from tests.oracle.passes import Pass, Passes
from tests.oracle.plan import DAMAGE, Step, plan, weights_of
from tests.oracle.processes import NotStarted
from tests.oracle.publishers import Publisher, WebPublisher
from tests.oracle.readers import read_log
from tests.oracle.reference import Watched, compare, compare_matches, replay
from tests.oracle.tally import Tally
from tests.oracle.wire import Gone, Web

START = 30.0
"""Seconds in which nodes that are ready have to work together."""
QUIET = 60.0
"""Seconds in which publishers have to get answers to everything that they have said, once faults are over."""


@dataclass(frozen=True)
class Config:
    """A run.

    Attributes:
        faults: How many; None: until ``seconds`` are over.
        rate: Operations a second of each publisher.
        pause: Mean seconds of quiet between faults.
        scale: Of the lengths of faults.
        damage: Damage files, too, where the database is one.
        kinds: Only these faults.
        every_log: Compare each log with a serial run, and not only the last one, which holds the beginnings of all others.
        keep: How many entries of the log are kept; None: all. Not with damage, whose checks need all of it.
        slow: How many times longer recovery and answers may take than on a machine that nobody else uses.
    """

    deployment: str
    seed: int
    folder: Path
    faults: int | None = None
    seconds: float = 0.0
    rate: float = 8.0
    pause: float = 0.3
    scale: float = 1.0
    damage: bool = True
    kinds: frozenset[str] | None = None
    every_log: bool = False
    slow: float = 1.0
    keep: int | None = None


def steps(config: Config, *, shimmed: bool) -> Iterator[Step]:
    """The faults of a run, as far as their number is given."""
    weights = weights_of(config.deployment, shimmed=shimmed, damage=config.damage)
    if config.kinds is not None:
        weights = {kind: weight for kind, weight in weights.items() if kind in config.kinds}
    for step in plan(config.seed, weights, pause=config.pause, scale=config.scale):
        if config.faults is not None and step.number > config.faults:
            return
        yield step


@dataclass
class Progress:
    """How far a run is; for a line that is told now and then."""

    began: float = field(default_factory=time.monotonic)
    doing: str = "starting"
    tally: Tally | None = None
    ledger: Ledger | None = None
    listeners: list[Listener] = field(default_factory=list)

    def line(self) -> str:
        if self.tally is None or self.ledger is None:
            return self.doing
        seconds = int(time.monotonic() - self.began)
        counts = self.ledger.count()
        heard = sum(listener.heard.events for listener in self.listeners)
        resumes = sum(listener.heard.resumes for listener in self.listeners)
        return (
            f"{seconds // 60:02}:{seconds % 60:02} fault {sum(self.tally.faults.values())} {self.doing} | "
            f"acked {counts['acked']:,} refused {counts['refused']:,} unknown {counts['unknown']:,} | "
            f"heard {heard:,} resumes {resumes:,} | violations {len(self.tally.violations)}"
        )


class Run:
    """See the module."""

    def __init__(self, config: Config, progress: Progress) -> None:
        self._config = config
        self._progress = progress
        self.tally = Tally(config.seed, config.deployment)
        self._ledger = Ledger()
        self._passes = Passes(config.seed)
        self._listeners: list[Listener] = []
        self._publishers: list[Publisher] = []
        self._logs: list[Log] = []
        self._extra: tuple[str, ...] = ()
        self._chronicle: Chronicle | None = None
        self._watch: Watched
        self._prober: Prober
        self._world: World

    async def run(self) -> Tally:
        """Everything; never raises for a broken promise."""
        progress, config = self._progress, self._config
        progress.tally, progress.ledger = self.tally, self._ledger
        async with deployed(config.deployment, config.folder, keep=config.keep) as deployment:
            if deployment.library is None:
                known = {on: weights_of(config.deployment, shimmed=on, damage=config.damage) for on in (True, False)}
                self.tally.left_out = sorted(
                    (known[True].keys() - known[False].keys()) & (config.kinds or known[True].keys())
                )
            await self._populate(deployment)
            progress.listeners = self._listeners
            async with anyio.create_task_group() as group:
                for worker in (*self._listeners, *self._publishers):
                    group.start_soon(worker.run)
                if self._chronicle is not None:
                    group.start_soon(self._chronicle.run, name="chronicle")
                whole = False
                try:
                    await self._disturb(deployment)
                    progress.doing = "the last check"
                    await self._close_era(deployment)
                    whole = True
                except (NotHealed, NotStarted, Gone, TimeoutError) as error:
                    over = [
                        f"{node.name} ended by itself with {node.server.code}"
                        for node in deployment.nodes
                        if not node.server.running
                    ]
                    told = [progress.doing, type(error).__name__, str(error), *over]
                    self.tally.violations.append(": ".join(told))
                group.cancel_scope.cancel()
            self._look_for_defects(deployment)
            if whole:  # else it may have been damaged on purpose and not restored yet
                await self._audit(deployment)
        await self._compare()
        self._count()
        return self.tally

    # -- who takes part ----------------------------------------------------------------------------------------------------

    async def _populate(self, deployment: Deployment) -> None:
        seed, rate, ledger = self._config.seed, self._config.rate, self._ledger
        doors = [f"ws://{door.address}/v1/stream" for door in deployment.doors]
        web = [f"http://{door.address}" for door in deployment.doors]
        watch_body = {"watch": "lamp", "text": WATCHED, "kinds": ["related", "contradicts"]}
        with anyio.fail_after(START * self._config.slow):
            async with Web(deployment.reader) as http:
                while True:  # nodes that have just started may not have found each other yet
                    status, made = await http.ask("POST", "/v1/watches", json=watch_body)
                    if status in (200, 201):
                        break
                    await anyio.sleep(0.1)
        watch = made["channel"]
        self._watch = Watched(watch_body, watch)
        session = f"session:{SESSION}"
        self._extra = (watch, session)
        if self._config.keep is not None:
            self._chronicle = Chronicle(lambda: deployment.reader, self._extra)
        turned = doors[::-1]
        self._publishers = [
            Publisher("publisher-1", seed, doors, ledger, rate=rate, named=True),
            Publisher("publisher-2", seed, turned, ledger, rate=rate, encoding="msgpack"),
            Publisher("publisher-3", seed, doors, ledger, rate=rate, keyed=0.5, named=True),
            WebPublisher("publisher-4", seed, web, ledger, rate=rate / 2, named=True),
        ]

        def created(entry: Entry) -> bool:
            return entry.type == "geoid.created" or "probe" in entry.data["metadata"]

        only_created = {
            "any": [
                {"field": "type", "op": "eq", "value": "geoid.created"},
                {"field": "data.metadata.probe", "op": "exists"},
            ]
        }

        def listener(name: str, channel: str, places: list[str] = doors, **options: Any) -> Listener:
            wanted = options.pop("wanted", None)
            heard = Heard(name, channel, wanted, skips=options.get("mode") == "wander")
            return Listener(places, heard, seed, **options)

        self._listeners = [
            listener("all", "geoids", since=0),
            listener("packed", "geoids", turned, encoding="msgpack"),
            listener("filtered", "geoids", encoding="msgpack", filter=only_created, wanted=created),
            listener("cursor", "geoids", turned, mode="cursor"),
            listener("web", "geoids", web, mode="sse"),
            listener("clashes", "contradictions", turned, encoding="msgpack", since=0),
            listener("wanderer", "contradictions", mode="wander", since=0),
            listener("slow", "contradictions", pace=0.004),
            listener("scars", "scars"),
            listener("watch", watch, encoding="msgpack", since=0),
            listener("session", session, since=0),
            *(
                listener(f"guest-{number}", "scars", [door], passes=self._passes)
                for number, door in enumerate(doors, 1)
            ),
        ]
        slow = self._config.slow
        self._prober = Prober(deployment.reader, ledger, self._listeners, slow=slow)
        self._world = World(
            deployment, self._publishers, self._listeners, ledger, self.tally.violations, self._passes, slow
        )

    # -- faults --------------------------------------------------------------------------------------------------------------

    async def _disturb(self, deployment: Deployment) -> None:
        config = self._config
        await self._heal("the start")
        until = time.monotonic() + config.seconds
        for step in steps(config, shimmed=bool(deployment.clocks)):
            if config.faults is None and time.monotonic() > until:
                return
            await anyio.sleep(step.wait)
            self._progress.doing = f"{step.kind} (fault {step.number})"
            rng = Random(step.draw)
            if step.kind in DAMAGE:
                await self._damage(deployment, step, rng)
            else:
                await FAULTS[step.kind](self._world, step, rng)
            self.tally.faults[step.kind] += 1
            await self._heal(step.kind)

    async def _heal(self, what: str) -> None:
        began = time.monotonic()
        self._prober.url = self._world.deployment.reader
        await self._prober.probe()
        self.tally.slowest = max(self.tally.slowest, (time.monotonic() - began, what))
        await self._show_passes(self._passes.revoked[-1:])

    async def _show_passes(self, revoked: list[Pass]) -> None:
        """What was revoked stays so, whatever became of the nodes since."""
        urls = [node.server.url for node in self._world.deployment.nodes if node.door is not None]
        self.tally.violations += await self._passes.look(urls, revoked)
        self.tally.shown += len(urls) * len(revoked)

    # -- the end of a log --------------------------------------------------------------------------------------------------------

    async def _close_era(self, deployment: Deployment) -> Log:
        """Let everybody finish and hear everything, then read the log and check it all."""
        doing = self._progress.doing
        self._progress.doing = f"{doing}: waiting for publishers"
        for publisher in self._publishers:
            publisher.hush()
        with anyio.fail_after(QUIET * self._config.slow):
            for publisher in self._publishers:
                await publisher.idle()
        self._progress.doing = f"{doing}: the last probe"
        await self._heal("the end of a log")
        for listener in self._listeners:
            listener.rest(True)
        self._progress.doing = f"{doing}: reading the log"
        log = await read_log(
            deployment.reader,
            self._extra,
            slow=self._config.slow,
            chronicle=self._chronicle,
            keep=self._config.keep,
        )
        if self._chronicle is not None:
            self.tally.violations += self._chronicle.broken
        self._progress.doing = f"{doing}: hearing the log to its end"
        await self._hear_out(log)
        self._progress.doing = f"{doing}: asking every node"
        await self._show_passes(self._passes.revoked)
        urls = [node.server.url for node in deployment.nodes if node.door is not None]
        listening = sum(listener.heard.channel == "geoids" for listener in self._listeners)
        rng = Random(f"{self._config.seed}-asking-{self._ledger.era}")
        self.tally.violations += await ask_around(urls, log, listening, rng, slow=self._config.slow)
        self._progress.doing = f"{doing}: checking"
        heard = [*(listener.heard for listener in self._listeners), *self._world.witnessed]
        wrong = await anyio.to_thread.run_sync(
            lambda: check_all(self._ledger, log, heard, era=self._ledger.era, at_once=deployment.at_once)
        )
        self.tally.violations += wrong
        self._world.witnessed.clear()
        self.tally.logs += 1
        self.tally.entries += log.head
        if not self._config.every_log:
            self._logs.clear()  # what is compared in the end is kept alone: a log of half an hour takes its room
        self._logs.append(log)
        return log

    async def _hear_out(self, log: Log) -> None:
        """Give everybody the time to hear the log to its end; who does not is found by the check."""
        with anyio.move_on_after(QUIET * self._config.slow):
            for listener in self._listeners:
                listener.heard.until[log.epoch] = log.head
                selected = log.select(listener.heard.channel, 0, log.head)
                wanted = listener.heard.wanted
                last = next((each for each in reversed(selected) if wanted is None or wanted(each)), None)
                if last is not None:
                    await listener.reach(log.epoch, last.offset)

    async def _damage(self, deployment: Deployment, step: Step, rng: Random) -> None:
        """Back up, publish on, stop, damage the file, look at what comes of it, restore the backup, go on with a new log."""
        (node,) = deployment.nodes
        copy = self._config.folder / f"backup-{step.number}.sqlite3"
        kept = len(self._passes.revoked)
        await backup(deployment, copy)
        await anyio.sleep(step.length)
        truth = await self._close_era(deployment)
        assert node.door is not None
        if step.kind == "bit_flip_log":
            await node.server.kill()
        else:
            await node.server.end()
        node.door.upstream = None
        hurt = {"bit_flip": damage.flip_bit, "bit_flip_log": damage.flip_log_bit, "torn_page": damage.tear_page}[
            step.kind
        ]
        what = hurt(deployment.database, rng)
        code, said = await check(deployment.database_url)
        try:
            await node.server.start()
        except NotStarted as error:
            outcome = "refused to start"
            if "kimera-stream:" not in str(error):
                self.tally.violations.append(f"{what}: the server did not start and did not say why: {error}")
        else:
            reading = await damage.read_damaged(node.server.url, truth)
            outcome = self._judge(what, code, reading)
            if not node.server.running:
                outcome = f"ended by itself; {outcome}"
                if "the database file is damaged" not in node.server.said:
                    self.tally.violations.append(
                        f"{what}: the server ended and did not say why: {node.server.said[-2000:]}"
                    )
        await node.server.kill()
        first = next((line for line in said.splitlines() if line.startswith("problem")), said.strip()[-200:])
        self.tally.damage.append(f"{what}: {outcome}; db check ended with {code}: {first[:160]}")
        restore(deployment, copy)
        await node.start()
        log = await read_log(node.server.url, self._extra, slow=self._config.slow)
        self.tally.violations += check_prefix(log, truth)
        self._ledger.restored(log.head)
        del self._passes.revoked[kept:]
        for publisher in self._publishers:
            publisher.author.begin_again(set(log.listed))
            publisher.speak()
        for listener in self._listeners:
            listener.rest(False)

    def _judge(self, what: str, code: int, reading: damage.Reading) -> str:
        self.tally.violations += [f"{what}: {each}" for each in reading.altered[:5]]
        if code == 0:
            silent = reading.missing + reading.unlisted
            self.tally.violations += [f"{what}: {each}, and db check finds nothing" for each in silent[:5]]
            if reading.refused:
                self.tally.violations.append(f"{what}: {reading.refused[0]}, and db check finds nothing")
            return "no reader could tell"
        return (
            f"{len(reading.refused)} of {reading.pages} pages refused, {len(reading.missing)} events left out, "
            f"{len(reading.unlisted)} geoids differ"
        )

    # -- after the run -----------------------------------------------------------------------------------------------------------

    def _look_for_defects(self, deployment: Deployment) -> None:
        for node in deployment.nodes:
            for line in node.server.defects()[:5]:
                self.tally.violations.append(f"{node.name} crashed: {line}")

    async def _audit(self, deployment: Deployment) -> None:
        """What was not damaged on purpose is found to be whole."""
        self._progress.doing = "db check"
        for node in deployment.nodes:
            node.server.proceed()
            await node.server.end()
        code, said = await check(deployment.database_url)
        if code:
            self.tally.violations.append(f"db check of the last log ended with {code}: {said[-2000:]}")

    async def _compare(self) -> None:
        for number, log in enumerate(self._logs):
            self._progress.doing = f"the serial reference run {number + 1} of {len(self._logs)}"
            try:
                folder = self._config.folder / f"reference-{number}"
                reference = await replay(log, folder, self._world.deployment.library, self._watch)
            except (Gone, NotStarted) as error:
                self.tally.violations.append(f"the reference run failed: {error}")
                continue
            at_once = self._world.deployment.at_once
            result = await anyio.to_thread.run_sync(lambda: compare(log, reference, at_once=at_once))  # noqa: B023
            self.tally.found += result.found
            self.tally.compared += result.compared
            self.tally.violations += result.differences[:20]
            self.tally.violations += compare_matches(log, reference, self._watch.channel)[:20]
            self.tally.matches += len(log.channels[self._watch.channel])

    def _count(self) -> None:
        tally = self.tally
        tally.outcomes = self._ledger.count()
        tally.meanwhile = self._world.refused
        tally.repeats = sum(op.repeats for op in self._ledger.ops)
        for listener in self._listeners:
            tally.heard[listener.heard.name] = listener.heard.events
            tally.resumes += listener.heard.resumes
            tally.trimmed += listener.heard.told_of_trimming
            tally.closes.update(listener.codes)
        tally.seconds = time.monotonic() - self._progress.began


async def tell(progress: Progress, say: Callable[[str], None], every: float) -> None:
    """Tell how far it is, until cancelled."""
    while True:
        await anyio.sleep(every)
        say(progress.line())


def run(config: Config, say: Callable[[str], None], *, every: float = 10.0) -> Tally:
    """Run it all in an event loop of its own; ``say`` gets a line every so many seconds."""

    async def main() -> Tally:
        progress = Progress()
        async with anyio.create_task_group() as group:
            group.start_soon(tell, progress, say, every, name="progress")
            tally = await Run(config, progress).run()
            group.cancel_scope.cancel()
            return tally

    return anyio.run(main)
