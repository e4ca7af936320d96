"""In-memory stand-ins for what the streaming core is built on: a log, a vault, a knowledge service, a handle."""

from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import anyio
import msgspec
import uvicorn

from kimera_stream.api.egress import uvicorn_options
from kimera_stream.api.websocket import StreamEndpoint
from kimera_stream.core.access import ALL_ROLES, Principal
from kimera_stream.core.interfaces import FramePage, LogPage, PublishResult
from kimera_stream.infrastructure.settings import Settings
from kimera_stream.protocol import frames
from kimera_stream.protocol.close_codes import CloseCode
from kimera_stream.protocol.errors import NotFoundError, UnauthorizedError, UnavailableError
from kimera_stream.protocol.log import LogEntry
from kimera_stream.protocol.messages import ServerInfo
from kimera_stream.protocol.objects import Geoid, GeoidBody, Scar, Watch
from kimera_stream.streaming.hub import Hub


def entry(offset: int, /, *channels: str, type: str = "geoid.created", **data: Any) -> LogEntry:
    return LogEntry(
        offset=offset,
        type=type,
        ts=1_700_000_000_000 + offset,
        channels=channels or ("geoids",),
        data=msgspec.Raw(msgspec.json.encode(data or {"n": offset})),
    )


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for something that announces itself in no other way, such as a peer's socket buffer."""
    with anyio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110
            await anyio.sleep(0.005)


class MemoryLog:
    """A `LogReader` over a list. `gate`, if set, is awaited before each read answers."""

    def __init__(self, epoch: str = "E1") -> None:
        self.epoch = epoch
        self.entries: list[LogEntry] = []
        self.trimmed = 0
        self.reads = 0
        self.fail_next = 0
        self.gate: anyio.Event | None = None

    @property
    def head(self) -> int:
        return self.trimmed + len(self.entries)

    def append(self, *channels: str, type: str = "geoid.created", **data: Any) -> LogEntry:
        fresh = entry(self.head + 1, *channels, type=type, **data)
        self.entries.append(fresh)
        return fresh

    def trim(self, upto: int) -> None:
        del self.entries[: upto - self.trimmed]
        self.trimmed = upto

    async def read(
        self, channel: str | None, *, after: int, limit: int, until: int | None = None, reverse: bool = False
    ) -> LogPage:
        self.reads += 1
        if self.gate is not None:
            await self.gate.wait()
        await anyio.lowlevel.checkpoint()
        if self.fail_next:
            self.fail_next -= 1
            raise UnavailableError("the log does not answer", retry_after=0.01)
        until = self.head if until is None else until
        found = [e for e in self.entries if after < e.offset <= until and (channel is None or channel in e.channels)]
        if reverse:
            page, more = found[::-1][:limit], len(found) > limit
            return LogPage(page, page[-1].offset if more else after, more)  # as the vault does
        more = len(found) > limit
        page = found[:limit]
        return LogPage(page, page[-1].offset if more else until, more)

    async def read_frames(self, channel: str, *, head: bytes, after: int, limit: int, until: int) -> FramePage:
        """As the vault does; events with filters and in MessagePack still come by way of `read`."""
        page = await self.read(channel, after=after, limit=limit, until=until)
        made = [
            frames.frame(
                frames.OP_TEXT,
                b'%b%d,"type":"%b","ts":%d,"data":%b}' % (head, e.offset, e.type.encode(), e.ts, bytes(e.data)),
            )
            for e in page.entries
        ]
        return FramePage(b"".join(made), len(made), page.scanned, page.more)


class FakeVault(MemoryLog):
    def __init__(self, epoch: str = "E1") -> None:
        super().__init__(epoch)
        self.cursors: dict[tuple[str, str, str], int] = {}

    async def save_cursor(self, principal: str, name: str, channel: str, offset: int) -> None:
        self.cursors[principal, name, channel] = offset

    async def cursor(self, principal: str, name: str, channel: str) -> int | None:
        return self.cursors.get((principal, name, channel))


