"""Accepted publishes that the vault keeps as rows until they are done: what a graceful stop left undone, and dead letters that are
to be tried again.

    stop ──> kept ──taken up: an attempt counts──> intake ──> committed (the same transaction forgets the row)
              ▲                                       │
              └──── put off, a while longer each time ┤ a cause that may pass
     retried  │                                       ▼ the last attempt, or a cause that will not pass
              └──────────────────────────────── dead letter

Only those with an idempotency key: their senders were told to repeat them, and without a key a repetition would be a second
statement. What was being committed when the time ran out is not kept either: it may be in the log.
"""

import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace

import anyio
import msgspec
import structlog

from kimera_stream.core.access import Principal
from kimera_stream.core.geoid import unit
from kimera_stream.core.interfaces import PublishResult, VaultService
from kimera_stream.core.kept import CheckpointRequest, DeadLetter, RequestRef
from kimera_stream.core.validation import BodyLimits, validate_body
from kimera_stream.engines.intake import Ticket
from kimera_stream.engines.metrics import PipelineMetrics
from kimera_stream.engines.work import PublishWork, Work
from kimera_stream.infrastructure.settings import PerformanceSettings
from kimera_stream.infrastructure.tasks import Backoff
from kimera_stream.protocol.errors import InternalError, OperationalError, UnavailableError
from kimera_stream.protocol.objects import GeoidBody

log = structlog.get_logger(__name__)

HELD_MS = 60_000
"""For so long nobody else takes up what this process works on; told anew at each look."""
AT_ONCE = 256
"""Requests taken up in one transaction."""
AGAIN = Backoff(base=2.0, factor=2.0, maximum=120.0, floor=1.0)
"""Between the attempts at one request."""

_body = msgspec.json.Decoder(GeoidBody).decode
_encode = msgspec.json.Encoder().encode


