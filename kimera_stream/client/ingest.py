"""Sending many statements: a bounded window on the way, nothing lost and nothing said twice across broken connections.

A statement carries an id derived from what it says and where it comes from. What was on its way when a connection
(or this process) broke is looked up by id before it is sent again, which holds for ever, not only within the
server's idempotency window.
"""

import math
import ssl as ssl_module
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx
import msgspec

from kimera_stream.client.backoff import Backoff
from kimera_stream.client.errors import ConnectionLostError
from kimera_stream.client.http import Problem, problem_of
from kimera_stream.client.ndjson import LineStream, open_line_stream
from kimera_stream.client.wire import http_base
from kimera_stream.protocol.errors import BadRequestError, OperationalError, UnavailableError
from kimera_stream.protocol.objects import Contradiction

BATCH_BYTES = 64 * 1024
"""Bytes of lines joined in one write."""
REPORT_INTERVAL = 0.1
"""Seconds between reports of progress."""
LOOK_UPS = 16
"""Ids looked up at a time."""


@dataclass(frozen=True, slots=True)
class Statement:
    """One line to send.

    Attributes:
        line: Line of the source it comes from, from 1. Several statements may share one.
        id: Id of the geoid, the same whenever this line of this source is sent.
        body: The geoid body as JSON, without a newline, with that id.
    """

    line: int
    id: str
    body: bytes


@dataclass(slots=True)
class Progress:
    """What has become of the statements so far."""

    committed: int = 0
    known: int = 0
    """Committed by an earlier run or before a connection broke."""
    contradictions: int = 0
    rejected: int = 0
    errors: list[tuple[int, str]] = field(default_factory=list)
    """The first rejections: line and message."""
    reconnects: int = 0
    done_line: int = 0
    """Every statement of this line and of those before it has been answered."""
    state: str = ""
    """What is going on, if it is not just sending."""

    def reject(self, line: int, message: str, *, keep: int = 20) -> None:
        """Count a rejected statement; its message is kept for the first ones."""
        self.rejected += 1
        if len(self.errors) < keep:
            self.errors.append((line, message))


class _ResultLine(msgspec.Struct):
    geoid: dict[str, Any] | None = None
    contradictions: list[Contradiction] = []
    code: str | None = None
    message: str = ""
    detail: str = ""
    field: str | None = None
    retry_after: float | None = None
    temporary: bool = False


