"""Micro-batching in front of a provider: callers wait a moment for each other, equal texts are encoded once, results are kept.

All state is touched on the event loop only. ``run`` is the one place that calls the provider; it belongs to a supervisor,
which restarts it if it crashes: jobs that were queued stay queued, those that were being encoded are refused.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import anyio
import numpy as np
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kimera_stream.core.embedding.provider import CountsTokens, Provider, TellsHealth, encode_counted
from kimera_stream.core.interfaces import Matrix, Vector
from kimera_stream.infrastructure.failover import WayNumbers
from kimera_stream.infrastructure.settings import EmbeddingSettings
from kimera_stream.protocol.errors import InternalError, OperationalError, UnavailableError

log = structlog.get_logger(__name__)

ENTRY_OVERHEAD = 250
"""Bytes that a cache entry takes beside its text and its row (measured: dictionary slot, array header, string header)."""
PASSES_QUEUED = 64
"""Texts waiting at most, in passes; callers beyond wait for room."""
FAULTS_IN_A_ROW = 20
"""Different texts that fail one after the other, with none encoded between them, before the defect is not theirs."""
PASSES_TOGETHER = 2
"""Passes handed to the provider at once: sorted by length across them, it wastes less."""


class TextCache:
    """Encoded texts, least recently used dropped first, bounded in bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._rows: OrderedDict[str, tuple[Vector, int]] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, text: str) -> tuple[Vector, int] | None:
        """Row and number of tokens."""
        kept = self._rows.get(text)
        if kept is not None:
            self._rows.move_to_end(text)
        return kept

    def put(self, text: str, row: Vector, tokens: int = 0) -> None:
        """Keep ``row`` (its own memory, not a view into a batch)."""
        if text in self._rows:
            return
        self._rows[text] = row, tokens
        self.bytes += self._cost(text, row)
        while self.bytes > self._max_bytes:
            old_text, (old_row, _) = self._rows.popitem(last=False)
            self.bytes -= self._cost(old_text, old_row)

    def clear(self) -> None:
        """Keep nothing."""
        self._rows.clear()
        self.bytes = 0

    @staticmethod
    def _cost(text: str, row: Vector) -> int:
        return len(text) * (1 if text.isascii() else 4) + row.nbytes + ENTRY_OVERHEAD


@dataclass(slots=True, eq=False)
class _Job:
    """One distinct text on its way; several callers may wait for it."""

    text: str
    waiters: int = 0
    row: Vector | None = None
    tokens: int = 0
    error: OperationalError | None = None
    done: anyio.Event = field(default_factory=anyio.Event)


