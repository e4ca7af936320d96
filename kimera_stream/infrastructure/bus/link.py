"""Connections to Redis that are made again when they are lost."""

import contextlib
import logging
import random
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import parse_qsl, urlsplit

import anyio
import structlog
from coredis.connection import BaseConnection, UnixDomainSocketLocation
from coredis.exceptions import ConnectionError as RedisConnectionError
from coredis.exceptions import ReadOnlyError, RedisError
from coredis.pool import ConnectionPool

from kimera_stream.infrastructure.bus.unix import UnixConnection
from kimera_stream.infrastructure.tasks.policy import Backoff
from kimera_stream.protocol.errors import OverloadedError, UnavailableError

log = structlog.get_logger(__name__)
logging.getLogger("coredis").setLevel(logging.CRITICAL)
"""It logs each attempt to connect with its traceback; we log a loss and its end, one line each."""

Argument: TypeAlias = bytes | str | int | float
Connection: TypeAlias = BaseConnection

BACKOFF = Backoff(base=0.1, factor=2.0, maximum=1.0, floor=0.05)
OVERHEAD = 128
"""Bytes counted per operation besides its arguments."""
AWAY = (RedisConnectionError, TimeoutError, OSError)
"""What a lost or refused connection looks like."""
UNWRITABLE = ("OOM", "MISCONF", "NOREPLICAS", "MASTERDOWN")
"""How Redis begins when it cannot be written to at present, besides READONLY."""
TROUBLE = (RedisError, TimeoutError, OSError)
"""That, or Redis answering with an error (loading its data, wrong password, a key of another kind): try again later."""


class Contact:
    """Where Redis is, and how to reach it.

    Args:
        url: redis://, rediss:// or unix://.
        timeout: Seconds for a connection to stand, and for any answer.
        name: Shown by Redis in ``CLIENT LIST``.
    """

    def __init__(self, url: str, *, timeout: float, name: str) -> None:
        self._url = url
        self._name = "".join(char if char.isalnum() or char in "-_.:" else "-" for char in name)
        self.timeout = timeout

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Connection]:
        """One connection for as long as the block lasts. Enter and leave it in one task.

        Raises:
            RedisConnectionError: refused, unreachable, not ready within the timeout, or no Redis.
            OSError: a file of certificates cannot be read.
        """
        parts = urlsplit(self._url)
        tls = await anyio.to_thread.run_sync(_tls, parts.query) if parts.scheme == "rediss" else None
        options: dict[str, Any] = {} if tls is None else {"ssl_context": tls}
        # A pool of one, because it knows how to read URLs and who owns the connection's tasks.
        pool: ConnectionPool[Any] = ConnectionPool.from_url(
            self._url,
            decode_components=True,
            max_connections=1,
            connect_timeout=self.timeout,
            client_name=self._name,
            **options,
        )
        if isinstance(pool.location, UnixDomainSocketLocation):
            pool.connection_class = UnixConnection
        trouble: Exception | None = None
        async with pool:
            try:
                connection: Connection | None = None
                with anyio.move_on_after(self.timeout):
                    connection = await pool.get_connection()
                if connection is None:
                    raise RedisConnectionError(f"no answer within {self.timeout:g} s")
                try:
                    yield connection
                finally:
                    connection.invalidate()
            except TROUBLE as error:
                trouble = error  # out of the pool's task group it would come as a group
        if trouble is not None:
            raise trouble


def _tls(query: str) -> ssl.SSLContext:
    """What the URL asks for, and certificates checked in full where it asks for nothing: coredis by itself takes one that is valid for any
    host. Reads files.

    Raises:
        OSError: one cannot be read, or is none.
    """
    given = dict(parse_qsl(query))
    authorities = Path(given["ssl_ca_certs"]) if "ssl_ca_certs" in given else None
    if authorities is None:
        context = ssl.create_default_context()
    elif authorities.is_dir():
        context = ssl.create_default_context(capath=authorities)
    else:
        context = ssl.create_default_context(cafile=authorities)
    if "ssl_certfile" in given:
        context.load_cert_chain(given["ssl_certfile"], given.get("ssl_keyfile"))
    unchecked = given.get("ssl_cert_reqs") == "none"
    if unchecked or given.get("ssl_check_hostname", "").lower() in ("false", "0", "no"):
        context.check_hostname = False
    if unchecked:
        context.verify_mode = ssl.CERT_NONE
    return context


class Waits:
    """Delays between attempts, growing until one succeeds."""

    def __init__(self) -> None:
        self._rng = random.Random()  # noqa: S311 - spreads reconnections, protects nothing
        self._attempt = 0

    def succeeded(self) -> None:
        self._attempt = 0

    async def pause(self) -> None:
        self._attempt += 1
        await anyio.sleep(BACKOFF.delay(self._attempt, self._rng))


@dataclass(slots=True, eq=False)
class Pending:
    """An operation that was sent. ``failed``: called if it has not been confirmed."""

    request: Any
    size: int
    settled: anyio.Event | None = None
    result: Any = None
    error: Exception | None = None
    failed: Callable[[], None] | None = None


