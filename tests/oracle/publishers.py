"""Those who speak: they repeat what has a key until it is answered, and write down what came back."""

import time
from itertools import count
from random import Random
from typing import Any

import anyio

from tests.oracle.model import Ledger, Op
from tests.oracle.statements import Author
from tests.oracle.wire import Gone, Web, Wire, connected

DEPTH = 8
"""Commands of one connection under way at most."""
PAUSE = 0.05
"""Seconds before the first try to connect again; doubled up to ``LONGEST_PAUSE``."""
LONGEST_PAUSE = 0.5
LONGEST_RETRY = 1.0
"""Seconds after which a refused operation is repeated at most, whatever the server advises."""
LOOK = 0.01
"""Seconds between looks at whether there is something to send."""

_connections = count()


class Publisher:
    """Speaks over WebSocket, at its own pace, whatever happens to the connection.

    Args:
        doors: Addresses of WebSocket doors; a lost connection is replaced by one to the next.
        rate: Operations a second.
    """

    def __init__(
        self,
        name: str,
        seed: int,
        doors: list[str],
        ledger: Ledger,
        *,
        encoding: str = "json",
        rate: float = 10.0,
        named: bool = False,
        keyed: float = 0.8,
    ) -> None:
        self.name = name
        self.author = Author(name, seed, ledger, keyed=keyed, named=named)
        self._doors = doors
        self._ledger = ledger
        self._encoding = encoding
        self._rate = rate
        self._rng = Random(f"{seed}-{name}-pace")
        self._under_way: dict[int, Op] = {}
        self._again: list[tuple[float, Op]] = []
        self._storm = 0
        self._next = 0.0
        self._open = anyio.Event()
        self._open.set()
        self._idle = anyio.Event()
        self.visits = 0

    # -- what the run asks of it ---------------------------------------------------------------------------------------

    def hush(self) -> None:
        """Say nothing new."""
        self._open = anyio.Event()
        self._idle = anyio.Event()

    async def idle(self) -> None:
        """Wait until everything said is answered or given up."""
        await self._idle.wait()

    def speak(self) -> None:
        """Go on."""
        self._open.set()

    def storm(self, operations: int) -> None:
        """Send the next operations twice or thrice, and old ones with their keys in between."""
        self._storm += operations

    @property
    def settled(self) -> bool:
        return not (self._under_way or self._again)

    # -- life ------------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled."""
        pause = PAUSE
        while True:
            door = self._doors[self.visits % len(self._doors)]
            self.visits += 1
            began = time.monotonic()
            try:
                await self._visit(door)
            except* Gone:
                pass
            if time.monotonic() - began > 2 * LONGEST_PAUSE:
                pause = PAUSE
            self._lost()
            if not self._open.is_set() and self.settled:
                self._idle.set()
                await self._open.wait()
            await anyio.sleep(pause * (0.5 + self._rng.random()))
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _visit(self, door: str) -> None:
        async with connected(door, self._encoding) as wire, anyio.create_task_group() as group:
            group.start_soon(self._send_all, wire, name=f"{self.name}:send")
            while True:
                message = await wire.receive()
                if "id" in message:
                    self._take(message)

    async def _send_all(self, wire: Wire) -> None:
        connection = next(_connections)
        while True:
            op = await self._choose(len(self._under_way) < DEPTH)
            copies = 1
            if self._storm and op.key is not None:
                self._storm -= 1
                copies = self._rng.choice([2, 3])
            for _ in range(copies):
                op.sent.append((connection, wire.next_id))
                self._under_way[wire.next_id] = op
                name, fields = _command(op)
                await wire.send(name, **fields)

    async def _choose(self, may_speak: bool) -> Op:
        """What to send next, once there is something."""
        while True:
            now = time.monotonic()
            for number, (due, op) in enumerate(self._again):
                if due <= now:
                    del self._again[number]
                    return op
            if not self._open.is_set() and self.settled:
                self._idle.set()
                await self._open.wait()
            elif self._open.is_set() and may_speak and now >= self._next:
                self._next = max(self._next + 1 / self._rate, now - 2 / self._rate)
                repeat = self._rng.random() < (0.3 if self._storm else 0.03)
                return (self.author.again() if repeat else None) or self.author.next()
            await anyio.sleep(LOOK)
            may_speak = len(self._under_way) < DEPTH

    # -- answers ---------------------------------------------------------------------------------------------------------

    def _take(self, message: dict[str, Any]) -> None:
        op = self._under_way.pop(message["id"], None)
        if op is not None:
            self._answer(op, message)

    def _answer(self, op: Op, message: dict[str, Any]) -> None:
        first = op.outcome != "acked"
        kind = message["op"]
        if kind == "error":
            self._error(op, message["code"], message.get("retry_after"))
        elif kind == "published":
            self._ledger.published(op, message)
            if first:
                self.author.clashes += [each["id"] for each in message["contradictions"]]
        elif kind == "deleted":
            self._ledger.done(op, message["offset"])
        elif kind == "resolved":
            self._ledger.done(op, message["offset"], message["scar"])
        else:
            self._ledger.broken.append(f"{op.mark}: answered with {kind}")
        if first and op.outcome == "acked":
            self.author.answered(op)

    def _error(self, op: Op, code: str, retry_after: float | None) -> None:
        self._ledger.refused(op, code)
        if op.outcome == "acked" or op in self._under_way.values():
            return  # another copy of it is under way or was answered
        temporary = code in ("unavailable", "internal", "overloaded", "rate_limited")
        if temporary and (op.key is not None or op.kind != "publish"):
            wait = min(max(retry_after or 0.0, PAUSE), LONGEST_RETRY)
            self._again.append((time.monotonic() + wait * (0.5 + self._rng.random()), op))
        elif code in ("unavailable", "internal") or op.retried:
            op.outcome = "unknown"
        else:
            op.outcome = "refused"
            if op.kind == "delete":
                self._ledger.broken.append(f"{op.mark}: {op.target} is there and its delete was answered with {code}")

    def _lost(self) -> None:
        """The connection is gone: what was under way is repeated, in another order, or its fate is unknown."""
        lost = list(dict.fromkeys(self._under_way.values()))
        self._under_way.clear()
        self._rng.shuffle(lost)
        now = time.monotonic()
        for op in lost:
            if op.outcome == "acked":
                continue
            if op.key is not None or op.kind != "publish":
                self._again.append((now + self._rng.random() * 0.1, op))
            else:
                op.outcome = "unknown"


