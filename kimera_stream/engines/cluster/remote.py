"""What the doors ask, on a node that serves connections: carried out by the engines, over the bus.

    publish -> work for the lane's partition -> committed at an offset -> every slice scored up to there -> the answer

Statements are validated here, so that a bad one never travels; reads of what is stored go to the database and not through here.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import anyio
import msgspec
import structlog

from kimera_stream.core.access import Principal
from kimera_stream.core.coverage import Coverage
from kimera_stream.core.interfaces import LogPage, PublishResult
from kimera_stream.core.validation import BodyLimits, check_key, check_reason, validate_body, validate_query
from kimera_stream.engines.cluster import wire
from kimera_stream.engines.cluster.errands import Errands
from kimera_stream.engines.cluster.scored import Scored
from kimera_stream.engines.cluster.watchlist import WatchList
from kimera_stream.engines.metrics import PipelineMetrics
from kimera_stream.engines.queries import MOST_RESULTS
from kimera_stream.infrastructure.bus.interface import Bus
from kimera_stream.infrastructure.settings import BusSettings
from kimera_stream.protocol.channels import check_id
from kimera_stream.protocol.errors import BadRequestError, OperationalError, UnavailableError
from kimera_stream.protocol.objects import (
    Contradiction,
    Decision,
    Geoid,
    GeoidBody,
    Scar,
    ScoredGeoid,
    ScoreResult,
    Watch,
    WatchKind,
)

log = structlog.get_logger(__name__)

QUESTION_WITHIN = 5.0
"""Seconds one engine may take over a question before another one is asked."""
SEARCH_AGAIN = 0.25
"""Seconds before a search is asked again of the slices that nobody answered for."""
READ = 500
"""Entries of a geoid's channel read at once."""

_contradiction = msgspec.json.Decoder(Contradiction).decode
_geoid = msgspec.json.Decoder(Geoid).decode


class RecentLog(Protocol):
    """What was committed lately, read with as little effort as can be."""

    async def read(self, channel: str, *, after: int, limit: int, until: int) -> LogPage:
        """As ``LogReader.read``."""


