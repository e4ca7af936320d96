"""The HTTP door over an in-memory log and knowledge service, with the real hub; behind ASGI or behind a real server."""

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx
import msgspec
import numpy as np
import pytest
import uvicorn
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette

from kimera_stream.api.http.door import DoorServices, HttpDoor
from kimera_stream.api.http.protocol import KimeraHttpProtocol
from kimera_stream.api.http.routes import http_routes
from kimera_stream.api.middleware import http_middleware
from kimera_stream.api.problems import EXCEPTION_HANDLERS
from kimera_stream.core.access import ALL_ROLES, Principal
from kimera_stream.core.interfaces import LogPage, Page, PublishResult, StoredGeoid
from kimera_stream.core.kept import Revocation, RevocationKind, UsageRecord
from kimera_stream.infrastructure.settings import Settings
from kimera_stream.infrastructure.telemetry import Metrics, Tracing
from kimera_stream.protocol.errors import (
    BadRequestError,
    ConflictError,
    NotFoundError,
    UnauthorizedError,
    UnavailableError,
)
from kimera_stream.protocol.log import LogEntry
from kimera_stream.protocol.objects import (
    Components,
    Contradiction,
    FieldState,
    Geoid,
    GeoidBody,
    Scar,
    ScoredGeoid,
    ScoreResult,
    StageReport,
    Watch,
)
from kimera_stream.streaming.commands import Commands
from kimera_stream.streaming.hub import Hub

COMPONENTS = Components(
    relatedness=0.9, semantic=0.8, embedding_misalignment=0.1, layer_conflict=0, symbolic_opposition=1, composite=0.5
)


def contradiction(id: str, offset: int, *, score: float = 0.9, state: Any = "open") -> Contradiction:
    return Contradiction(
        id=id, a="a", b="b", score=score, components=COMPONENTS, why=["symbolic: status: 'up' vs 'down'"],
        gradient_type="symbolic", pulse_strength=0.5, decision="collapse", state=state, model="rules", detected_at=1,
        offset=offset,
    )  # fmt: skip


class MemoryVault:
    """The parts of a vault that the HTTP door reads."""

    def __init__(self) -> None:
        self.epoch = "E1"
        self.trimmed = 0
        self.entries: list[LogEntry] = []
        self.stored: dict[str, StoredGeoid] = {}
        self.contradictions: dict[str, Contradiction] = {}
        self.scars: list[Scar] = []
        self.used: list[UsageRecord] = []
        self.broken: Exception | None = None
        self.gate: anyio.Event | None = None
        """Awaited before each read of the log answers."""

    @property
    def head(self) -> int:
        return self.trimmed + len(self.entries)

    def append(self, type: str, data: Any, *channels: str) -> LogEntry:
        entry = LogEntry(self.head + 1, type, 1_700_000_000_000, channels, msgspec.Raw(msgspec.json.encode(data)))
        self.entries.append(entry)
        return entry

    def trim(self, upto: int) -> None:
        del self.entries[: upto - self.trimmed]
        self.trimmed = upto

    async def read(
        self, channel: str | None, *, after: int, limit: int, until: int | None = None, reverse: bool = False
    ) -> LogPage:
        await anyio.lowlevel.checkpoint()
        if self.gate is not None:
            await self.gate.wait()
        end = self.head if until is None else until
        found = [e for e in self.entries if after < e.offset <= end and (channel is None or channel in e.channels)]
        if reverse:
            return LogPage(found[::-1][:limit], end, len(found) > limit)
        page = found[:limit]
        return LogPage(page, page[-1].offset if len(found) > limit else end, len(found) > limit)

    async def geoid(self, geoid_id: str) -> StoredGeoid | None:
        if self.broken is not None:
            raise self.broken
        return self.stored.get(geoid_id)

    def _page(self, items: Sequence[Any], after: int, limit: int) -> Page[Any]:
        later = sorted((item for item in items if item.offset > after), key=lambda item: item.offset)
        return Page(later[:limit], later[limit - 1].offset if len(later) > limit else None)

    async def list_geoids(
        self, *, after: int, limit: int, session_id: str | None = None, agent_id: str | None = None
    ) -> Page[Geoid]:
        kept = [
            stored.geoid
            for stored in self.stored.values()
            if session_id in (None, stored.geoid.session_id) and agent_id in (None, stored.geoid.originator_agent_id)
        ]
        return self._page(kept, after, limit)

    async def contradiction(self, contradiction_id: str) -> Contradiction | None:
        return self.contradictions.get(contradiction_id)

    async def list_contradictions(
        self, *, after: int, limit: int, state: Any = None, min_score: float | None = None, geoid_id: str | None = None
    ) -> Page[Contradiction]:
        kept = [
            found
            for found in self.contradictions.values()
            if state in (None, found.state)
            and (min_score is None or found.score >= min_score)
            and geoid_id in (None, found.a, found.b)
        ]
        return self._page(kept, after, limit)

    async def list_scars(self, *, after: int, limit: int) -> Page[Scar]:
        return self._page(self.scars, after, limit)

    async def cursor(self, principal: str, name: str, channel: str) -> int | None:
        return None

    async def usage(self, *, since_day: int = 0, principal: str | None = None, limit: int = 1_000) -> list[UsageRecord]:
        kept = [row for row in self.used if row.day >= since_day and principal in (None, row.principal)]
        return kept[:limit]


