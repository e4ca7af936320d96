"""A TCP proxy that can do to connections what networks do: cut, reset, stall and swallow."""

import socket
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress

import anyio
import anyio.abc
from anyio.streams.stapled import MultiListener

_CHUNK = 65_536
_SMALL = 32_768
"""Receive buffer towards the server in bytes: a stalled client is to be felt there soon."""


class Link:
    """One connection through the proxy.

    Attributes:
        number: Counts connections, from 0.
        swallowing: What either side sends is taken and thrown away: a half-open connection.
    """

    def __init__(self, number: int, client: anyio.abc.SocketStream, server: anyio.abc.SocketStream) -> None:
        self.number = number
        self._client = client
        self._server = server
        self._flows = anyio.Event()
        self._flows.set()
        self._scope = anyio.CancelScope()
        self.swallowing = False
        self.bytes = 0

    async def run(self) -> None:
        """Until either side ends it, or it is cut."""
        with self._scope:
            async with anyio.create_task_group() as group:
                group.start_soon(self._pump, self._client, self._server, name=f"link-{self.number}:up")
                group.start_soon(self._pump, self._server, self._client, name=f"link-{self.number}:down")
        with anyio.move_on_after(1, shield=True):
            await self._client.aclose()
            await self._server.aclose()

    async def _pump(self, source: anyio.abc.SocketStream, target: anyio.abc.SocketStream) -> None:
        try:
            while True:
                await self._flows.wait()
                data = await source.receive(_CHUNK)
                await self._flows.wait()
                self.bytes += len(data)
                if not self.swallowing:
                    await target.send(data)
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            if not self.swallowing:  # half-open: the other side does not learn of it
                self._scope.cancel()

    def cut(self, *, reset: bool) -> None:
        """End it, by RST or by FIN, on both sides."""
        if reset:
            for stream in (self._client, self._server):
                sock = stream.extra(anyio.abc.SocketAttribute.raw_socket)
                with suppress(OSError):  # it has just ended by itself
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._scope.cancel()

    def stall(self) -> None:
        """Let nothing through, and read nothing, until ``flow``."""
        if self._flows.is_set():
            self._flows = anyio.Event()

    def flow(self) -> None:
        self._flows.set()


class Proxy:
    """Listens on a port of its own and connects what comes to ``upstream``.

    Attributes:
        upstream: (host, port); None: connections are refused.
        swallowing: New connections are half-open from the beginning.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.upstream: tuple[str, int] | None = None
        self.swallowing = False
        self.links: dict[int, Link] = {}
        self._made = 0
        self._listener: MultiListener[anyio.abc.SocketStream] | None = None
        self.address = ""

    async def open(self) -> None:
        """Begin to listen; ``address`` is then host:port."""
        self._listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=0)
        port = self._listener.extra(anyio.abc.SocketAttribute.local_port)
        self.address = f"127.0.0.1:{port}"

    async def run(self) -> None:
        """Serve until cancelled."""
        assert self._listener is not None
        async with self._listener:
            await self._listener.serve(self._handle)

    async def _handle(self, client: anyio.abc.SocketStream) -> None:
        if self.upstream is None:
            await client.aclose()
            return
        try:
            server = await anyio.connect_tcp(*self.upstream)
        except OSError:
            await client.aclose()
            return
        raw = server.extra(anyio.abc.SocketAttribute.raw_socket)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL)
        link = Link(self._made, client, server)
        link.swallowing = self.swallowing
        self._made += 1
        self.links[link.number] = link
        try:
            await link.run()
        finally:
            del self.links[link.number]

    def some(self, share: float, rng_choice: Callable[[], float]) -> list[Link]:
        """About ``share`` of the connections, at least one if there is any."""
        links = list(self.links.values())
        chosen = [link for link in links if rng_choice() < share]
        return chosen or links[:1]

    def partition(self, on: bool) -> None:
        """Nothing passes, in either direction, and nobody is told: neither for old connections nor for new ones."""
        self.swallowing = on
        if on:
            for link in self.links.values():
                link.swallowing = True
        else:
            self.cut(list(self.links.values()), reset=True)

    def cut(self, links: Iterable[Link], *, reset: bool) -> None:
        for link in links:
            link.cut(reset=reset)