class FakeKnowledge:
    """Commits to the fake vault and delivers to the hub. `gate`, if set, holds every publish until it is opened."""

    def __init__(self, vault: FakeVault) -> None:
        self.vault = vault
        self.hub: Hub | None = None
        self.gate: anyio.Event | None = None
        self.crash: Exception | None = None
        self.published: list[tuple[GeoidBody, str | None, str]] = []
        self.cancelled = 0
        self.watched: dict[str, Watch] = {}

    async def publish(
        self,
        body: GeoidBody,
        *,
        principal: Principal,
        session_id: str | None = None,
        key: str | None = None,
        priority: int = 5,
        merge: bool = False,
        must_exist: bool = False,
    ) -> PublishResult:
        if self.gate is not None:
            try:
                await self.gate.wait()
            except BaseException:
                self.cancelled += 1
                raise
        if self.crash is not None:
            raise self.crash
        self.published.append((body, session_id, principal.id))
        offset = self.vault.head + 1
        geoid = Geoid(
            id=body.id or f"g{offset}",
            version=1,
            text=body.text,
            semantic_state={},
            symbolic_state=body.symbolic_state or {},
            metadata=body.metadata or {},
            session_id=body.session_id or session_id,
            entropy=0.0,
            created_at=1,
            updated_at=1,
            offset=offset,
        )
        fresh = self.vault.append(
            "geoids", f"geoid:{geoid.id}", f"session:{geoid.session_id}", **msgspec.to_builtins(geoid)
        )
        assert self.hub is not None
        self.hub.deliver([fresh])
        return PublishResult(geoid, offset, [], False)

    async def delete(self, geoid_id: str, *, principal: Principal, session_id: str | None = None) -> int:
        if geoid_id == "missing":
            raise NotFoundError("geoid_id: no such geoid", field="geoid_id")
        return self.vault.head

    async def resolve(
        self,
        contradiction_id: str,
        decision: Any,
        reason: str | None,
        *,
        principal: Principal,
        session_id: str | None = None,
    ) -> tuple[Scar, int]:
        scar = Scar(
            id="s1", contradiction_id=contradiction_id, geoids=("a", "b"), decision=decision, reason=reason,
            resolved_by=principal.id, vault="a", pre_entropy=1.0, post_entropy=0.5, delta_entropy=-0.5, weight=1.0,
            created_at=1, offset=self.vault.head,
        )  # fmt: skip
        return scar, self.vault.head

    async def watch(self, name: str, *, principal: Principal, **asked: Any) -> Watch:
        watch = Watch(id=f"w-{name}", watch=name, principal=principal.id, kinds=asked["kinds"], created_at=1)
        self.watched[name] = watch
        return watch

    async def unwatch(self, name: str, *, principal: Principal) -> None:
        if name not in self.watched:
            raise NotFoundError("watch: no such watch", field="watch")
        del self.watched[name]

    def watch_owner(self, watch_id: str) -> str | None:
        return next((watch.principal for watch in self.watched.values() if watch.id == watch_id), None)

    async def find_watch(self, watch_id: str) -> str | None:
        return self.watch_owner(watch_id)


class FakeAuthenticator:
    """Tokens are `name`, `name/role+role`, optionally `@expires`; `bad` is refused. Without one: all roles, unless required."""

    def __init__(self, required: bool = False) -> None:
        self.required = required
        self.seen: list[str | None] = []

    def known(self, token: str | None) -> Principal | None:
        return None

    async def authenticate(self, token: str | None) -> Principal:
        self.seen.append(token)
        await anyio.lowlevel.checkpoint()
        if token is None:
            if self.required:
                raise UnauthorizedError("token: required")
            return Principal("anonymous", ALL_ROLES)
        if token.startswith("bad"):
            raise UnauthorizedError("token: not valid")
        rest, _, expires = token.partition("@")
        name, _, roles = rest.partition("/")
        granted = frozenset(roles.split("+")) if roles else ALL_ROLES
        return Principal(name, granted - {"none"}, int(expires) if expires else None)  # type: ignore[arg-type]

    def holds(self, principal: Principal) -> bool:
        return True

    async def revoked(self, principal: Principal) -> None:
        await anyio.sleep_forever()