class MemoryKnowledge:
    """Commits to the memory vault and delivers to the hub.

    ``gate``, if set, holds every publish until opened. ``fail`` maps a text to the errors its publishes meet, first to last.
    """

    def __init__(self, vault: MemoryVault, hub: Hub) -> None:
        self.vault = vault
        self.hub = hub
        self.gate: anyio.Event | None = None
        self.fail: dict[str, list[Exception]] = {}
        self.calls: list[dict[str, Any]] = []
        self.keys: dict[tuple[str, str], PublishResult] = {}
        self.under_way = 0
        self.most_under_way = 0
        self.asked: list[tuple[str, Any]] = []
        self.known_watches: dict[str, Watch] = {}

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
        self.calls.append({"body": body, "principal": principal.id, "key": key, "priority": priority, "merge": merge})
        if errors := self.fail.get(body.text or ""):
            raise errors.pop(0)
        if body.text is None and body.symbolic_state is None and not merge:
            raise BadRequestError("geoid: expected at least one of text, vector", field="geoid")
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            if self.gate is not None:
                await self.gate.wait()
            await anyio.lowlevel.checkpoint()
        finally:
            self.under_way -= 1
        if key is not None and (first := self.keys.get((principal.id, key))):
            return PublishResult(first.geoid, first.offset, first.contradictions, True)
        old = self.vault.stored.get(body.id or "")
        if must_exist and old is None:
            raise NotFoundError(f"id: there is no geoid {body.id}", field="id")
        offset = self.vault.head + 1
        previous = old.geoid if old else None
        geoid = Geoid(
            id=body.id or f"g{offset}",
            version=previous.version + 1 if previous else 1,
            text=body.text if body.text is not None or previous is None else previous.text,
            semantic_state={},
            symbolic_state=dict(body.symbolic_state or (previous.symbolic_state if previous else {})),
            metadata=dict(body.metadata or {}),
            session_id=body.session_id,
            originator_agent_id=body.originator_agent_id,
            entropy=0.0,
            created_at=1,
            updated_at=2,
            offset=offset,
        )
        vector = None if body.vector is None else np.asarray(body.vector, dtype=np.float32)
        self.vault.stored[geoid.id] = StoredGeoid(geoid, vector, principal.id)
        kind = "geoid.updated" if previous else "geoid.created"
        self.hub.deliver([self.vault.append(kind, geoid, "geoids", f"geoid:{geoid.id}")])
        result = PublishResult(geoid, offset, [], False)
        if key is not None:
            self.keys[principal.id, key] = result
        return result

    async def delete(self, geoid_id: str, *, principal: Principal, session_id: str | None = None) -> int:
        stored = self.vault.stored.pop(geoid_id, None)
        if stored is None:
            raise NotFoundError(f"id: there is no geoid {geoid_id}", field="id")
        entry = self.vault.append("geoid.deleted", stored.geoid, "geoids", f"geoid:{geoid_id}")
        self.hub.deliver([entry])
        return entry.offset

    async def resolve(
        self,
        contradiction_id: str,
        decision: Any,
        reason: str | None,
        *,
        principal: Principal,
        session_id: str | None = None,
    ) -> tuple[Scar, int]:
        found = self.vault.contradictions.get(contradiction_id)
        if found is None:
            raise NotFoundError(f"id: there is no contradiction {contradiction_id}", field="id")
        if found.state != "open":
            raise ConflictError(f"id: {contradiction_id} is {found.state}", field="id")
        offset = self.vault.head + 1
        scar = Scar(
            id=f"s{offset}", contradiction_id=contradiction_id, geoids=("a", "b"), decision=decision, reason=reason,
            resolved_by=principal.id, vault="a", pre_entropy=1.0, post_entropy=0.5, delta_entropy=-0.5, weight=1.0,
            created_at=1, offset=offset,
        )  # fmt: skip
        self.vault.append("scar.formed", scar, "scars")
        self.vault.scars.append(scar)
        self.vault.contradictions[contradiction_id] = msgspec.structs.replace(found, state="resolved")
        return scar, offset

    async def score(self, a: GeoidBody, b: GeoidBody, *, explain: bool = False) -> ScoreResult:
        stages = [StageReport(stage="scan", ran=True, passed=True, value=0.9)] if explain else []
        return ScoreResult(score=0.8, components=COMPONENTS, why=[f"{a.text} / {b.text}"], stages=stages)

    async def search(self, **asked: Any) -> list[ScoredGeoid]:
        self.asked.append(("search", asked))
        return [ScoredGeoid(geoid=s.geoid, score=0.5) for s in list(self.vault.stored.values())[: asked["k"]]]

    async def watch(self, name: str, *, principal: Principal, **asked: Any) -> Watch:
        watch = Watch(
            id=f"w-{name}", watch=name, principal=principal.id, text=asked["text"], kinds=asked["kinds"],
            min_score=asked["min_score"], filter=asked["filter"], created_at=1,
        )  # fmt: skip
        self.known_watches[name] = watch
        return watch

    async def unwatch(self, name: str, *, principal: Principal) -> None:
        if self.known_watches.pop(name, None) is None:
            raise NotFoundError(f"watch: there is no watch {name}", field="watch")

    async def watches(self, *, principal: Principal) -> list[Watch]:
        return list(self.known_watches.values())

    def watch_owner(self, watch_id: str) -> str | None:
        return next((watch.principal for watch in self.known_watches.values() if watch.id == watch_id), None)

    async def find_watch(self, watch_id: str) -> str | None:
        return self.watch_owner(watch_id)