def _command(op: Op) -> tuple[str, dict[str, Any]]:
    """The command that asks for it."""
    if op.kind == "publish":
        return "publish", {"geoid": op.body, **({"key": op.key} if op.key is not None else {})}
    if op.kind == "delete":
        return "delete", {"geoid_id": op.target}
    return "resolve", {"contradiction_id": op.target, **op.body}


class WebPublisher(Publisher):
    """The same over HTTP, one request after the other. ``doors`` are base addresses."""

    async def _visit(self, door: str) -> None:
        connection = next(_connections)
        async with Web(door) as web:
            for number in count(1):
                op = await self._choose(True)
                op.sent.append((connection, number))
                self._under_way[0] = op
                message = await self._request(web, op)
                del self._under_way[0]
                self._answer(op, message)

    async def _request(self, web: Web, op: Op) -> dict[str, Any]:
        if op.kind == "publish":
            headers = {} if op.key is None else {"Idempotency-Key": op.key}
            status, body = await web.ask("POST", "/v1/geoids", json=op.body, headers=headers)
            done = "published"
        elif op.kind == "delete":
            status, body = await web.ask("DELETE", f"/v1/geoids/{op.target}")
            done = "deleted"
        else:
            status, body = await web.ask("POST", f"/v1/contradictions/{op.target}/resolve", json=op.body)
            done = "resolved"
        if status in (200, 201):
            return {"op": done, **body}
        if "code" not in body:
            raise Gone(1006, f"status {status} without a code")
        return {"op": "error", **body}