class Link:
    """One connection for operations that Redis answers at once, pipelined in the order of the calls.

    Args:
        contact: How to reach Redis.
        max_items: Operations sent and not yet confirmed at most.
        max_bytes: Their bytes.
        on_contact: Called each time the contact is there (again), before anything else can be sent.
        probe: Key to write to: there is contact only where one can write.
    """

    PING_EVERY = 0.5
    """Seconds of quiet before the contact is tried out."""
    COMPLAIN_EVERY = 10.0
    """Seconds between two lines about operations that Redis refuses."""

    def __init__(
        self, contact: Contact, *, max_items: int, max_bytes: int, on_contact: Callable[[], None], probe: str
    ) -> None:
        self._contact = contact
        self._probe = probe
        self._complain_from = 0.0
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._on_contact = on_contact
        self._connection: Connection | None = None
        self._pending: deque[Pending] = deque()
        self._sent_something = anyio.Event()
        self.bytes = 0
        self.confirmed = 0
        self.contacts = 0

    @property
    def connected(self) -> bool:
        return self._connection is not None and self._connection.usable

    @property
    def items(self) -> int:
        """Operations sent and not yet confirmed."""
        return len(self._pending)

    async def run(self) -> None:
        """Keep the connection until cancelled."""
        waits, away = Waits(), False
        while True:
            try:
                async with self._contact.open() as connection:
                    with anyio.fail_after(self._contact.timeout):
                        await connection.create_request(b"SET", self._probe, b"", b"PX", 60_000)
                    if away or self.contacts:
                        log.info("the bus is in contact with Redis again")
                    waits.succeeded()
                    away = False
                    await self._use(connection)
            except TROUBLE as error:
                if not away:  # one line a loss, not one an attempt
                    log.warning("the bus has no contact with Redis", error=str(error) or type(error).__name__)
                away = True
            await waits.pause()

    async def _use(self, connection: Connection) -> None:
        self._connection = connection
        self.contacts += 1
        try:
            self._on_contact()
            while True:
                await self._settle_next()
        finally:
            self._connection = None
            while self._pending:
                self._settle(self._pending.popleft(), error=UnavailableError("the bus lost its contact with Redis"))

    async def _settle_next(self) -> None:
        """Wait for the answer to the oldest operation; the order of answers is that of the operations."""
        if not self._pending:
            self._sent_something = anyio.Event()
            with anyio.move_on_after(self.PING_EVERY):
                await self._sent_something.wait()
            if not self._pending:
                try:
                    self._send(Pending(None, OVERHEAD), b"PING", ())
                except UnavailableError:
                    raise RedisConnectionError("the connection was lost") from None
        pending = self._pending[0]
        error: Exception | None = None
        with anyio.fail_after(self._contact.timeout):
            try:
                pending.result = await pending.request
            except AWAY:
                raise
            except RedisError as refusal:
                if isinstance(refusal, ReadOnlyError) or str(refusal).startswith(UNWRITABLE):
                    raise  # the same for all that follows: find out by the probe when it can be written to, or who can
                error = self._refused(refusal)
        self._pending.popleft()
        self._settle(pending, error=error)

    def _refused(self, refusal: RedisError) -> UnavailableError:
        """One operation's trouble: not permitted, a key of another kind."""
        now = anyio.current_time()
        if now >= self._complain_from:
            self._complain_from = now + self.COMPLAIN_EVERY
            log.warning("Redis refused an operation of the bus", error=str(refusal))
        return UnavailableError("Redis refused an operation of the bus; the log of the server has its reason")

    def _settle(self, pending: Pending, *, error: Exception | None) -> None:
        self.bytes -= pending.size
        pending.error = error
        if error is None:
            self.confirmed += 1
        elif pending.failed is not None:
            pending.failed()
        if pending.settled is not None:
            pending.settled.set()

    def _send(self, pending: Pending, command: bytes, arguments: tuple[Argument, ...]) -> None:
        connection = self._connection
        if connection is None:
            raise UnavailableError("the bus has no contact with Redis", retry_after=1.0)
        try:
            pending.request = connection.create_request(command, *arguments)
        except RedisConnectionError:
            raise UnavailableError("the bus has no contact with Redis", retry_after=1.0) from None
        self._pending.append(pending)
        self.bytes += pending.size
        self._sent_something.set()

    def _admit(self, size: int) -> None:
        if len(self._pending) >= self._max_items or self.bytes + size > self._max_bytes:
            raise OverloadedError("the bus is full on this node; try again shortly", retry_after=1.0)

    def post(self, command: bytes, *arguments: Argument, failed: Callable[[], None] | None = None) -> None:
        """Send without waiting; ``failed`` is called if it was sent and not confirmed.

        Raises:
            OverloadedError: too much is not confirmed yet. Nothing was sent.
            UnavailableError: no contact. Nothing was sent.
        """
        size = _size(arguments)
        self._admit(size)
        self._send(Pending(None, size, failed=failed), command, arguments)

    async def call(self, command: bytes, *arguments: Argument) -> Any:
        """Send and wait for the answer (bytes, int, list, None).

        Raises:
            OverloadedError: too much is not confirmed yet. Nothing was sent.
            UnavailableError: no contact, none any more, or no answer in time. It may have been done.
        """
        size = _size(arguments)
        self._admit(size)
        pending = Pending(None, size, anyio.Event())
        self._send(pending, command, arguments)
        assert pending.settled is not None
        with anyio.move_on_after(self._contact.timeout) as scope:
            await pending.settled.wait()
        if scope.cancelled_caught and not pending.settled.is_set():
            raise UnavailableError("Redis did not answer the bus in time", retry_after=1.0)
        if pending.error is not None:
            raise pending.error
        return pending.result


def _size(arguments: tuple[Argument, ...]) -> int:
    return OVERHEAD + sum(len(argument) for argument in arguments if isinstance(argument, (bytes, str)))