class Ingest:
    """Sends statements from a source until it ends, whatever happens to the connection.

    Args:
        url: Address of the server.
        token: Bearer token.
        window: Statements on the way (sent, not answered) at most.
        backoff: Delays between attempts to reach the server.
        patience: Seconds without any answer after which it gives up.
        on_progress: Called with the progress, about ten times a second.
        on_contradiction: Called with each contradiction found.
        ssl: TLS context.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        window: int = 256,
        backoff: Backoff | None = None,
        patience: float = 300.0,
        on_progress: Callable[[Progress], None] | None = None,
        on_contradiction: Callable[[Contradiction], None] | None = None,
        ssl: ssl_module.SSLContext | None = None,
    ) -> None:
        self.progress = Progress()
        self._url = http_base(url)
        self._token = token
        self._window = max(1, window)
        self._backoff = backoff or Backoff()
        self._patience = patience
        self._on_progress = on_progress
        self._on_contradiction = on_contradiction
        self._ssl = ssl
        self._again: deque[Statement] = deque()
        self._flying: deque[Statement] = deque()
        self._read_line = 0
        self._exhausted = False
        self._changed = anyio.Event()
        self._not_before = 0.0
        self._answered = False
        self._reported = -math.inf

    async def run(self, source: AsyncIterator[list[Statement]], *, look_first: bool = False) -> Progress:
        """Send everything that ``source`` yields.

        Args:
            source: Batches of statements in the order of their lines, as they become ready. Waiting for the next one
                may be cancelled and taken up again, as with a memory object stream (an async generator would end).
            look_first: An earlier run of the same source ended unexpectedly: look up what it may have sent.

        Raises:
            OperationalError: the server refused (no token, no right to publish), or could not be reached for
                ``patience`` seconds.
        """
        attempt = 0
        last_answer = anyio.current_time()
        while True:
            try:
                if look_first:
                    await self._look_first(source)
                    look_first = False
                await self._drop_known()
                self.progress.state = ""
                await self._send_all(source)
            except OperationalError as exc:
                if not exc.temporary:
                    raise
                if self._answered:
                    attempt, last_answer, self._answered = 0, anyio.current_time(), False
                if anyio.current_time() - last_answer > self._patience:
                    raise
                delay = max(self._backoff.delay(attempt), min(exc.retry_after or 0.0, self._backoff.cap))
                attempt += 1
                self.progress.reconnects += 1
                self._report(f"{exc.message}; trying again in {delay:.1f} s")
                await anyio.sleep(delay)
            else:
                self._reported = -math.inf
                self._report("")
                return self.progress

    # -- one connection --

    async def _send_all(self, source: AsyncIterator[list[Statement]]) -> None:
        failure: OperationalError | None = None
        async with open_line_stream(self._url, token=self._token, ssl=self._ssl) as stream:
            try:
                async with anyio.create_task_group() as group:
                    group.start_soon(self._receive, stream)
                    await self._transmit(stream, source)
            except BaseExceptionGroup as errors:
                # The receiver knows why (a refusal, say) when the sender only sees a broken pipe.
                operational, other = errors.split(OperationalError)
                if other is not None or operational is None:
                    raise
                failure = _most_telling(operational)
        if failure is not None:
            raise failure

    async def _transmit(self, stream: LineStream, source: AsyncIterator[list[Statement]]) -> None:
        batch: list[bytes] = []
        size = 0
        while True:
            wait = self._not_before - anyio.current_time()
            full = len(self._flying) >= self._window
            if batch and (full or wait > 0 or size >= BATCH_BYTES or not self._again):
                await stream.send(b"".join(batch))
                batch, size = [], 0
                continue  # answers may have come meanwhile
            if wait > 0:
                await anyio.sleep(wait)
                continue
            if full:
                await self._change()
                continue
            if not self._again:
                await self._fill(source)
            if self._again:
                statement = self._again.popleft()
                self._flying.append(statement)
                batch += (statement.body, b"\n")
                size += len(statement.body) + 1
            elif self._flying:
                await self._change()
            else:
                await stream.finish()
                return

    async def _fill(self, source: AsyncIterator[list[Statement]]) -> None:
        """Wait for the next batch of the source."""
        if self._exhausted:
            return
        try:
            batch = await anext(source)
        except StopAsyncIteration:
            self._exhausted = True
            return
        if batch:
            self._read_line = batch[-1].line
            self._again.extend(batch)

    async def _receive(self, stream: LineStream) -> None:
        async for line in stream.results():
            self._answer(self._flying.popleft() if self._flying else None, line)
            self._change_now()
        if self._flying or not self._exhausted:
            raise ConnectionLostError("the server ended the response early")

    def _answer(self, statement: Statement | None, line: bytes) -> None:
        if statement is None:
            raise ConnectionLostError("the server answered a line that was not sent")
        try:
            result = msgspec.json.decode(line, type=_ResultLine)
        except msgspec.DecodeError as exc:
            raise BadRequestError(
                f"the server's answer is not a result line: {exc}; is it a Kimera Stream server?"
            ) from exc
        self._answered = True
        if result.geoid is not None:
            self.progress.committed += 1
            self.progress.contradictions += len(result.contradictions)
            if self._on_contradiction is not None:
                for found in result.contradictions:
                    self._on_contradiction(found)
        else:
            error = Problem(
                code=result.code or "internal", detail=result.message or result.detail, retry_after=result.retry_after
            ).error()
            if error.temporary:
                self._again.append(statement)
                self._not_before = anyio.current_time() + (result.retry_after or 0.2)
            else:
                self.progress.reject(statement.line, error.message)
        self._report("")

    # -- what is known already --

    async def _look_first(self, source: AsyncIterator[list[Statement]]) -> None:
        """Look up windows of statements until one of them is wholly new: nothing beyond it was ever sent."""
        new: list[Statement] = []
        try:
            while True:
                while len(self._again) < self._window and not self._exhausted:
                    await self._fill(source)
                looked_up = [self._again.popleft() for _ in range(min(self._window, len(self._again)))]
                kept = len(new)
                new += looked_up  # should the look-up fail, nothing is forgotten
                new[kept:] = await self._unknown(looked_up)
                self.progress.known += len(looked_up) - (len(new) - kept)
                self._report("looking up what is there already")
                if len(new) - kept == len(looked_up):
                    return
        finally:
            self._again.extendleft(reversed(new))

    async def _drop_known(self) -> None:
        """Of what was on its way when the connection broke, forget what was committed."""
        if not self._flying:
            return
        flying = list(self._flying)
        new = await self._unknown(flying)
        self.progress.known += len(flying) - len(new)
        self._flying.clear()
        self._again.extendleft(reversed(new))

    async def _unknown(self, statements: list[Statement]) -> list[Statement]:
        known: set[str] = set()
        limiter = anyio.CapacityLimiter(LOOK_UPS)
        failures: list[OperationalError] = []
        headers = {} if self._token is None else {"authorization": f"Bearer {self._token}"}
        async with httpx.AsyncClient(
            base_url=self._url,
            headers=headers,
            timeout=30,
            trust_env=False,
            # Reading the certificates takes longer than all the look-ups: not where there is nothing to verify.
            verify=self._ssl if self._ssl is not None else self._url.startswith("https:"),
        ) as http:

            async def look_up(geoid_id: str) -> None:
                async with limiter:
                    if failures:
                        return
                    try:
                        response = await http.get(f"/v1/geoids/{geoid_id}")
                    except httpx.HTTPError as exc:
                        failures.append(UnavailableError(f"cannot reach {self._url}: {str(exc) or type(exc).__name__}"))
                        return
                    if response.is_success:
                        known.add(geoid_id)
                    elif response.status_code != 404:
                        failures.append(problem_of(response.status_code, response.content))

            async with anyio.create_task_group() as group:
                for statement in statements:
                    group.start_soon(look_up, statement.id)
        if failures:
            raise failures[0]
        return [statement for statement in statements if statement.id not in known]

    # -- bookkeeping --

    def _report(self, state: str) -> None:
        progress = self.progress
        now = anyio.current_time()
        if not state and not progress.state and now - self._reported < REPORT_INTERVAL:
            return
        self._reported = now
        progress.state = state
        waiting = [statement.line for queue in (self._flying, self._again) for statement in queue]
        progress.done_line = min(waiting) - 1 if waiting else self._read_line
        if self._on_progress is not None:
            self._on_progress(progress)

    async def _change(self) -> None:
        await self._changed.wait()

    def _change_now(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


def _most_telling(group: BaseExceptionGroup[OperationalError]) -> OperationalError:
    found: list[OperationalError] = []
    rest: list[BaseException] = [group]
    while rest:
        item = rest.pop()
        if isinstance(item, BaseExceptionGroup):
            rest.extend(item.exceptions)
        elif isinstance(item, OperationalError):
            found.append(item)
    return min(found, key=lambda error: (isinstance(error, ConnectionLostError), error.temporary))
