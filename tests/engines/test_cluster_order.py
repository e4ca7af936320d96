"""What a session says keeps its order, whatever the bus loses and whoever owns its partition: an edge and two engines on a bus that
forgets some of what it holds, with pipelines that commit one after the other and only for the owner."""

import random
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from kimera_stream.core.coverage import SliceState
from kimera_stream.core.interfaces import PublishResult
from kimera_stream.core.vault.errors import LeaseLostError
from kimera_stream.engines.cluster.desk import Desk
from kimera_stream.engines.cluster.errands import Errands
from kimera_stream.engines.cluster.wire import PublishRequest, decode_answers
from kimera_stream.engines.work import RequestId
from kimera_stream.infrastructure.bus.interface import Lost, replies
from kimera_stream.infrastructure.bus.memory import MemoryBroker, MemoryBus
from kimera_stream.infrastructure.settings import BusSettings
from kimera_stream.infrastructure.tasks import Service, ServiceSpec
from kimera_stream.protocol.errors import OperationalError
from kimera_stream.protocol.objects import Geoid, GeoidBody

pytestmark = pytest.mark.anyio

SETTINGS = BusSettings(slices=1, retry_after=0.05, claim_after=0.05)
LANES = ("one", "two", "three")
EACH = 40


class Truth:
    """The log, and who may write to it."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.done: dict[str, int] = {}
        self.owner = ("", 0)


class Pipeline:
    """One after the other, and some of it only when its owner is another one."""

    def __init__(self, name: str, truth: Truth, rng: random.Random) -> None:
        self._name = name
        self._truth = truth
        self._rng = rng
        self._queue: deque[tuple[str, RequestId, anyio.Event, list[Any]]] = deque()
        self._came = anyio.Event()

    async def publish(self, body: GeoidBody, *, request: RequestId, **_fields: Any) -> PublishResult:
        assert body.text is not None
        outcome: list[Any] = []
        done = anyio.Event()
        self._queue.append((body.text, request, done, outcome))
        self._came.set()
        await done.wait()
        if isinstance(outcome[0], OperationalError):
            raise outcome[0]
        return outcome[0]

    async def run(self) -> None:
        while True:
            while not self._queue:
                self._came = anyio.Event()
                await self._came.wait()
            for _ in range(self._rng.choice([0, 0, 0, 5, 40])):
                await anyio.lowlevel.checkpoint()
            text, request, done, outcome = self._queue.popleft()
            outcome.append(self._commit(text, request))
            done.set()

    def _commit(self, text: str, request: RequestId) -> PublishResult | OperationalError:
        truth = self._truth
        if truth.owner != (self._name, request.generation):
            return LeaseLostError.of([request.partition])
        if request.id not in truth.done:
            truth.log.append(text)
            truth.done[request.id] = len(truth.log)
        offset = truth.done[request.id]
        geoid = Geoid(
            id=text, version=1, semantic_state={}, symbolic_state={}, metadata={}, entropy=0.0, created_at=1, updated_at=1,
            offset=offset,
        )  # fmt: skip
        return PublishResult(geoid, offset, [], duplicate=False)


class Cluster:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.broker = MemoryBroker()
        self.truth = Truth()
        self.edge = MemoryBus(self.broker, "edge", SETTINGS)
        self.errands = Errands(self.edge, SETTINGS, max_items=1_000, max_bytes=1_000_000, at_most=60.0)
        self.buses = {name: MemoryBus(self.broker, name, SETTINGS) for name in ("left", "right")}
        self.pipelines = {name: Pipeline(name, self.truth, self.rng) for name in self.buses}
        self.desks = {
            name: Desk(bus, self.pipelines[name], most=1_000, forget_after=60.0)  # type: ignore[arg-type]
            for name, bus in self.buses.items()
        }
        self.answered = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with anyio.create_task_group() as group:
            for bus in (self.edge, *self.buses.values()):
                service = Service(ServiceSpec("bus", bus.serve))
                group.start_soon(bus.serve, service)
                await service.became_ready.wait()
            group.start_soon(self._hear)
            group.start_soon(self.errands.run)
            for name, desk in self.desks.items():
                group.start_soon(self.pipelines[name].run)
                group.start_soon(desk.run)
            yield
            group.cancel_scope.cancel()

    async def _hear(self) -> None:
        async with self.edge.follow(replies("edge")) as follower:
            while True:
                for each in await follower.receive():
                    if isinstance(each, Lost):
                        self.errands.lost()
                    elif self.rng.random() < 0.95:  # else lost, and nobody is told
                        self.errands.heard(decode_answers(each.payload))

    async def speak(self, lane: str) -> None:
        async with anyio.create_task_group() as group:
            for number in range(EACH):
                asked = PublishRequest(at=int(2e12), principal="ann", body=GeoidBody(text=f"{lane}-{number}"))
                group.start_soon(self._say, lane, asked)
                for _ in range(self.rng.choice([0, 1, 3, 10])):
                    await anyio.lowlevel.checkpoint()

    async def _say(self, lane: str, asked: PublishRequest) -> None:
        await self.errands.send(("ann", lane), asked)
        self.answered += 1

    async def disturb(self) -> None:
        """Until cancelled: forget, move, lose contact."""
        while True:
            await anyio.sleep(0.002 + self.rng.random() * 0.01)
            match self.rng.randrange(6):
                case 0:
                    self.broker.flush()
                case 1 | 2:  # Redis restarted, say, between two commands: some is gone, and what came later is there
                    for pieces in self.broker.pieces.values():
                        for gone in self.rng.sample(sorted(pieces), k=len(pieces) // 3):
                            del pieces[gone]
                case 3 | 4:
                    await self.move()
                case 5:
                    self.broker.cut()
                    await anyio.sleep(self.rng.random() * 0.005)
                    self.broker.mend()

    async def move(self) -> None:
        """Another engine has the partition, or the same one again; the former owner may learn of it late."""
        name, generation = self.truth.owner
        heir = self.rng.choice(list(self.desks))
        self.truth.owner = (heir, generation + 1)
        late = self.rng.random() < 0.5
        if name and not (late and name != heir):
            await self.desks[name].lose([0])
        await self.desks[heir].gain({0: SliceState(0, heir, generation + 1, True, 0)})
        if name and late and name != heir:
            await anyio.sleep(self.rng.random() * 0.01)
            await self.desks[name].lose([0])


@pytest.mark.parametrize("seed", range(6))
async def test_every_session_is_in_the_order_in_which_it_spoke(seed: int) -> None:
    made = Cluster(seed)
    with anyio.fail_after(60):
        async with made.running(), anyio.create_task_group() as disturbing:
            await made.move()
            disturbing.start_soon(made.disturb)
            async with anyio.create_task_group() as speaking:
                for lane in LANES:
                    speaking.start_soon(partial(made.speak, lane))
            disturbing.cancel_scope.cancel()
    assert made.answered == EACH * len(LANES)
    for lane in LANES:
        said = [text for text in made.truth.log if text.startswith(lane)]
        assert said == [f"{lane}-{number}" for number in range(EACH)]
    assert made.errands.numbers.added_again > 0