class BatchingEmbedder:
    """``EmbeddingService`` over a provider.

    Args:
        provider: Who encodes. Started by ``start``, closed by ``close``.
        settings: ``embedding`` group: batch size, wait, cache size.
        registry: Where its metrics go.
    """

    def __init__(self, provider: Provider, settings: EmbeddingSettings, registry: CollectorRegistry) -> None:
        self._provider = provider
        self._batch_size = settings.batch_size
        self._wait = settings.batch_wait
        self._cache = TextCache(settings.cache_bytes)
        self._queue: deque[_Job] = deque()
        self._pending: dict[str, _Job] = {}
        self._faults_in_a_row = 0
        self._last_at_fault: str | None = None
        self._arrived = anyio.Event()
        self._full = anyio.Event()
        self._room = anyio.Event()
        self._texts = Counter(
            "kimera_embedding_texts_total", "Texts asked for, by where they came from", ["source"], registry=registry
        )
        self._failures = Counter("kimera_embedding_failures_total", "Passes that failed", registry=registry)
        self._seconds = Histogram(
            "kimera_embedding_pass_seconds", "Duration of one call of the provider", registry=registry
        )
        Gauge("kimera_embedding_queue", "Texts waiting", registry=registry).set_function(lambda: len(self._queue))
        Gauge("kimera_embedding_cache_bytes", "Bytes of the cache", registry=registry).set_function(
            lambda: self._cache.bytes
        )

    @property
    def model(self) -> str:
        return self._provider.model

    @property
    def dimension(self) -> int:
        return self._provider.dimension

    @property
    def providers(self) -> dict[str, WayNumbers]:
        """Health and use of what may fail and be left alone: providers that stand in for each other, or a service; else empty."""
        return self._provider.numbers if isinstance(self._provider, TellsHealth) else {}

    @property
    def counts_exactly(self) -> bool:
        """Whether tokens are the encoder's own; else they are approximated by length."""
        return isinstance(self._provider, CountsTokens) and self._provider.counts_exactly

    @property
    def cache(self) -> TextCache:
        """Encoded texts."""
        return self._cache

    @property
    def queued(self) -> int:
        """Texts waiting for a pass."""
        return len(self._queue)

    async def start(self) -> None:
        """Load the provider."""
        await self._provider.start()

    async def close(self) -> None:
        """Close the provider."""
        await self._provider.close()

    async def embed(self, texts: Sequence[str]) -> Matrix:
        """One unit row per text, in order; shape (n, dim). Cancelling is safe: texts nobody waits for are not encoded.

        Raises:
            UnavailableError: the provider cannot encode at present.
            BadRequestError: there is no encoder, and never will be.
        """
        return (await self.embed_counted(texts))[0]

    async def embed_counted(self, texts: Sequence[str]) -> tuple[Matrix, list[int]]:
        """As ``embed``, and the tokens of each text, whether it was encoded now or before; see ``counts_exactly``."""
        rows = np.empty((len(texts), self.dimension), dtype=np.float32)
        counts: list[int] = []
        jobs: dict[str, _Job] = {}
        found: dict[str, tuple[Vector, int]] = {}
        try:
            for text in texts:
                if text in jobs or text in found:
                    continue
                kept = self._cache.get(text)
                if kept is not None:
                    found[text] = kept
                    continue
                while text not in self._pending and len(self._queue) >= self._batch_size * PASSES_QUEUED:
                    await self._room.wait()
                jobs[text] = self._join(text)
            self._texts.labels("cache").inc(len(found))
            for job in jobs.values():
                await job.done.wait()
                if job.error is not None:
                    raise type(job.error)(job.error.message, field=job.error.field, retry_after=job.error.retry_after)
        finally:
            for job in jobs.values():
                job.waiters -= 1
        for position, text in enumerate(texts):
            row, count = found[text] if text in found else (jobs[text].row, jobs[text].tokens)
            rows[position] = row
            counts.append(count)
        return rows, counts

    def _join(self, text: str) -> _Job:
        job = self._pending.get(text)
        if job is None:
            job = self._pending[text] = _Job(text)
            self._queue.append(job)
            self._texts.labels("new").inc()
            self._arrived.set()
            if len(self._queue) >= self._batch_size:
                self._full.set()
        else:
            self._texts.labels("shared").inc()
        job.waiters += 1
        return job

    async def run(self) -> None:
        """Encode what is queued until cancelled. One at a time."""
        try:
            while True:
                await self._gather()
                jobs = self._take()
                if jobs:
                    await self._encode(jobs)
        except anyio.get_cancelled_exc_class():
            self._refuse(list(self._queue), UnavailableError("embedding: the server is stopping", retry_after=5.0))
            self._queue.clear()
            raise

    async def _gather(self) -> None:
        """Wait for a first text, then a moment for more."""
        if not self._queue:
            self._arrived = anyio.Event()
            await self._arrived.wait()
        if len(self._queue) < self._batch_size and self._wait > 0:
            self._full = anyio.Event()
            with anyio.move_on_after(self._wait):
                await self._full.wait()

    def _take(self) -> list[_Job]:
        jobs: list[_Job] = []
        while self._queue and len(jobs) < self._batch_size * PASSES_TOGETHER:
            job = self._queue.popleft()
            if job.waiters > 0:
                jobs.append(job)
            else:
                self._pending.pop(job.text, None)
        room, self._room = self._room, anyio.Event()
        room.set()
        return jobs

    async def _encode(self, jobs: list[_Job]) -> None:
        """Encode; a text on which the provider fails by a defect is singled out by halving, and refused alone.

        Raises:
            Exception: the defect, where so many different texts meet it in a row that it is not theirs.
        """
        todo = deque([jobs])
        try:
            while todo:
                part = todo[0]
                try:
                    with self._seconds.time():
                        rows, counts = await encode_counted(self._provider, [job.text for job in part])
                except OperationalError as error:
                    self._failures.inc()
                    self._refuse(part, error)
                except Exception as error:  # noqa: BLE001 - logged by _blame, or raised by it
                    self._failures.inc()
                    if len(part) > 1:
                        todo.popleft()
                        todo.extendleft((part[len(part) // 2 :], part[: len(part) // 2]))
                        continue
                    self._blame(part[0], error)
                else:
                    self._faults_in_a_row = 0
                    self._answer(part, rows, counts)
                todo.popleft()
        except BaseException:
            # A defect or a cancellation: those who wait must not wait for ever; the supervisor sees the rest.
            failed = UnavailableError("embedding: the encoder failed; try again", retry_after=1.0)
            self._refuse([job for part in todo for job in part], failed)
            raise

    def _answer(self, jobs: Sequence[_Job], rows: Matrix, counts: Sequence[int]) -> None:
        for job, row, count in zip(jobs, rows, counts, strict=True):
            job.row, job.tokens = row.copy(), count
            self._cache.put(job.text, job.row, count)
            self._pending.pop(job.text, None)
            job.done.set()

    def _blame(self, job: _Job, error: Exception) -> None:
        """``error`` was raised over this one text."""
        if job.text != self._last_at_fault:
            self._faults_in_a_row += 1
            self._last_at_fault = job.text
        if self._faults_in_a_row > FAULTS_IN_A_ROW:
            self._faults_in_a_row = 0
            raise error
        log.error("a text cannot be encoded", characters=len(job.text), error=type(error).__name__, exc_info=error)
        self._refuse([job], InternalError("embedding: the encoder met a defect in this text"))

    def _refuse(self, jobs: Sequence[_Job], error: OperationalError) -> None:
        for job in jobs:
            job.error = error
            self._pending.pop(job.text, None)
            job.done.set()
