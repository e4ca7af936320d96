"""What the HTTP door needs of the rest, and the streams that are open through it."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import anyio

from kimera_stream.core.access import Authenticator, Principal
from kimera_stream.core.interfaces import FieldService, KnowledgeService, Threads, VaultService
from kimera_stream.core.kept import Revocation, RevocationKind
from kimera_stream.infrastructure.settings import Settings
from kimera_stream.infrastructure.telemetry import Metrics
from kimera_stream.protocol.errors import OverloadedError, UnavailableError
from kimera_stream.protocol.filters import Filter
from kimera_stream.protocol.messages import CursorRef, Encoding, HistoryPage
from kimera_stream.protocol.objects import Position

StreamKind = Literal["ndjson", "sse"]


class ReaderStart(Protocol):
    """Where a reader starts: the body of ``subscribed``."""

    @property
    def channel(self) -> str: ...

    @property
    def epoch(self) -> str: ...

    @property
    def offset(self) -> int: ...

    @property
    def was_recovering(self) -> bool: ...

    @property
    def recovered(self) -> bool: ...


class ReaderEvent(Protocol):
    """One event: its offset, its type and the event object as JSON."""

    @property
    def offset(self) -> int: ...

    @property
    def type(self) -> str: ...

    @property
    def payload(self) -> bytes: ...


class ReaderEvents(Protocol):
    """Events in order, and how far they are."""

    def __aiter__(self) -> AsyncIterator[ReaderEvent]: ...

    @property
    def reached(self) -> int | None:
        """Everything up to here was given out, or does not pass the filter; None while there may be more to give out now."""


class Revoker(Protocol):
    """Makes tokens count no longer, on every node."""

    async def revoke(self, kind: RevocationKind, subject: str, *, by: str, expires_at: int | None = None) -> Revocation:
        """See ``RevocationStore.revoke``."""


class EventHub(Protocol):
    """The streaming core, as far as HTTP reads from it."""

    def compile(self, tree: Mapping[str, Any] | None) -> Filter | None:
        """A filter tree under the configured limits; raises BadFilterError."""

    def reader(
        self, channel: str, *, since: Position | None, filter: Filter | None, rewind: int | None, principal: str
    ) -> AbstractAsyncContextManager[tuple[ReaderStart, ReaderEvents]]:
        """Events of one channel, exactly once and in order, until the caller leaves or the hub ends."""

    def newest(self, channel: str) -> bytes | None:
        """The newest value of a latest channel as JSON, None before the first."""


class Readiness(Protocol):
    """Whether the server takes work, and how far its parts are."""

    @property
    def ready(self) -> bool: ...

    @property
    def draining(self) -> bool: ...

    @property
    def services(self) -> Mapping[str, str]: ...


class Check(Protocol):
    """Outcome of looking at one service; ``infrastructure.container``'s ``Health`` is one. ``latency`` in seconds."""

    @property
    def ok(self) -> bool: ...

    @property
    def latency(self) -> float: ...

    @property
    def error(self) -> str | None: ...


class OpenStreams:
    """The streaming requests under way, by direction. A stop tells them to end, and waits for them.

    A server that stops calls ``drain_lines`` first (no more lines are read; those read are answered), finishes its work, and
    then calls ``drain`` (event streams end).
    """

    def __init__(self) -> None:
        self.lines_stopping = anyio.Event()
        self.events_stopping = anyio.Event()
        self._open = {"ndjson": 0, "sse": 0}
        self._ended = anyio.Event()

    @property
    def open(self) -> int:
        return sum(self._open.values())

    @contextmanager
    def one(self, kind: StreamKind, limit: int) -> Iterator[None]:
        """Around the life of one stream.

        Raises:
            OverloadedError: ``limit`` are open.
        """
        if self.open >= limit:
            raise OverloadedError(f"the server has its {limit} streams open; try again later", retry_after=5.0)
        self._open[kind] += 1
        try:
            yield
        finally:
            self._open[kind] -= 1
            self._ended.set()

    async def drain_lines(self, seconds: float) -> None:
        """Read no more lines, and wait until those read are answered, ``seconds`` at most."""
        self.lines_stopping.set()
        await self._wait(("ndjson",), seconds)

    async def drain(self, seconds: float) -> None:
        """Tell every stream to end at its next whole result, and wait until all have, ``seconds`` at most."""
        self.lines_stopping.set()
        self.events_stopping.set()
        await self._wait(("ndjson", "sse"), seconds)

    async def _wait(self, kinds: tuple[StreamKind, ...], seconds: float) -> None:
        with anyio.move_on_after(seconds):
            while any(self._open[kind] for kind in kinds):
                if self._ended.is_set():  # else somebody waits for it already
                    self._ended = anyio.Event()
                await self._ended.wait()


class HistoryPages(Protocol):
    """Pages of a channel's past; the same that answers the WebSocket's ``history``."""

    async def history(
        self,
        channel: str,
        *,
        since: Position | CursorRef | None,
        limit: int,
        reverse: bool,
        principal: Principal,
        encoding: Encoding,
    ) -> HistoryPage:
        """Raises OperationalError: bad channel, position or limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorServices:
    """What is there once the server has loaded. ``commands`` is ``streaming.commands.Commands``."""

    knowledge: KnowledgeService
    vault: VaultService
    commands: HistoryPages
    hub: EventHub
    field: FieldService
    revoker: Revoker


@dataclass(slots=True, kw_only=True)
class HttpDoor:
    """Everything the HTTP operations ask.

    The door answers from the first moment: liveness, readiness, metrics and documents. The rest is refused with
    ``unavailable`` until ``services`` is set.

    Attributes:
        readiness: Whether the server takes work; asked at every request, so it must be cheap.
        health: Looks at every service; the answer names each with its state. Bounded in time by the callee.
        versions: Names and versions of what runs, for /health.
        node: Name of this node.
        refusal: Why this node takes no requests, ever: it has another role. Empty: it takes them.
        cluster: Numbers of the nodes and slices, for /health, where there are several.
    """

    authenticator: Authenticator
    settings: Settings
    metrics: Metrics
    threads: Threads
    readiness: Callable[[], Readiness]
    health: Callable[[], Awaitable[Mapping[str, Check]]]
    node: str
    version: str
    versions: Mapping[str, str] = field(default_factory=dict)
    streams: OpenStreams = field(default_factory=OpenStreams)
    services: DoorServices | None = None
    refusal: str = ""
    cluster: Callable[[], Mapping[str, Any]] | None = None
    opened_at: float = field(default_factory=time.monotonic)

    def opened(self) -> DoorServices:
        """The services, for an operation that needs them.

        Raises:
            UnavailableError: the server has not loaded yet, or is stopping.
        """
        state = self.readiness()
        if state.draining or self.streams.lines_stopping.is_set():
            raise UnavailableError("the server is stopping", retry_after=1.0)
        if self.refusal:
            raise UnavailableError(self.refusal)
        if self.services is None:
            waiting = ", ".join(f"{name}: {how}" for name, how in state.services.items() if how != "ready")
            raise UnavailableError(f"the server is starting ({waiting or 'nearly done'})", retry_after=1.0)
        return self.services
