"""A steady load with everything coming and going: publishes, connections, subscriptions, watches, sessions, reads.

What is said is about a bounded number of geoids and sessions, so a server under it has no reason to grow.
"""

import itertools
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

FAULTS = (OSError, WebSocketException, httpx.HTTPError, TimeoutError)
"""What a client meets while connections are cut; counted, not raised."""
PLACES = ("harbour", "mill", "ward", "depot", "station", "quarry")


@dataclass
class Load:
    """How much of what, a second.

    Attributes:
        address: ``HOST:PORT`` of the server.
        publishes: Statements, over ``publishers`` connections that stay.
        connections: WebSocket connections that open, subscribe, read and close, one in four without a closing handshake.
        watches: Watches made and removed.
        reads: Searches, pages of history and lists, and Server-Sent Events streams in turn.
        geoids: Ids that are published to in turn; one publish in fifty deletes one.
        sessions: Session ids used in turn.
        cursors: Names of durable cursors that visitors move.
    """

    address: str
    publishes: float = 50.0
    publishers: int = 4
    connections: float = 10.0
    watches: float = 2.0
    reads: float = 5.0
    geoids: int = 600
    sessions: int = 300
    cursors: int = 40
    seed: int = 1
    done: Counter[str] = field(default_factory=Counter)

    async def run(self) -> None:
        """All of it until cancelled."""
        rng = random.Random(self.seed)
        numbers = itertools.count()
        async with (
            httpx.AsyncClient(base_url=f"http://{self.address}", timeout=30, trust_env=False) as web,
            anyio.create_task_group() as group,
        ):
            for number in range(self.publishers):
                group.start_soon(self._publish, numbers, number, name=f"publisher {number}")
            group.start_soon(self._paced, self.connections, lambda: self._visit(rng), group, name="visitors")
            group.start_soon(self._paced, self.watches, lambda: self._watch(web, rng), group, name="watches")
            group.start_soon(self._paced, self.reads, lambda: self._read(web, rng), group, name="reads")

    async def _paced(self, rate: float, act: Callable[[], Awaitable[None]], group: anyio.abc.TaskGroup) -> None:
        """Start ``act`` ``rate`` times a second, each on its own, at most a few seconds' worth of them at once."""
        if not rate:
            return
        slots = anyio.CapacityLimiter(max(4, int(4 * rate)))

        async def one() -> None:
            async with slots:
                try:
                    await act()
                except FAULTS as error:
                    self.done[f"fault: {type(error).__name__}"] += 1

        due = anyio.current_time()
        while True:
            if slots.available_tokens:
                group.start_soon(one, name=getattr(act, "__name__", "act"))
            due = max(due + 1 / rate, anyio.current_time() - 1)
            await anyio.sleep_until(due)

    async def _open(self, ws: ClientConnection, subs: list[dict[str, Any]]) -> None:
        await ws.send(json.dumps({"op": "connect", "id": 1, "subs": subs}))
        await ws.recv()

    # -- what is said --------------------------------------------------------------------------------------------------

    def _statement(self, number: int) -> dict[str, Any]:
        """What is said of a geoid changes with each round, and comes again after four of them."""
        about, turn = number % self.geoids, number // self.geoids % 4
        text = (
            f"Pump {about} at the {PLACES[about % len(PLACES)]} has a pressure of {turn + 2} bar "
            f"and valve {about % 13} is {'shut' if turn % 2 else 'open'}"
        )
        made: dict[str, Any] = {
            "id": f"churn-{about}",
            "text": text,
            "session_id": f"session-{number % self.sessions}",
            "originator_agent_id": f"agent-{number % 7}",
        }
        if about % 4 == 0:
            made["symbolic_state"] = {"subject": f"pump {about}", "pressure": turn + 2}
        return made

    async def _publish(self, numbers: "itertools.count[int]", number: int) -> None:
        pause = self.publishers / self.publishes
        while True:
            try:
                async with connect(f"ws://{self.address}/v1/stream", subprotocols=["kimera.v1.json"]) as ws:  # type: ignore[list-item]
                    await self._open(ws, [])
                    due = anyio.current_time()
                    for command in itertools.count(2):
                        at = next(numbers)
                        message: dict[str, Any] = {"op": "publish", "id": command, "geoid": self._statement(at)}
                        if at % 50 == 49:
                            message = {"op": "delete", "id": command, "geoid_id": f"churn-{at * 7 % self.geoids}"}
                        elif at % 3 == 0:
                            message["key"] = f"key-{at}"
                        await ws.send(json.dumps(message))
                        reply = json.loads(await ws.recv())
                        gone = reply["op"] == "error" and reply["code"] == "not_found"  # of one deleted twice
                        self.done["gone" if gone else reply.get("code", reply["op"])] += 1
                        due = max(due + pause, anyio.current_time() - 1)
                        await anyio.sleep_until(due)
            except FAULTS as error:
                self.done[f"fault: {type(error).__name__}"] += 1
                await anyio.sleep(0.2)

    # -- who comes and goes --------------------------------------------------------------------------------------------

    async def _visit(self, rng: random.Random) -> None:
        """A visitor of a second or two: subscriptions with filters and positions of the past, commands, then away."""
        agent = {"field": "data.originator_agent_id", "op": "eq", "value": f"agent-{rng.randrange(7)}"}
        subs: list[dict[str, Any]] = [
            {"channel": "geoids", "rewind": rng.randrange(50)} | ({"filter": agent} if rng.random() < 0.5 else {}),
            {"channel": f"session:session-{rng.randrange(self.sessions)}"},
            {"channel": f"geoid:churn-{rng.randrange(self.geoids)}"},
            {"channel": rng.choice(["contradictions", "field", "stats"])},
        ]
        encoding = rng.choice(["kimera.v1.json", "kimera.v1.msgpack"])
        json_only = encoding.endswith("json")
        ws = await connect(f"ws://{self.address}/v1/stream", subprotocols=[encoding], close_timeout=1)  # type: ignore[list-item]
        try:
            if json_only:
                await self._open(ws, subs)
                cursor = {
                    "op": "ack",
                    "channel": "geoids",
                    "offset": 0,
                    "name": f"cursor-{rng.randrange(self.cursors)}",
                }
                for id_, command in enumerate(
                    ({"op": "unsubscribe", "channel": subs[1]["channel"]}, {"op": "ping"}, cursor), 2
                ):
                    await ws.send(json.dumps({"id": id_, **command}))
            with anyio.move_on_after(rng.uniform(0.2, 2.0)):
                while True:
                    told = await ws.recv()
                    if json_only and str(told).startswith(('{"op":"acked"', '{"op":"error"')):
                        reply = json.loads(told)
                        self.done[f"cursor {reply.get('code', reply['op'])}"] += 1
        finally:
            if rng.random() < 0.25:
                ws.transport.abort()
            with anyio.CancelScope(shield=True):
                await ws.close()
        self.done["visit"] += 1

    async def _watch(self, web: httpx.AsyncClient, rng: random.Random) -> None:
        name = f"watch-{rng.randrange(1 << 30)}"
        text = f"Pump {rng.randrange(self.geoids)} at the {rng.choice(PLACES)} has a pressure of 3 bar"
        with anyio.CancelScope(shield=True):  # what was made is removed, also when the load ends
            answer = await web.post(
                "/v1/watches", json={"watch": name, "text": text, "kinds": ["related", "contradicts"]}
            )
            self.done[f"watch {answer.status_code}"] += 1
            await anyio.sleep(rng.uniform(0.1, 1.5))
            answer = await web.delete("/v1/watches", params={"watch": name})
            self.done[f"unwatch {answer.status_code}"] += 1

    async def _read(self, web: httpx.AsyncClient, rng: random.Random) -> None:
        what = rng.choice(["search", "history", "list", "score", "sse", "metrics"])
        if what == "search":
            await web.post("/v1/search", json={"text": f"pump {rng.randrange(self.geoids)} is shut", "k": 5})
        elif what == "history":
            await web.get("/v1/history", params={"channel": "geoids", "limit": 50, "reverse": "true"})
        elif what == "list":
            await web.get("/v1/geoids", params={"limit": 100, "session_id": f"session-{rng.randrange(self.sessions)}"})
        elif what == "score":
            await web.post(
                "/v1/score",
                json={"a": self._statement(rng.randrange(9_999)), "b": self._statement(rng.randrange(9_999))},
            )
        elif what == "metrics":
            await web.get("/metrics")
        else:
            with anyio.move_on_after(rng.uniform(0.2, 2.0)):
                async with web.stream("GET", "/v1/events", params={"channel": "geoids"}) as events:
                    async for _ in events.aiter_raw():
                        pass
        self.done[what] += 1
