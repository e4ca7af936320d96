"""Keeping one connection alive: handshake, reconnect with backoff, and subscriptions that go on where they stopped."""

import math
import ssl as ssl_module
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from inspect import isawaitable
from types import TracebackType
from typing import Literal, Self, TypeVar

import anyio
from anyio.abc import TaskGroup, TaskStatus

from kimera_stream.client.backoff import Backoff
from kimera_stream.client.errors import ConnectionLostError, error_of, error_of_close, may_reconnect
from kimera_stream.client.link import Link, open_link
from kimera_stream.client.subscription import Subscription
from kimera_stream.client.wire import Codec, http_base, stream_url
from kimera_stream.protocol import messages as m
from kimera_stream.protocol.errors import (
    KimeraError,
    OperationalError,
    OverloadedError,
    RateLimitedError,
    UnavailableError,
)

R = TypeVar("R", bound=m.Reply)
Token = str | Callable[[], str | Awaitable[str]]
State = Literal["connecting", "connected", "waiting", "ended"]
StateCallback = Callable[[State, str], None]
"""Called with the new state and a short text for a person (for ``waiting``: why and for how long)."""

try:
    _VERSION = version("kimera-stream")
except PackageNotFoundError:
    _VERSION = "0.0.0"


PASSING = (UnavailableError, OverloadedError, RateLimitedError)
"""Why a subscription cannot be taken up at present, and can be later."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a client behaves; see ``connect`` for the meaning of each."""

    encoding: m.Encoding = "json"
    patience: float = 0.0
    timeout: float = 30.0
    max_pending: int = 256
    max_message_bytes: int = 16 * 1024 * 1024
    backoff: Backoff = field(default_factory=Backoff)
    ssl: ssl_module.SSLContext | None = None
    name: str = "kimera-stream-python"
    on_state: StateCallback | None = None


