"""Statements as a stream of lines in, one answer per line out, in order, as they commit.

    receive -> lines -> (256 under way) -> answers in order -> outflow (bounded) -> send

Every stage waits for the next, so a client that does not read its answers is, in the end, not read from either. It must read
while it writes once its answers fill the outflow (``KIMERA_API__MAX_BODY_BYTES``); one that does not for
``KIMERA_STREAM__OUTBOX_AGE`` seconds is given up.
"""

import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Final

import anyio
import msgspec
import structlog
from starlette.types import Message, Receive, Scope, Send

from kimera_stream.api.http.content import NDJSON, ClientGone
from kimera_stream.api.http.door import HttpDoor
from kimera_stream.api.http.outflow import STOP_PATIENCE, Outflow, PeerStalled
from kimera_stream.api.http.protocol import abort
from kimera_stream.api.http.publishing import LineProblem, OrderedPublisher, PublishedAnswer, parse_item
from kimera_stream.core.access import Principal
from kimera_stream.core.interfaces import KnowledgeService
from kimera_stream.protocol.errors import BadRequestError, TooLargeError, UnauthorizedError, UnavailableError

log = structlog.get_logger(__name__)

HEADERS: Final = [
    (b"content-type", NDJSON.encode()),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


@dataclass(frozen=True, slots=True)
class Line:
    """One line, without its end; ``data`` None where it was longer than allowed."""

    number: int
    data: bytes | None


class LineSplitter:
    """Cuts a stream of bytes into lines. Holds one unfinished line, ``max_bytes`` at most; blank lines are only counted."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._rest = bytearray()
        self._skipping = False
        self.number = 0
        """Lines ended so far."""

    def feed(self, data: bytes) -> Iterator[Line]:
        """The lines that ``data`` completes."""
        start = 0
        while (end := data.find(b"\n", start)) >= 0:
            self._take(data[start:end])
            start = end + 1
            yield from self._end_line()
        self._take(data[start:])

    def finish(self) -> Iterator[Line]:
        """The last line, where it was not ended."""
        if self._rest or self._skipping:
            yield from self._end_line()

    def _take(self, part: bytes) -> None:
        if self._skipping:
            return
        self._rest += part
        # One more for the carriage return of a line end whose line feed is still to come.
        if len(self._rest) > self._max_bytes + 1:
            self._rest.clear()
            self._skipping = True

    def _end_line(self) -> Iterator[Line]:
        self.number += 1
        line = bytes(self._rest).removesuffix(b"\r")
        self._rest.clear()
        if self._skipping or len(line) > self._max_bytes:
            self._skipping = False
            yield Line(self.number, None)
        elif line.strip():
            yield Line(self.number, line)


class NdjsonExchange:
    """The ASGI application of one such request."""

    def __init__(self, door: HttpDoor, knowledge: KnowledgeService, principal: Principal) -> None:
        self._door = door
        self._knowledge = knowledge
        self._principal = principal
        self._splitter = LineSplitter(door.settings.api.max_line_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gauge = self._door.metrics.http_streams.labels("ndjson")
        with self._door.streams.one("ndjson", self._door.settings.api.max_connections), gauge.track_inprogress():
            try:
                await self._exchange(receive, send)
            except* ClientGone:
                log.debug("the client left its stream of lines", line=self._splitter.number)
            except* PeerStalled:
                log.info("a stream of lines was given up: its client does not read", line=self._splitter.number)
                abort(scope)

    async def _exchange(self, receive: Receive, send: Send) -> None:
        settings = self._door.settings
        outflow = Outflow(send, max_bytes=settings.api.max_body_bytes, patience=settings.stream.outbox_age)
        stopping = self._door.streams.lines_stopping
        began = anyio.Event()
        waiting = anyio.CancelScope()

        async def next_message() -> Message | None:
            """What the client sends next; None where the server stops first."""
            nonlocal waiting
            with anyio.CancelScope() as waiting:
                if not stopping.is_set():
                    began.set()
                    return await receive()
            began.set()
            return None

        async def emit(answer: PublishedAnswer | LineProblem) -> None:
            outcome = (
                answer.code if isinstance(answer, LineProblem) else "duplicate" if answer.duplicate else "published"
            )
            self._door.metrics.http_lines.labels(outcome).inc()
            await outflow.put(msgspec.json.encode(answer) + b"\n")

        async def feed() -> None:
            async with OrderedPublisher(self._knowledge, self._principal, emit) as publisher:
                await self._take_lines(publisher, next_message, stopping)
                group.start_soon(watch_client, name="ndjson:client")
            outflow.close(within=STOP_PATIENCE if stopping.is_set() else None)

        async def watch_client() -> None:
            while (await receive())["type"] != "http.disconnect":
                await anyio.lowlevel.checkpoint()
            raise ClientGone

        async def stop() -> None:
            await stopping.wait()
            waiting.cancel()

        async with anyio.create_task_group() as group:
            group.start_soon(feed, name="ndjson:lines")
            group.start_soon(stop, name="ndjson:stop")
            # Not before the body is asked for: that is what sends `100 Continue` to a client that waits for it.
            await began.wait()
            await outflow.write_out({"type": "http.response.start", "status": 200, "headers": HEADERS})
            group.cancel_scope.cancel()

    async def _take_lines(
        self,
        publisher: OrderedPublisher,
        next_message: Callable[[], Awaitable[Message | None]],
        stopping: anyio.Event,
    ) -> None:
        """Submit every line of the body, or those that were submitted when the server began to stop."""
        more = True
        while more:
            message = await next_message()
            if message is None:
                await self._say_stopping(publisher, self._splitter.number + 1)
                return
            if message["type"] != "http.request":
                raise ClientGone  # what it left unfinished in its last line is not published
            more = message.get("more_body", False)
            lines = self._splitter.feed(message.get("body", b""))
            for line in lines if more else chain(lines, self._splitter.finish()):
                if stopping.is_set():
                    await self._say_stopping(publisher, line.number)
                    return
                if (over := self._token_is_over()) is not None:
                    words = f"line {line.number}: the token has {over}; send again from this line on with another"
                    await publisher.refuse(UnauthorizedError(words, field="token"), line=line.number)
                    return
                await self._submit(publisher, line)

    def _token_is_over(self) -> str | None:
        """Why what let the stream in does not count any more; None: it does."""
        expires = self._principal.expires
        if expires is not None and time.time() >= expires:
            return "expired"
        return None if self._door.authenticator.holds(self._principal) else "been revoked"

    async def _say_stopping(self, publisher: OrderedPublisher, number: int) -> None:
        words = f"line {number}: the server is stopping; send again from this line on"
        await publisher.refuse(UnavailableError(words, retry_after=1.0), line=number)

    async def _submit(self, publisher: OrderedPublisher, line: Line) -> None:
        if line.data is None:
            limit = self._door.settings.api.max_line_bytes
            error = TooLargeError(f"line {line.number}: expected at most {limit} bytes")
            await publisher.refuse(error, line=line.number)
            return
        try:
            item = parse_item(line.data, "json", "")
        except BadRequestError as bad:
            words = bad.message.removeprefix("body: ")
            await publisher.refuse(BadRequestError(f"line {line.number}: {words}", field=bad.field), line=line.number)
        else:
            await publisher.submit(item, line=line.number)
