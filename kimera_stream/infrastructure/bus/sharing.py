"""What this node shares, kept in Redis for as long as the node is alive."""

import contextlib

import anyio

from kimera_stream.infrastructure.bus.link import Link
from kimera_stream.infrastructure.bus.scripts import GATHER, TOUCH, Keys
from kimera_stream.protocol.errors import OverloadedError, UnavailableError

CHUNK = 256
"""Values written by one operation."""


class RedisShares:
    """Shared values: the originals are here, Redis has a copy that is renewed.

    Args:
        link: Sends.
        keys: Names of keys.
        node: This node.
        ttl: Seconds after which the copy is forgotten unless renewed.
    """

    def __init__(self, link: Link, keys: Keys, node: str, *, ttl: float) -> None:
        self._link = link
        self._keys = keys
        self._node = node
        self._ttl = ttl
        self._values: dict[str, bytes] = {}
        self._incomplete = True
        self._renew = anyio.Event()

    def share(self, space: str, key: str, value: bytes | None) -> None:
        field = _field(space, key)
        if value is None:
            if self._values.pop(field, None) is None:
                return
        elif self._values.get(field) == value:
            return
        else:
            self._values[field] = value
        if self._incomplete:
            return  # the copy is about to be written anew
        shared = self._keys.shared(self._node)
        try:
            if value is None:
                self._link.post(b"HDEL", shared, field, failed=self.copy_again)
            else:
                self._link.post(b"HSET", shared, field, value, failed=self.copy_again)
        except (UnavailableError, OverloadedError):
            self.copy_again()

    def copy_again(self) -> None:
        """The copy may differ from the originals: write it anew as soon as possible."""
        self._incomplete = True
        self._renew.set()

    async def gather(self, space: str, key: str) -> dict[str, bytes]:
        field = _field(space, key)
        answer = await self._link.call(b"EVAL", GATHER, 1, self._keys.nodes, self._keys.shared(""), field)
        found = {node.decode(): bytes(value) for node, value in zip(answer[::2], answer[1::2], strict=True)}
        found.pop(self._node, None)
        if field in self._values:
            found[self._node] = self._values[field]
        return found

    async def run(self) -> None:
        """Renew until cancelled."""
        while True:
            self._renew = anyio.Event()
            try:
                await self._copy()
            except (UnavailableError, OverloadedError):
                self._incomplete = True
            with anyio.move_on_after(self._ttl / 3):
                await self._renew.wait()

    async def _copy(self) -> None:
        shared = self._keys.shared(self._node)
        if self._incomplete:
            fields = list(self._values.items())
            self._incomplete = False  # what changes from here on is sent after this, in order
            self._link.post(b"DEL", shared, failed=self.copy_again)
            for begin in range(0, len(fields), CHUNK):
                some: list[bytes | str] = []
                for field, value in fields[begin : begin + CHUNK]:
                    some += [field, value]
                self._link.post(b"HSET", shared, *some, failed=self.copy_again)
        there = await self._link.call(
            b"EVAL", TOUCH, 2, self._keys.nodes, shared, self._node, max(1, int(self._ttl * 1000))
        )
        if there != len(self._values):  # flushed or expired meanwhile (or a change is on its way: then once too often)
            self.copy_again()

    async def withdraw(self) -> None:
        """Take everything back at once: this node stops."""
        with contextlib.suppress(UnavailableError, OverloadedError):  # else it expires
            await self._link.call(b"ZREM", self._keys.nodes, self._node)
            await self._link.call(b"DEL", self._keys.shared(self._node))


def _field(space: str, key: str) -> str:
    return f"{space}\0{key}"