class Lifeline:
    """One connection at a time, taken up again whenever it is lost. ``Client`` adds the commands."""

    def __init__(self, url: str, *, token: Token | None = None, options: Options | None = None) -> None:
        self.url = http_base(url)
        self._options = options or Options()
        self._token = token
        self._codec = Codec(self._options.encoding)
        self._subscriptions: dict[str, Subscription] = {}
        self._link: Link | None = None
        self._changed = anyio.Event()
        self._error: KimeraError | None = None
        self._window = anyio.Semaphore(self._options.max_pending)
        self._group: TaskGroup | None = None
        self._welcome: m.Connected | None = None
        self._announce: TaskStatus[None] | None = None
        """Whom to tell of the first connection; None once told."""

    async def __aenter__(self) -> Self:
        group = anyio.create_task_group()
        await group.__aenter__()
        self._group = group
        try:
            await group.start(self._keep_connected)
        except BaseException as exc:
            group.cancel_scope.cancel()
            try:
                await group.__aexit__(type(exc), exc, exc.__traceback__)
            except BaseExceptionGroup as errors:
                if exc not in errors.exceptions:
                    raise
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> bool:
        group = self._group
        if group is None:
            return False
        self._group = None
        group.cancel_scope.cancel()
        try:
            return bool(await group.__aexit__(kind, exc, trace))
        except BaseExceptionGroup as errors:
            # The group wraps whatever the caller's own block raised; the caller wants to see that itself.
            if exc is not None and exc in errors.exceptions:
                return False
            raise
        finally:
            self._finish(None)

    @property
    def server(self) -> m.Connected:
        """What the server said of itself on the newest connection: session, epoch, offset, limits."""
        if self._welcome is None:
            raise UnavailableError("not connected yet: use the client as `async with connect(...) as client`")
        return self._welcome

    @property
    def connected(self) -> bool:
        """Whether there is a live connection at this moment."""
        return self._link is not None

    async def _keep_connected(self, *, task_status: TaskStatus[None]) -> None:
        self._announce = task_status
        attempt = 0
        give_up = anyio.current_time() + self._options.patience
        while True:
            self._say("connecting", self.url)
            hint: float | None = None
            try:
                reason, steady = await self._one_connection()
                attempt = 0 if steady else attempt
            except KimeraError as exc:
                first = self._starting()
                temporary = isinstance(exc, OperationalError) and exc.temporary
                if first and (not temporary or anyio.current_time() >= give_up):
                    raise
                if not temporary:
                    self._finish(exc)
                    return
                reason = str(exc)
                hint = exc.retry_after if isinstance(exc, OperationalError) else None
            delay = self._options.backoff.delay(attempt, hint)
            if self._starting() and math.isfinite(give_up):
                delay = min(delay, max(0.0, give_up - anyio.current_time()))
            attempt += 1
            self._say("waiting", f"{reason}; trying again in {delay:.1f} s")
            await anyio.sleep(delay)

    def _starting(self) -> bool:
        return self._announce is not None

    async def _one_connection(self) -> tuple[str, bool]:
        """From handshake to loss; returns why it ended and whether it had been steady. Raises where it is final."""
        options = self._options
        link = await open_link(
            stream_url(self.url),
            self._codec,
            self._on_push,
            max_message_bytes=options.max_message_bytes,
            ssl=options.ssl,
            open_timeout=min(10.0, options.timeout),
        )
        code: int | None = None
        reason = ""
        started = anyio.current_time()
        failure: KimeraError | None = None

        async def introduce() -> None:
            nonlocal failure
            try:
                with anyio.fail_after(options.timeout):
                    await self._introduce(link)
            except ConnectionLostError:
                return  # the reader knows the close code, which says more
            except TimeoutError:
                failure = UnavailableError(f"{self.url} did not answer `connect` within {options.timeout:g} s")
            except KimeraError as exc:
                failure = exc
            if failure is not None:
                group.cancel_scope.cancel()
                return
            self._set_link(link)
            self._say("connected", self.url)
            if self._announce is not None:
                self._announce.started()
                self._announce = None

        try:
            async with anyio.create_task_group() as group:
                group.start_soon(introduce)
                code, reason = await link.read()
                group.cancel_scope.cancel()
        finally:
            self._set_link(None)
            await link.close()
        if failure is not None:
            raise failure
        if code is not None and not may_reconnect(code):
            raise error_of_close(code, reason)
        text = f"connection lost ({code} {reason})".replace("None ", "") if code or reason else "connection lost"
        return text, anyio.current_time() - started >= options.backoff.steady

    async def _introduce(self, link: Link) -> None:
        token = await self._fresh_token()
        asked = [(sub, sub.body()) for sub in self._subscriptions.values()]

        def on_reply(reply: m.Reply) -> None:
            if not isinstance(reply, m.Connected):
                return
            self._welcome = reply
            for (sub, body), answer in zip(asked, reply.subs or [], strict=False):
                if isinstance(answer, m.Subscribed):
                    sub.started(body, answer)
                    continue
                error = error_of(answer.code, answer.message, field=answer.field, retry_after=answer.retry_after)
                if isinstance(error, PASSING):
                    sub.put_off()
                else:
                    self._subscriptions.pop(sub.channel, None)
                    sub.end(error)

        await link.call(
            lambda command_id: m.Connect(
                id=command_id,
                token=token,
                client=m.ClientInfo(self._options.name, _VERSION),
                subs=[body for _, body in asked] or None,
            ),
            m.Connected,
            on_reply=on_reply,
        )

    async def _fresh_token(self) -> str | None:
        if callable(self._token):
            token = self._token()
            return await token if isawaitable(token) else token
        return self._token

    def _set_link(self, link: Link | None) -> None:
        self._link = link
        self._changed.set()
        self._changed = anyio.Event()

    def _finish(self, error: KimeraError | None) -> None:
        self._error = self._error or error or UnavailableError("the client is closed")
        self._set_link(None)
        for sub in list(self._subscriptions.values()):
            sub.end(error)
        self._subscriptions.clear()
        self._say("ended", str(error or "closed"))

    def _say(self, state: State, text: str) -> None:
        if self._options.on_state is not None:
            self._options.on_state(state, text)

    def _on_push(self, push: m.Push) -> None:
        if isinstance(push, m.Event):
            sub = self._subscriptions.get(push.channel)
            if sub is not None:
                sub.deliver(push)
        elif isinstance(push, m.Heartbeat):
            for sub in self._subscriptions.values():
                sub.reached(push.epoch, push.offset)
        elif isinstance(push, m.Resync):
            sub = self._subscriptions.get(push.channel)
            if sub is not None:
                sub.conflated(push)
        elif isinstance(push, m.Expiring) and callable(self._token) and self._group is not None:
            self._group.start_soon(self._renew)

    async def _renew(self) -> None:
        token = await self._fresh_token()
        if token is None:
            return
        try:
            await self._call(lambda i: m.Refresh(id=i, token=token), m.Refreshed, repeat=False)
        except OperationalError as exc:
            # The server will close with 4003 when the old token ends, and the reconnect asks for a token again.
            self._say("connected", f"could not renew the token: {exc.message}")

    async def _call(
        self,
        make: Callable[[int], m.Command],
        expect: type[R],
        *,
        repeat: bool,
        on_reply: Callable[[m.Reply], None] | None = None,
    ) -> R:
        try:
            with anyio.fail_after(self._options.timeout):
                async with self._window:
                    while True:
                        link = await self._live_link()
                        try:
                            return await link.call(make, expect, on_reply=on_reply)
                        except ConnectionLostError:
                            if not repeat:
                                raise
                            if self._link is link:  # the reader has not noticed yet
                                await self._changed.wait()
        except TimeoutError as exc:
            raise UnavailableError(f"no reply from {self.url} within {self._options.timeout:g} s") from exc

    async def _live_link(self) -> Link:
        while self._link is None:
            if self._error is not None:
                raise self._error
            await self._changed.wait()
        return self._link