class KeptWork:
    """Keeps, takes up, puts off and sets aside. Belongs to the pipeline.

    Args:
        limits: What a body has to keep to.
        settings: ``max_attempts``, ``dead_letters`` and ``retry_poll``.
        cost: Bytes of a body, for the intake.
        alone: No other server works on this vault: what is held at the start was held by a process that is gone.
        clock: Unix seconds.
    """

    def __init__(
        self,
        vault: VaultService,
        limits: BodyLimits,
        settings: PerformanceSettings,
        metrics: PipelineMetrics,
        *,
        cost: Callable[[GeoidBody], int],
        alone: bool,
        clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        self._vault = vault
        self._limits = limits
        self._most_attempts = settings.max_attempts
        self._most_letters = settings.dead_letters
        self._poll = settings.retry_poll
        self._metrics = metrics
        self._cost = cost
        self._alone = alone
        self._clock = clock
        self._rng = rng or random.Random()  # noqa: S311 - jitter, not a secret
        self._at_work = anyio.Lock()
        self._stopped = False
        self._released = False
        self._held: set[RequestRef] = set()
        self._ended: deque[PublishWork] = deque()
        self._news = anyio.Event()

    # -- taking up ---------------------------------------------------------------------------------------------------

    async def begin(self, accept: Callable[[PublishWork], bool]) -> None:
        """Take up everything that was left behind.

        Args:
            accept: Takes a piece of work into the intake; False: not now.

        Where the vault does not let it, ``run`` does it later.
        """
        self._held.clear()  # whatever an earlier run held ended with it
        self._ended = deque(work for work in self._ended if work.kept is None)
        self._released = not self._alone
        try:
            await self._take_up(accept)
        except UnavailableError as error:
            log.warning("kept work cannot be taken up yet", error=error.message)

    async def run(self, accept: Callable[[PublishWork], bool]) -> None:
        """Look after what is kept until a stop: take up what is due, tell the vault how it ended."""
        while True:
            with anyio.move_on_after(self._poll):
                await self._news.wait()
            self._news = anyio.Event()
            try:
                async with self._at_work:
                    if self._stopped:
                        return
                    await self._tell()
                    await self._take_up(accept)
                    await self._vault.put_off(list(self._held), until=self._now() + HELD_MS)
                    self._metrics.dead_letters(await self._vault.count_dead_letters())
            except UnavailableError as error:
                log.info("kept work waits for the vault", error=error.message)
                await anyio.sleep(self._poll)

    async def _take_up(self, accept: Callable[[PublishWork], bool]) -> None:
        if not self._released:
            await self._vault.release()
            self._released = True
        while True:
            now = self._now()
            taken = await self._vault.take_up(due=now, held_until=now + HELD_MS, limit=AT_ONCE)
            refused: list[RequestRef] = []
            letters: list[DeadLetter] = []
            for request in taken:
                work = self._work(request, letters)
                if work is None or request.ref is None:
                    continue
                if request.ref in self._held or not accept(work):
                    refused.append(request.ref)
                else:
                    self._held.add(request.ref)
            if letters:
                await self._set_aside(letters)
            if refused:  # no room, or the same key is under way: that was no attempt
                await self._vault.put_off(refused, until=now + int(self._poll * 1000), attempts=-1)
            if len(taken) < AT_ONCE or refused:
                return

    def _work(self, request: CheckpointRequest, letters: list[DeadLetter]) -> PublishWork | None:
        """What is to be done; None where it is a dead letter instead."""
        if request.attempts > self._most_attempts:
            message = f"none of {self._most_attempts} attempts came to an end: the server stopped or failed meanwhile"
            letters.append(self._letter(replace(request, attempts=self._most_attempts), InternalError(message)))
            return None
        try:
            body = _body(request.body)
            validate_body(body, self._limits, merge=request.merge)
        except OperationalError as error:
            letters.append(self._letter(request, error))
            return None
        except msgspec.MsgspecError as error:
            letters.append(self._letter(request, InternalError(f"what was kept is no statement: {error}")))
            return None
        session = body.session_id or request.session_id or ""
        ticket: Ticket[PublishResult] = Ticket(
            (request.principal, session),
            priority=request.priority,
            cost=self._cost(body),
            admitted_at=time.monotonic(),
        )
        principal = Principal(request.principal, frozenset({"publish"}))
        work = PublishWork(ticket, body, principal, request.session_id, request.key, request.merge, request.must_exist)
        work.kept = request
        if body.vector is not None:
            work.vector = unit(body.vector)
        return work

    # -- how it ends -------------------------------------------------------------------------------------------------

    def finished(self, work: PublishWork) -> None:
        """A piece of work was answered; the vault hears of it if it has to."""
        if work.kept is None and not (work.at_fault and work.key is not None):
            return
        self._ended.append(work)
        if len(self._ended) > self._most_letters:  # the vault is away, and defects go on
            self._let_go(self._ended.popleft())
            self._metrics.dropped_dead_letters(1)
        self._news.set()

    async def _tell(self) -> None:
        """Tell the vault how work ended; what cannot be told now is told the next time."""
        while self._ended:
            work = self._ended[0]
            await self._tell_of(work)
            self._let_go(work)
            if self._ended and self._ended[0] is work:
                self._ended.popleft()

    async def _tell_of(self, work: PublishWork) -> None:
        error = work.ticket.error
        kept = work.kept if work.kept is not None else replace(self._request(work), attempts=work.tries + 1)
        if error is None:
            result = work.ticket.result
            if kept.ref is not None and result is not None and result.duplicate:  # else its commit forgot the row
                await self._vault.settle([kept.ref])
        elif kept.ref is not None and error.temporary and not work.at_fault and kept.attempts < self._most_attempts:
            seconds = AGAIN.delay(kept.attempts, self._rng)
            log.info("kept work failed, it is tried again", attempts=kept.attempts, error=error.code)
            await self._vault.put_off([kept.ref], until=self._now() + int(seconds * 1000))
        else:
            await self._set_aside([self._letter(kept, error)])

    async def _set_aside(self, letters: list[DeadLetter]) -> None:
        dropped = await self._vault.set_aside(letters, most=self._most_letters)
        for each in letters:
            log.warning("accepted work set aside as a dead letter", error=each.code, attempts=each.request.attempts)
            self._metrics.dead_letter(each.code)
        if dropped:
            log.warning("the oldest dead letters were dropped", dropped=dropped, kept=self._most_letters)
            self._metrics.dropped_dead_letters(dropped)

    def _let_go(self, work: PublishWork) -> None:
        if work.kept is not None and work.kept.ref is not None:
            self._held.discard(work.kept.ref)

    def _letter(self, request: CheckpointRequest, error: OperationalError) -> DeadLetter:
        return DeadLetter(request, self._now(), error.code, error.message)

    # -- a stop ------------------------------------------------------------------------------------------------------

    async def keep(self, works: Iterable[Work]) -> None:
        """Keep what can be kept of unfinished work, in its order, and answer it so. What goes wrong is told, not raised.

        Args:
            works: None of it may be carried out after this.
        """
        keyed = [
            work
            for work in works
            # What came from another node stays with the bus, for whichever engine has its partition next.
            if isinstance(work, PublishWork) and work.key and work.request is None and not work.ticket.finished
        ]
        kept = [work for work in keyed if work.kept is None]
        again = [work.kept.ref for work in keyed if work.kept is not None and work.kept.ref is not None]
        self._stopped = True
        try:
            async with self._at_work:
                await self._tell()
                await self._vault.put_off(again, until=0, attempts=-1)
                if kept:
                    await self._vault.save_checkpoint([self._request(work) for work in kept])
        except UnavailableError as error:
            log.warning("accepted work could not be kept for the next start", requests=len(kept), error=error.message)
            return
        if keyed:
            log.info("accepted work kept for the next start", requests=len(keyed))
        for work in keyed:
            work.ticket.refuse(
                UnavailableError(
                    "the server stopped before this was done; it is kept, and done when the server starts again: "
                    "repeat the request with its key to hear what became of it",
                    retry_after=1.0,
                )
            )

    def _request(self, work: PublishWork) -> CheckpointRequest:
        return CheckpointRequest(
            principal=work.principal.id,
            body=_encode(work.body),
            session_id=work.session_id,
            key=work.key,
            priority=work.ticket.priority,
            merge=work.merge,
            must_exist=work.must_exist,
            accepted_at=int((self._clock() - (time.monotonic() - work.ticket.admitted_at)) * 1000),
        )

    def _now(self) -> int:
        return int(self._clock() * 1000)
