"""After each fault: everything has to work again within a bounded time, for everybody."""

from collections.abc import Sequence
from typing import Any

import anyio

from tests.oracle.listeners import Listener
from tests.oracle.model import Ledger, Op
from tests.oracle.wire import Gone, Web

PATIENCE = 45.0
"""Seconds in which a deployment has to recover on a busy machine."""
ANSWER = 20.0
"""Seconds after which the probe asks again: where a machine is busy, it may have to wait for others."""
WATCHED = "The oracle lamp on the harbour wall is lit."
SESSION = "publisher-1"
"""The session that somebody listens to."""


class NotHealed(Exception):
    """What still does not work."""


class Prober:
    """Says two things that clash, settles the clash, and waits until every subscriber has heard of it.

    Args:
        url: Base address of a door.
        slow: How many times longer than ``PATIENCE`` it may take.
    """

    def __init__(self, url: str, ledger: Ledger, listeners: Sequence[Listener], *, slow: float = 1.0) -> None:
        self.url = url
        self._ledger = ledger
        self._listeners = listeners
        self._slow = slow
        self._count = 0
        self._late: list[str] = []

    async def probe(self) -> None:
        """Raises NotHealed where it takes too long."""
        self._count += 1
        stage = "publishing"
        try:
            with anyio.fail_after(PATIENCE * self._slow):
                async with Web(self.url, patience=ANSWER * self._slow) as web:
                    first = await self._publish(web, "a", "lit")
                    second = await self._publish(web, "b", "dark")
                    stage = "contradicting"
                    clash = await self._clash(web, second)
                    stage = "resolving"
                    settled = await self._settle(web, clash)
                stage = "hearing"
                await self._heard(second["geoid"], first["offset"], second["offset"], settled)
        except TimeoutError as error:
            behind = [f"{each.heard.name} at {each.position[1]}" for each in self._listeners if not each.connected]
            raise NotHealed(f"after {PATIENCE * self._slow:.0f} s still {stage}; {self._late or behind}") from error

    async def _publish(self, web: Web, letter: str, state: str) -> dict[str, Any]:
        mark = f"probe-{self._count}-{letter}"
        body = {
            "id": mark,
            "text": WATCHED,
            "symbolic_state": {"subject": f"probe-{self._ledger.era}-{self._count}", "state": state},
            "metadata": {"mark": mark, "probe": True},
            "session_id": SESSION,
        }
        op = self._ledger.add(Op(mark, "publish", "~probe", mark, body, f"key-{mark}"))
        while True:
            op.sent.append((-1, len(op.sent)))
            try:
                status, reply = await web.ask(
                    "POST", "/v1/geoids", json=body, headers={"Idempotency-Key": f"key-{mark}"}
                )
            except Gone:
                await anyio.sleep(0.1)
                continue
            if status in (200, 201):
                self._ledger.published(op, reply)
                return reply
            self._ledger.refused(op, str(reply.get("code")))
            await anyio.sleep(0.1)

    async def _clash(self, web: Web, second: dict[str, Any]) -> str:
        mine = second["geoid"]["id"]
        other = mine.removesuffix("b") + "a"
        for each in second["contradictions"]:
            if {each["a"], each["b"]} == {mine, other}:
                return str(each["id"])
        raise NotHealed(f"{other} and {mine} clash and the answer does not say so")

    async def _settle(self, web: Web, clash: str) -> int:
        """Resolve it; the offset at which it was."""
        op = self._ledger.add(Op(f"settle-{self._count}", "resolve", "~probe", clash))
        while True:
            op.sent.append((-1, len(op.sent)))
            try:
                status, reply = await web.ask(
                    "POST", f"/v1/contradictions/{clash}/resolve", json={"decision": "buffer", "reason": "a probe"}
                )
            except Gone:
                status, reply = 0, {}
            if status == 200:
                self._ledger.done(op, reply["offset"], reply["scar"])
            elif reply.get("code") == "conflict" and op.retried:
                op.outcome = "unknown"
            try:
                status, there = await web.ask("GET", f"/v1/contradictions/{clash}")
            except Gone:
                status, there = 0, {}
            if status == 200 and there["state"] == "resolved":
                return int(there["offset"])
            await anyio.sleep(0.1)

    async def _heard(self, geoid: dict[str, Any], first: int, second: int, settled: int) -> None:
        async with Web(self.url) as web:
            while True:
                try:
                    _, health = await web.ask("GET", "/health")
                except Gone:
                    health = {}
                if "epoch" in health:
                    break
                await anyio.sleep(0.1)
        epoch = health["epoch"]
        self._late = [each.heard.name for each in self._listeners]

        async def wait(listener: Listener) -> None:
            channel = listener.heard.channel
            target = second
            if channel in ("contradictions", "scars"):
                target = settled
            elif channel.startswith("watch:"):
                target = first + 1
            await listener.reach(epoch, target)
            self._late.remove(listener.heard.name)

        async with anyio.create_task_group() as group:
            for listener in self._listeners:
                group.start_soon(wait, listener, name=f"wait:{listener.heard.name}")