@dataclass(eq=False)
class FakeEgress:
    """A handle with a window: what is written beyond `window` bytes not taken by the peer pauses it."""

    window: int = 1 << 30
    written: bytes = b""
    buffered: int = 0
    paused: bool = False
    closing: bool = False
    closed: tuple[CloseCode, str] | None = None
    aborted: bool = False
    writes: int = 0
    listener: Any = None
    fd: int = -1
    unread: bytearray = field(default_factory=bytearray)
    stuck: bool = False

    def listen(self, listener: Any) -> None:
        self.listener = listener

    def write(self, data: bytes) -> None:
        if self.closing:
            return
        self.writes += 1
        self.unread += data
        if self.stuck:
            self.buffered += len(data)
            if self.buffered > self.window and not self.paused:
                self.paused = True
                if self.listener:
                    self.listener.egress_paused()

    def resume(self) -> None:
        self.buffered = 0
        self.stuck = False
        if self.paused:
            self.paused = False
            if self.listener:
                self.listener.egress_resumed()

    def close(self, code: CloseCode, reason: str) -> None:
        self.closing = True
        self.closed = (code, reason)

    def abort(self) -> None:
        self.closing = self.aborted = True

    def messages(self) -> list[dict[str, Any]]:
        """Everything written since the last call, decoded."""
        data, self.unread = bytes(self.unread), bytearray()
        return [
            msgspec.json.decode(payload) if opcode == frames.OP_TEXT else msgspec.msgpack.decode(payload)
            for opcode, payload in frames.split(data)
        ]

    def offsets(self, channel: str | None = None) -> list[int]:
        return [
            m["offset"] for m in self.messages() if m["op"] == "event" and (channel is None or m["channel"] == channel)
        ]


class QuietServer(uvicorn.Server):
    """Leaves the process's signal handlers alone."""

    def capture_signals(self) -> Any:
        return nullcontext()


@dataclass
class World:
    """A running server with everything behind it at hand."""

    url: str
    port: int
    settings: Settings
    vault: FakeVault
    knowledge: FakeKnowledge
    authenticator: FakeAuthenticator
    hub: Hub
    endpoint: StreamEndpoint
    server: uvicorn.Server

    def publish(self, count: int = 1, *channels: str, pad: int = 0) -> None:
        """Commit and deliver `count` entries straight into the log."""
        fresh = [
            self.vault.append(*(channels or ("geoids",)), n=self.vault.head + 1, **({"pad": "x" * pad} if pad else {}))
            for _ in range(count)
        ]
        self.hub.deliver(fresh)


def build(
    settings: Settings, *, required: bool = False
) -> tuple[FakeVault, FakeKnowledge, FakeAuthenticator, Hub, StreamEndpoint]:
    vault = FakeVault()
    knowledge = FakeKnowledge(vault)
    authenticator = FakeAuthenticator(required)
    hub = Hub(vault, settings.stream)
    knowledge.hub = hub
    endpoint = StreamEndpoint(
        hub, knowledge, vault, authenticator, settings, server=ServerInfo("kimera-stream", "0", "test")
    )  # type: ignore[arg-type]
    return vault, knowledge, authenticator, hub, endpoint


@asynccontextmanager
async def serving(settings: Settings | None = None, *, egress: bool = True, required: bool = False, **options: Any):
    """A real uvicorn server on a loopback port. Without `egress` its own protocol class serves, so that the adapter is used."""
    settings = settings or Settings(_env_file=None)
    vault, knowledge, authenticator, hub, endpoint = build(settings, required=required)
    arguments: dict[str, Any] = uvicorn_options(settings)
    if not egress:
        arguments["ws"] = "websockets-sansio"
    arguments |= options
    config = uvicorn.Config(endpoint, port=0, lifespan="off", log_level="critical", access_log=False, **arguments)
    server = QuietServer(config)
    stopped = anyio.Event()

    async def serve() -> None:
        await server.serve()
        stopped.set()

    async with anyio.create_task_group() as group:
        group.start_soon(hub.run)
        group.start_soon(serve)
        await until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            yield World(
                f"ws://127.0.0.1:{port}/v1/stream",
                port,
                settings,
                vault,
                knowledge,
                authenticator,
                hub,
                endpoint,
                server,
            )
        finally:
            server.should_exit = True
            with anyio.CancelScope(shield=True):
                await stopped.wait()
            group.cancel_scope.cancel()


def settings_with(**groups: Any) -> Settings:
    return Settings(_env_file=None, **groups)


def principals(ids: Sequence[str]) -> list[Principal]:
    return [Principal(id, ALL_ROLES) for id in ids]


async def full_until_gone(world: World) -> None:
    """Keep the buffer of the one subscriber, which does not read, full until it is given up on."""
    with anyio.fail_after(20):
        while world.hub.statistics()["connections"]:
            # On a busy machine the system's buffer may take what looked stuck; and a stall may be over before it is seen here.
            if not world.hub.statistics()["stalled"]:
                world.publish(50, pad=2000)
            await anyio.sleep(0.002)
