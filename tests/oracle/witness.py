"""What goes on while a disk is full or slow, or a database locked: reads, live streams and replay do, and writes are told the truth."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import anyio
import asyncpg

from tests.oracle.deployments import Deployment
from tests.oracle.listeners import RESUME_CODES, Listener
from tests.oracle.model import Heard, Ledger, Op
from tests.oracle.wire import Gone, Web

READ = 8.0
"""Seconds within which something that is read has to come."""
WRITE = 25.0
"""Seconds within which a write has to be acknowledged or refused."""
REFUSALS = ("unavailable", "overloaded")
REPLAYED = 300
"""Offsets that a replay goes back."""
BETWEEN = 0.1
"""Seconds between two requests of a kind."""


@dataclass
class Witness:
    """One fault, seen from one node: somebody reads, listens, has the past replayed and writes for as long as it lasts.

    Attributes:
        what: The fault, in words.
        writable: Whether anything can be acknowledged meanwhile.
        wrong: Promises that were broken.
        heard: What was heard; to be checked against the log.
        rounds: Answers while it lasted, by what was asked for.
        refused: Writes that were, while it lasted.
    """

    what: str
    deployment: Deployment
    ledger: Ledger
    rng: Random
    writable: bool
    slow: float = 1.0
    wrong: list[str] = field(default_factory=list)
    heard: list[Heard] = field(default_factory=list)
    rounds: dict[str, int] = field(default_factory=dict)
    refused: int = 0
    over: bool = False
    _acked: int = 0
    _crashes: int = 0
    _answered: anyio.Event = field(default_factory=anyio.Event)

    async def run(
        self, begin: Callable[[], Awaitable[None]], end: Callable[[], Awaitable[None]], length: float
    ) -> None:
        """Have the fault begin and end. It lasts ``length`` seconds, and until everything was asked for once; what is answered
        after it may be the doing of ``end``."""
        url = self.deployment.reader
        async with Web(url, patience=WRITE * self.slow) as web, anyio.create_task_group() as group:
            epoch, newest = await self._newest(web)
            live = self._listener("live", url, max(0, newest - 1))
            group.start_soon(live.run, name="witness:live")
            with anyio.move_on_after(READ * self.slow):
                await live.reach(epoch, newest)
            self._crashes = self._crashed
            await begin()
            try:
                async with anyio.create_task_group() as asking:
                    asking.start_soon(self._again, "read", lambda: self._read(web), name="witness:read")
                    asking.start_soon(
                        self._again, "replay", lambda: self._replay(url, epoch, newest), name="witness:replay"
                    )
                    asking.start_soon(self._again, "write", lambda: self._write(web), name="witness:write")
                    await anyio.sleep(length)
                    await self._all_answered()
                    with anyio.move_on_after(READ * self.slow):
                        await live.in_touch()
                    if not live.connected:
                        self.wrong.append(f"{self.what}: a live stream ended and cannot be resumed")
                    self.over = True
                    await end()
            finally:
                if not self.over:
                    with anyio.CancelScope(shield=True):
                        await end()
            await self._heard_out(live, epoch)
            group.cancel_scope.cancel()

    # -- who asks ------------------------------------------------------------------------------------------------------------

    async def _again(self, what: str, ask: Callable[[], Awaitable[None]]) -> None:
        self.rounds[what] = 0
        while not self.over:
            await ask()
            self.rounds[what] += 1
            self._answered.set()
            self._answered = anyio.Event()
            await anyio.sleep(BETWEEN)

    async def _all_answered(self) -> None:
        while len(self.rounds) < 3 or not all(self.rounds.values()):
            answered = self._answered
            await answered.wait()

    async def _newest(self, web: Web) -> tuple[str, int]:
        """Position of the newest geoid; the caller sees to it that there is one."""
        status, page = await web.ask("GET", "/v1/history", params={"channel": "geoids", "reverse": True, "limit": 1})
        if status != 200:
            raise Gone(1006, f"before {self.what}: history is answered with {status} {page.get('code')}")
        return page["epoch"], page["events"][0]["offset"]

    async def _read(self, web: Web) -> None:
        for path, params in (("/v1/history", {"channel": "geoids"}), ("/v1/geoids", {}), ("/v1/contradictions", {})):
            asked: dict[str, Any] = {**params, "limit": 10}
            status, said = 0, "no answer"
            with anyio.move_on_after(READ * self.slow):
                try:
                    status, body = await web.ask("GET", path, params=asked)
                    said = str(body.get("code"))
                except Gone as gone:
                    said = str(gone)
            if status == 200 or self.over or (said in REFUSALS and not await self._database_reads()):
                continue
            self.wrong.append(f"{self.what}: reading {path} is answered with {status} {said}")

    async def _replay(self, url: str, epoch: str, newest: int) -> None:
        past = self._listener("replay", url, max(0, newest - REPLAYED))
        with anyio.move_on_after(READ * self.slow) as late:
            async with anyio.create_task_group() as group:

                async def given_up() -> None:
                    await self._database_ended()
                    group.cancel_scope.cancel()

                group.start_soon(past.run, name="witness:past")
                group.start_soon(given_up, name="witness:ended")
                await past.reach(epoch, newest)
                group.cancel_scope.cancel()
        if late.cancelled_caught and not self.over and await self._database_reads():
            self.wrong.append(f"{self.what}: a replay up to {newest} came to {past.position[1]}")

    async def _write(self, web: Web) -> None:
        mark = f"witness-{self.rng.getrandbits(40)}"
        body = {"symbolic_state": {mark: True}, "metadata": {"mark": mark}}
        op = self.ledger.add(Op(mark, "publish", "", body=body, outcome="unknown"))
        op.sent.append((-1, 0))
        try:
            status, reply = await web.ask("POST", "/v1/geoids", json=body)
        except Gone as gone:
            if not self.over:  # else the server may have been killed
                self.wrong.append(f"{self.what}: a write got no answer ({gone})")
            return
        if status in (200, 201):
            if not (self.writable or self.over):
                self.wrong.append(f"{self.what}: a write was acknowledged at {reply['offset']}")
            self.ledger.published(op, reply)
            self._acked = max(self._acked, op.offset)
            return
        code = str(reply.get("code"))
        if code not in REFUSALS:
            self.wrong.append(f"{self.what}: a write was answered with {status} {code} {reply.get('detail')}")
        if code == "overloaded":
            op.outcome = "refused"
        self.ledger.refused(op, code)
        self.refused += not self.over

    # -- what is heard -------------------------------------------------------------------------------------------------------

    def _listener(self, name: str, url: str, since: int) -> Listener:
        heard = Heard(f"{name} ({self.what})", "geoids")
        self.heard.append(heard)
        door = f"{url.replace('http', 'ws', 1)}/v1/stream"
        return Listener([door], heard, self.rng.getrandbits(32), since=since)

    async def _heard_out(self, live: Listener, epoch: str) -> None:
        if self._acked:
            with anyio.move_on_after(WRITE * self.slow):
                await live.reach(epoch, self._acked)
            if live.position[1] < self._acked:
                self.wrong.append(
                    f"{self.what}: {self._acked} was acknowledged, a live stream has come to {live.position[1]}"
                )
        ends = [code for code in live.codes if code not in RESUME_CODES and code != 1006]
        self.wrong += [f"{self.what}: a live stream was closed with {code}" for code in ends]

    # -- PostgreSQL, which may end itself -------------------------------------------------------------------------------------

    @property
    def _crashed(self) -> int:
        """How often PostgreSQL has given up what it did, and itself."""
        postgres = self.deployment.postgres
        if postgres is None:
            return 0
        return (
            postgres.said.count("PANIC")
            + postgres.said.count("all server processes terminated")
            + (not postgres.running)
        )

    async def _database_ended(self) -> None:
        """Wait until PostgreSQL gives up what it does. It is started again when the fault is over: who went on waiting for what only it
        has would have the fault last as long as the patience for an answer, 48 s where that is six times longer."""
        while self._crashed == self._crashes:  # noqa: ASYNC110 - another process's state
            await anyio.sleep(BETWEEN)

    async def _database_reads(self) -> bool:
        """Whether nothing but the server can be the reason that something is not read."""
        postgres = self.deployment.postgres
        if postgres is None:
            return True
        try:
            connection = await asyncpg.connect(postgres.url().replace("+asyncpg", ""), timeout=READ)
            try:
                await connection.fetchval("SELECT head FROM log_state")
            finally:
                await connection.close(timeout=READ)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError):
            return False
        return self._crashed == self._crashes
