"""What the pipeline counts: for Prometheus, and as plain numbers for the ``stats`` channel."""

from collections import deque
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kimera_stream.core.interfaces import WriteBatch

LATENCIES = 2_048
"""Newest latencies kept for the quantiles of the ``stats`` channel."""


@dataclass(frozen=True, slots=True)
class PipelineNumbers:
    """Totals since the start; quantiles in seconds over the newest publishes, None before the first."""

    published: int
    contradictions: int
    refused: int
    text_bytes: int
    tokens: int
    p50: float | None
    p99: float | None
    retries: int = 0
    """Tries after a failure whose cause may pass."""
    faults: int = 0
    """Statements over which the server met a defect."""
    dead_letters: int = 0
    """Kept now."""
    dead_letters_dropped: int = 0
    """As there were too many."""


class PipelineMetrics:
    """Counters of the pipeline on a registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._entries = Counter(
            "kimera_log_entries_total", "Committed log entries, by type", ["type"], registry=registry
        )
        self._refused = Counter(
            "kimera_publishes_refused_total", "Work refused by the pipeline, by error code", ["code"], registry=registry
        )
        self._commit = Histogram(
            "kimera_commit_seconds",
            "Duration of a group commit",
            registry=registry,
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5),
        )
        self._latency = Histogram(
            "kimera_publish_seconds",
            "From admission to the answer",
            registry=registry,
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
        )
        self._stage = Histogram(
            "kimera_pipeline_stage_seconds",
            "Duration of a stage for one group",
            ["stage"],
            registry=registry,
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5),
        )
        self._retries_total = Counter(
            "kimera_pipeline_retries_total",
            "Tries after a failure whose cause may pass, by stage",
            ["stage"],
            registry=registry,
        )
        self._faults_total = Counter(
            "kimera_pipeline_faults_total",
            "Statements over which the server met a defect, by stage",
            ["stage"],
            registry=registry,
        )
        self._letters_total = Counter(
            "kimera_dead_letters_total", "Accepted work set aside, by error code", ["code"], registry=registry
        )
        self._letters_dropped = Counter(
            "kimera_dead_letters_dropped_total", "Dead letters dropped as there were too many", registry=registry
        )
        self._letters_kept = Gauge("kimera_dead_letters_kept", "Dead letters kept", registry=registry)
        self._retries = self._faults = self._letters = self._dropped = 0
        self._recent: deque[float] = deque(maxlen=LATENCIES)
        self._published = 0
        self._contradictions = 0
        self._refusals = 0
        self._text_bytes = 0
        self._tokens = 0

    def committed(self, batch: WriteBatch, seconds: float) -> None:
        self._commit.observe(seconds)
        self._published += len(batch.geoids)
        for stored in batch.geoids:
            self._text_bytes += len((stored.geoid.text or "").encode())
            self._tokens += stored.tokens
        for entry in batch.entries:
            self._entries.labels(entry.type).inc()
            if entry.type == "contradiction.found":
                self._contradictions += 1

    def told(self, published: int, contradictions: int) -> None:
        """Of a node that answers what others have committed."""
        self._published += published
        self._contradictions += contradictions

    def refused(self, code: str, count: int) -> None:
        self._refused.labels(code).inc(count)
        self._refusals += count

    def answered(self, seconds: float) -> None:
        self._latency.observe(seconds)
        self._recent.append(seconds)

    def stage(self, name: str, seconds: float) -> None:
        self._stage.labels(name).observe(seconds)

    def retried(self, stage: str) -> None:
        self._retries_total.labels(stage).inc()
        self._retries += 1

    def fault(self, stage: str) -> None:
        self._faults_total.labels(stage).inc()
        self._faults += 1

    def dead_letter(self, code: str) -> None:
        """One more was set aside."""
        self._letters_total.labels(code).inc()

    def dead_letters(self, kept: int) -> None:
        """How many are kept."""
        self._letters_kept.set(kept)
        self._letters = kept

    def dropped_dead_letters(self, count: int) -> None:
        self._letters_dropped.inc(count)
        self._dropped += count

    def numbers(self) -> PipelineNumbers:
        ordered = sorted(self._recent)

        def quantile(q: float) -> float | None:
            return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else None

        return PipelineNumbers(
            self._published,
            self._contradictions,
            self._refusals,
            self._text_bytes,
            self._tokens,
            quantile(0.5),
            quantile(0.99),
            self._retries,
            self._faults,
            self._letters,
            self._dropped,
        )