class RemoteKnowledge:
    """Implements ``core.interfaces.KnowledgeService``; may be called from any task of its event loop.

    Args:
        admit: Called before anything is accepted; raises OverloadedError above the memory limit, UnavailableError while nothing can be
            written.
        clock: Unix seconds.
    """

    def __init__(
        self,
        bus: Bus,
        recent: RecentLog,
        errands: Errands,
        scored: Scored,
        watches: WatchList,
        settings: BusSettings,
        limits: BodyLimits,
        metrics: PipelineMetrics,
        *,
        admit: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._bus = bus
        self._recent = recent
        self._errands = errands
        self._scored = scored
        self._watches = watches
        self._settings = settings
        self._limits = limits
        self._metrics = metrics
        self._admit = admit
        self._clock = clock
        self._turn = 0
        self._open: set[anyio.CancelScope] = set()
        """Of the commands that somebody waits for."""
        self._none_open = anyio.Event()

    # -- commands ----------------------------------------------------------------------------------------------------

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
        """See ``KnowledgeService.publish``.

        Raises:
            UnavailableError: no engine covers any slice, or none has answered in time. The statement may be in the log; repeated
                with its key it is not said twice.
        """
        validate_body(body, self._limits, merge=merge)
        if key is not None:
            check_key(key)
        request = wire.PublishRequest(
            at=self._now(),
            principal=principal.id,
            session_id=session_id,
            body=body,
            key=key,
            priority=priority,
            merge=merge,
            must_exist=must_exist,
        )
        began = time.monotonic()
        with self._command():
            answer = await self._send((principal.id, body.session_id or session_id or ""), request)
            assert isinstance(answer, wire.Committed)
            try:
                # Scoring has its own time: it is waited for as long as it gets on.
                await self._scored.reached(answer.offset, since=time.monotonic())
            except TimeoutError as error:
                raise self._late() from error
            found = await self._found(answer.geoid, answer.offset)
        self._metrics.answered(time.monotonic() - began)
        self._metrics.told(1, len(found))
        return PublishResult(answer.geoid, answer.offset, found, answer.duplicate)

    async def delete(self, geoid_id: str, *, principal: Principal, session_id: str | None = None) -> int:
        """Delete a geoid; returns the offset of its ``geoid.deleted``."""
        check_id(geoid_id, "geoid_id")
        request = wire.DeleteRequest(at=self._now(), principal=principal.id, session_id=session_id, geoid_id=geoid_id)
        with self._command():
            answer = await self._send((principal.id, session_id or ""), request)
        assert isinstance(answer, wire.Removed)
        return answer.offset

    async def resolve(
        self,
        contradiction_id: str,
        decision: Decision,
        reason: str | None,
        *,
        principal: Principal,
        session_id: str | None = None,
    ) -> tuple[Scar, int]:
        """Resolve a contradiction; returns its scar and the offset of ``scar.formed``."""
        if decision not in ("collapse", "surge", "buffer"):
            raise BadRequestError("decision: expected collapse, surge or buffer", field="decision")
        if reason is not None:
            check_reason(reason)
        request = wire.ResolveRequest(
            at=self._now(),
            principal=principal.id,
            session_id=session_id,
            contradiction_id=contradiction_id,
            decision=decision,
            reason=reason,
        )
        with self._command():
            answer = await self._send((principal.id, session_id or ""), request)
        assert isinstance(answer, wire.Settled)
        return answer.scar, answer.offset

    async def _send(self, lane: tuple[str, str], request: wire.Request) -> wire.Answer:
        # Nothing is awaited before the errand has its place: commands of a connection come here in their order.
        self._admit()
        if self._scored.uncovered_for > self._settings.lease:  # else engines are starting, or taking over
            raise UnavailableError("no engine is at work at present", retry_after=self._settings.lease)
        try:
            return await self._errands.send(lane, request)
        except TimeoutError as error:
            raise self._late() from error
        except OperationalError as error:
            self._metrics.refused(error.code, 1)
            raise

    @contextmanager
    def _command(self) -> Iterator[None]:
        """A command that a stop waits for, within its time.

        Raises:
            UnavailableError: it had no more.
        """
        with anyio.CancelScope() as scope:
            self._open.add(scope)
            try:
                yield
            finally:
                self._open.discard(scope)
                if not self._open:
                    self._none_open.set()
        if scope.cancelled_caught:
            raise UnavailableError(
                "the server stopped before this was done; repeat the request, with its idempotency key if it had one",
                retry_after=1.0,
            )

    def _now(self) -> int:
        return int(self._clock() * 1000)

    def _late(self) -> OperationalError:
        self._metrics.refused("unavailable", 1)
        return UnavailableError(
            f"the engines have not got on for {self._settings.answer_within:g} s; this may be done all the same: "
            "repeat it, with its idempotency key if it had one",
            retry_after=self._settings.retry_after,
        )

    async def _found(self, geoid: Geoid, offset: int) -> list[Contradiction]:
        """What the slices found out about a statement: told on its channel, after it and before it states something else."""
        found: dict[str, Contradiction] = {}
        after, until = offset, self._scored.head
        while True:
            page = await self._recent.read(f"geoid:{geoid.id}", after=after, limit=READ, until=until)
            for entry in page.entries:
                if entry.type == "contradiction.found":
                    contradiction = _contradiction(entry.data)
                    if contradiction.b == geoid.id:
                        found.setdefault(contradiction.id, contradiction)
                elif entry.type == "geoid.deleted" or (
                    entry.type == "geoid.updated" and not _states_the_same(_geoid(entry.data), geoid)
                ):
                    return list(found.values())
            after = page.scanned
            if not page.more:
                return list(found.values())

    # -- questions -----------------------------------------------------------------------------------------------------

    async def score(self, a: GeoidBody, b: GeoidBody, *, explain: bool = False) -> ScoreResult:
        """How ``a`` (older) and ``b`` stand to each other; nothing is stored."""
        validate_body(a, self._limits, where="a")
        validate_body(b, self._limits, where="b")
        answer = await self._ask_one(wire.SCORE, wire.encode(wire.ScoreQuestion(a=a, b=b, explain=explain)))
        return wire.decode_score_result(answer)

    async def search(
        self,
        *,
        text: str | None,
        vector: list[float] | None,
        relation: WatchKind,
        k: int,
        filter: Mapping[str, Any] | None = None,
    ) -> list[ScoredGeoid]:
        """Stored geoids that relate to, or contradict, a statement; the best first, of all slices.

        Raises:
            UnavailableError: some slices are not covered at present; a part is never given for the whole.
        """
        validate_query(text, vector, self._limits, where="query")
        if not 1 <= k <= MOST_RESULTS:
            raise BadRequestError(f"k: expected 1 to {MOST_RESULTS}", field="k")
        question = wire.encode(
            wire.SearchQuestion(
                text=text, vector=vector, relation=relation, k=k, filter=None if filter is None else dict(filter)
            )
        )
        hits: dict[str, ScoredGeoid] = {}
        answered: set[int] = set()
        with anyio.move_on_after(self._settings.answer_within):
            while True:
                await self._ask_owners(question, await self._coverage(), hits, answered)
                if len(answered) == self._settings.slices:
                    return sorted(hits.values(), key=lambda hit: -hit.score)[:k]
                await anyio.sleep(SEARCH_AGAIN)
        raise UnavailableError(
            f"search: {len(answered)} of {self._settings.slices} slices have answered (completeness "
            f"{len(answered) / self._settings.slices:.2f}); the engines of the others are away",
            retry_after=self._settings.lease,
        )

    async def _ask_owners(
        self, question: bytes, coverage: Coverage, hits: dict[str, ScoredGeoid], answered: set[int]
    ) -> None:
        """Ask those who own what nobody has answered for yet."""
        owners = {each.owner for each in coverage.slices if each.covered and each.number not in answered}
        refusal: OperationalError | None = None

        async def ask(owner: str) -> None:
            nonlocal refusal
            try:
                data = await self._bus.ask(owner, wire.SEARCH, question, within=QUESTION_WITHIN)
            except OperationalError as error:
                if not error.temporary:
                    refusal = error
                return
            answer = wire.decode_search_answer(data)
            answered.update(answer.slices)
            hits.update((hit.geoid.id, hit) for hit in answer.hits)

        async with anyio.create_task_group() as group:
            for owner in sorted(owner for owner in owners if owner is not None):
                group.start_soon(ask, owner, name="search:engine")
        if refusal is not None:
            raise refusal

    async def _coverage(self) -> Coverage:
        return self._scored.newest or await self._scored.look()

    async def _ask_one(self, what: str, question: bytes) -> bytes:
        """The answer of any engine; another one is asked where the first is away.

        Raises:
            UnavailableError: none answers.
        """
        engines = await self._engines()
        failure: OperationalError = UnavailableError(
            "no engine is at work at present", retry_after=self._settings.lease
        )
        for engine in engines:
            try:
                return await self._bus.ask(engine, what, question, within=QUESTION_WITHIN)
            except OperationalError as error:
                if not error.temporary:
                    raise
                failure = error
        raise failure

    async def _engines(self) -> Sequence[str]:
        """Ids of the engines, in turn another one first."""
        coverage = await self._coverage()
        engines = [node.id for node in coverage.nodes if node.is_engine]
        self._turn += 1
        first = self._turn % len(engines) if engines else 0
        return [*engines[first:], *engines[:first]]

    # -- watches -------------------------------------------------------------------------------------------------------

    async def watch(
        self,
        name: str,
        *,
        principal: Principal,
        text: str | None,
        vector: list[float] | None,
        kinds: list[WatchKind],
        min_score: float | None,
        filter: Mapping[str, Any] | None,
    ) -> Watch:
        """Keep a standing query: an engine encodes it, the database keeps it, every engine matches it from then on."""
        validate_query(text, vector, self._limits, where="watch")
        question = wire.WatchQuestion(
            name=name,
            principal=principal.id,
            text=text,
            vector=vector,
            kinds=kinds,
            min_score=min_score,
            filter=None if filter is None else dict(filter),
        )
        watch = wire.decode_watch_result(await self._ask_one(wire.WATCH, wire.encode(question)))
        self._watches.add(watch)
        return watch

    async def unwatch(self, name: str, *, principal: Principal) -> None:
        """End a standing query."""
        await self._ask_one(wire.UNWATCH, wire.encode(wire.UnwatchQuestion(name=name, principal=principal.id)))
        self._watches.remove(principal.id, name)

    async def watches(self, *, principal: Principal) -> list[Watch]:
        """The standing queries of a principal."""
        await self._watches.load()
        return self._watches.of(principal.id)

    def watch_owner(self, watch_id: str) -> str | None:
        """See ``core.interfaces.KnowledgeService``."""
        return self._watches.owner(watch_id)

    async def find_watch(self, watch_id: str) -> str | None:
        """See ``core.interfaces.KnowledgeService``."""
        if self._watches.owner(watch_id) is None:
            await self._watches.load()
        return self._watches.owner(watch_id)

    # -- life ------------------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Statements accepted and not yet answered."""
        return self._errands.numbers.waiting

    async def drain(self) -> None:
        """Accept nothing more and wait until everything accepted is answered. Cancelled, it has the rest refused."""
        self._errands.close()
        try:
            while self._open:
                self._none_open = anyio.Event()
                await self._none_open.wait()
        finally:
            for scope in self._open:
                scope.cancel()


def _states_the_same(one: Geoid, other: Geoid) -> bool:
    """Whether one version only changed what does not count as a statement. Vectors, which no event carries, go with texts."""
    return one.text is not None and (one.text, one.semantic_state, one.symbolic_state) == (
        other.text,
        other.semantic_state,
        other.symbolic_state,
    )