class MemoryField:
    def state(self) -> FieldState:
        return FieldState(
            geoids=1,
            open_contradictions=0,
            entropy=0,
            temperature=0,
            activation=0,
            stability=1,
            clusters=[],
            updated_at=1,
        )


class TokenNames:
    """A token is ``name/role+role[@expires]``; ``bad`` is refused. Without one: everything, unless required."""

    def __init__(self) -> None:
        self.required = False

    def known(self, token: str | None) -> Principal | None:
        return None

    async def authenticate(self, token: str | None) -> Principal:
        await anyio.lowlevel.checkpoint()
        if token is None:
            if self.required:
                raise UnauthorizedError("token: required", field="token")
            return Principal("anonymous", ALL_ROLES)
        if token == "bad":
            raise UnauthorizedError("token: not valid", field="token")
        rest, _, expires = token.partition("@")
        name, _, roles = rest.partition("/")
        return Principal(name, frozenset(filter(None, roles.split("+"))), int(expires) if expires else None)  # type: ignore[arg-type]

    def holds(self, principal: Principal) -> bool:
        return True

    async def revoked(self, principal: Principal) -> None:
        await anyio.sleep_forever()


class MemoryRevoker:
    """Remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str, int | None]] = []

    async def revoke(self, kind: RevocationKind, subject: str, *, by: str, expires_at: int | None = None) -> Revocation:
        self.asked.append((kind, subject, by, expires_at))
        return Revocation(len(self.asked), kind, subject, 1_700_000_000_000)


class InlineThreads:
    async def run(self, purpose: str, fn: Callable[..., Any], *args: Any) -> Any:
        return await anyio.to_thread.run_sync(fn, *args)


@dataclass
class State:
    ready: bool = True
    draining: bool = False
    services: Mapping[str, str] = field(default_factory=lambda: {"vault": "ready", "index": "ready"})


@dataclass
class Look:
    ok: bool = True
    latency: float = 0.001
    error: str | None = None


class World:
    """Everything behind the door, and ways through it."""

    def __init__(self, **groups: Any) -> None:
        self.settings = Settings(_env_file=None, **groups)
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry)
        self.vault = MemoryVault()
        self.hub = Hub(self.vault, self.settings.stream)
        self.knowledge = MemoryKnowledge(self.vault, self.hub)
        self.revoker = MemoryRevoker()
        self.authenticator = TokenNames()
        self.state = State()
        self.checks: dict[str, Look] = {"vault": Look()}

        async def health() -> dict[str, Look]:
            return self.checks

        self.door = HttpDoor(
            authenticator=self.authenticator,
            settings=self.settings,
            metrics=self.metrics,
            threads=InlineThreads(),
            readiness=lambda: self.state,
            health=health,
            node="n1",
            version="1.2.3",
            versions={"python": "3"},
            services=DoorServices(
                knowledge=self.knowledge,
                vault=self.vault,  # type: ignore[arg-type]
                commands=Commands(self.hub, self.knowledge, self.vault),  # type: ignore[arg-type]
                hub=self.hub,
                field=MemoryField(),
                revoker=self.revoker,
            ),
        )

    def app(self) -> Starlette:
        return Starlette(
            routes=http_routes(self.door),
            exception_handlers=EXCEPTION_HANDLERS,
            middleware=http_middleware(self.door, Tracing(None)),
        )

    @asynccontextmanager
    async def client(self, *, peer: str = "127.0.0.1", **options: Any) -> AsyncIterator[httpx.AsyncClient]:
        """Through ASGI, without a socket. Streams come whole: use ``serving`` for those."""
        transport = httpx.ASGITransport(self.app(), client=(peer, 1234))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8765", **options) as client:
            yield client

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[httpx.AsyncClient]:
        """Behind uvicorn on a loopback port, with the hub running."""
        config = uvicorn.Config(
            self.app(), port=0, lifespan="off", log_config=None, access_log=False, http=KimeraHttpProtocol, ws="none",
            timeout_graceful_shutdown=5,
        )  # fmt: skip
        self.server = server = QuietServer(config)
        stopped = anyio.Event()

        async def serve() -> None:
            await server.serve()
            stopped.set()

        async with anyio.create_task_group() as group:
            group.start_soon(self.hub.run)
            group.start_soon(serve)
            await until(lambda: server.started)
            self.port = server.servers[0].sockets[0].getsockname()[1]
            try:
                base = f"http://127.0.0.1:{self.port}"
                async with httpx.AsyncClient(base_url=base, timeout=20, trust_env=False) as client:
                    yield client
            finally:
                server.should_exit = True
                with anyio.CancelScope(shield=True):
                    await self.door.streams.drain(5)
                    await stopped.wait()
                group.cancel_scope.cancel()

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


class QuietServer(uvicorn.Server):
    """Leaves the process's signal handlers alone."""

    def capture_signals(self) -> Any:
        return nullcontext()


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for something that announces itself in no other way, such as a peer's socket buffer."""
    with anyio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110
            await anyio.sleep(0.005)


@pytest.fixture
def make_world() -> Iterator[Callable[..., World]]:
    return World


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def eventually() -> Callable[..., Any]:
    return until


@pytest.fixture
def make_contradiction() -> Callable[..., Contradiction]:
    return contradiction


@pytest.fixture
def unavailable() -> UnavailableError:
    return UnavailableError("the database does not answer", retry_after=2.4)
