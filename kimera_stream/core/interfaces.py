"""What the layers above may ask of the services: Protocols only, implemented below or beside, wired in one place."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from kimera_stream.core.access import Principal
from kimera_stream.core.columns import GeoidColumns
from kimera_stream.core.kept import CheckpointRequest, DeadLetter, RequestRef, UsageRecord
from kimera_stream.protocol.errors import LimitExceededError, UnavailableError
from kimera_stream.protocol.log import LogEntry
from kimera_stream.protocol.objects import (
    Contradiction,
    ContradictionState,
    Decision,
    FieldState,
    Geoid,
    GeoidBody,
    Scar,
    ScoredGeoid,
    ScoreResult,
    Watch,
    WatchKind,
)

T = TypeVar("T")
Vector = npt.NDArray[np.float32]
"""Shape (dim,), unit length, C-contiguous."""
Matrix = npt.NDArray[np.float32]
"""Shape (n, dim), unit rows, C-contiguous."""
MOST_WATCHES = 10_000
MOST_WATCHES_PER_PRINCIPAL = 1_000

# -- embedding -----------------------------------------------------------------------------------------------------


@runtime_checkable
class EmbeddingService(Protocol):
    """Text to unit vectors."""

    @property
    def model(self) -> str:
        """Name and version of the encoder; vectors of different models are never compared."""

    @property
    def dimension(self) -> int: ...

    async def embed(self, texts: Sequence[str]) -> Matrix:
        """One unit row per text, in order. Batches across concurrent callers.

        Raises:
            UnavailableError: no provider can encode at present.
        """

    async def embed_counted(self, texts: Sequence[str]) -> tuple[Matrix, list[int]]:
        """As ``embed``, and the number of tokens of each text."""


# -- vault: the log and the entities ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StoredGeoid:
    """A geoid with what the index needs of it.

    Attributes:
        vector: None where the geoid has neither text nor vector.
        tokens: What the encoder read for this publish; 0 for one that is read back, or came with its own vector.
        stated: Offset of the entry that last changed what it states, and not only its labels; 0: that of its version.
        own_vector: Whether this publish brought the vector along.
    """

    geoid: Geoid
    vector: Vector | None
    principal: str
    tokens: int = 0
    stated: int = 0
    own_vector: bool = False


@dataclass(frozen=True, slots=True)
class IdempotencyRecord:
    """The first result of a keyed publish, to be given again within the window. ``result``: JSON of ``Published``."""

    principal: str
    key: str
    result: bytes
    created_at: int


@dataclass(slots=True)
class WriteBatch:
    """Everything one transaction commits. Entries are consecutive from ``vault.head + 1``; objects carry their offsets.

    ``contradictions`` are upserts by id (found, updated, dissolved or resolved states alike).
    """

    entries: list[LogEntry] = field(default_factory=list)
    geoids: list[StoredGeoid] = field(default_factory=list)
    deleted: list[tuple[str, int]] = field(default_factory=list)
    """(geoid id, offset of its ``geoid.deleted`` entry)."""
    contradictions: list[Contradiction] = field(default_factory=list)
    scars: list[Scar] = field(default_factory=list)
    idempotency: list[IdempotencyRecord] = field(default_factory=list)
    audit: list[tuple[int, str, str, str]] = field(default_factory=list)
    """(unix ms, principal, action, target)."""
    settled: list[RequestRef] = field(default_factory=list)
    """Kept requests that this batch does, and that are kept no longer."""


class OutcomeUnknownError(UnavailableError):
    """The database went away during a commit and did not come back: what was committed may be there or not."""


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A page of a list in offset order; ``next`` is the offset to ask for ``after``, None at the end."""

    items: list[T]
    next: int | None


@dataclass(frozen=True, slots=True)
class LogPage:
    """Consecutive entries of one channel.

    Attributes:
        entries: In offset order (descending if asked in reverse).
        scanned: Every entry of the channel up to and including this offset has been returned: the cursor to go on from.
        more: Whether the log held further entries of the channel when it was read.
    """

    entries: list[LogEntry]
    scanned: int
    more: bool


@dataclass(frozen=True, slots=True)
class FramePage:
    """Consecutive entries of one channel as WebSocket text frames, joined.

    Attributes:
        frames: One per entry, in offset order.
        count: How many.
        scanned: As for ``LogPage``.
        more: False: nothing was left up to the bound that was asked for.
    """

    frames: bytes
    count: int
    scanned: int
    more: bool


@runtime_checkable
class FrameReader(Protocol):
    """A log that can give events as they are sent, which spares an object for each of them."""

    async def read_frames(self, channel: str, *, head: bytes, after: int, limit: int, until: int) -> FramePage:
        """Events with ``after < offset <= until`` of one channel; ``head`` is what the JSON of each starts with, up to its
        offset (``EventEncoder.head``).
        """


@runtime_checkable
class LogReader(Protocol):
    """The durable log, as readers see it."""

    @property
    def epoch(self) -> str: ...

    @property
    def head(self) -> int:
        """Offset of the newest committed entry; 0 in an empty log."""

    @property
    def trimmed(self) -> int:
        """Every entry at or below this offset has been dropped by retention; 0 when nothing was."""

    async def read(
        self, channel: str | None, *, after: int, limit: int, until: int | None = None, reverse: bool = False
    ) -> LogPage:
        """Entries with ``after < offset <= until`` (until: head at the time of the call), of one channel or of all.

        In reverse: the newest first, ``after`` still being the lower bound (exclusive) and ``until`` the upper (inclusive).
        """


@runtime_checkable
class VaultService(LogReader, Protocol):
    """The durable store: log, geoids, contradictions, scars, watches, cursors, idempotency. One writer, pooled readers."""

    async def commit(self, batch: WriteBatch) -> None:
        """Commit atomically and durably (fsynced when it returns), then advance ``head``.

        Raises:
            ConflictError: the first entry is not ``head + 1`` (another writer was faster): plan again.
            UnavailableError: disk full, locked, read-only or unreachable; nothing was written.
            OutcomeUnknownError: it may or may not have been written.
        """

    async def geoid(self, geoid_id: str) -> StoredGeoid | None: ...

    async def geoids(self, ids: Sequence[str]) -> dict[str, StoredGeoid]:
        """Those of ``ids`` that exist."""

    async def list_geoids(
        self, *, after: int, limit: int, session_id: str | None = None, agent_id: str | None = None
    ) -> Page[Geoid]: ...

    def scan_columns(self, *, batch: int, dimension: int) -> AsyncIterator[GeoidColumns]:
        """What every live geoid is compared by, to rebuild the index from; vectors are of ``dimension`` numbers."""

    async def count_geoids(self) -> int: ...

    async def contradiction(self, contradiction_id: str) -> Contradiction | None: ...

    async def list_contradictions(
        self,
        *,
        after: int,
        limit: int,
        state: ContradictionState | None = None,
        min_score: float | None = None,
        geoid_id: str | None = None,
    ) -> Page[Contradiction]: ...

    async def contradictions_of(self, geoid_ids: Sequence[str], *, state: ContradictionState) -> list[Contradiction]:
        """Contradictions in ``state`` in which any of the geoids takes part."""

    async def count_contradictions(self, state: ContradictionState) -> int: ...

    async def list_scars(self, *, after: int, limit: int) -> Page[Scar]: ...

    async def scar_weights(self) -> tuple[float, float]:
        """Summed weight of vault a and of vault b."""

    async def idempotent(self, principal: str, key: str, *, not_before: int) -> IdempotencyRecord | None:
        """The record of a keyed publish made at or after ``not_before`` (unix ms)."""

    async def save_watch(
        self,
        watch: Watch,
        vector: Vector | None,
        *,
        most: int = MOST_WATCHES,
        most_per_principal: int = MOST_WATCHES_PER_PRINCIPAL,
    ) -> Watch:
        """Insert, or replace the principal's watch of that name, whose id it takes; returns it as it is kept.

        Raises:
            LimitExceededError: there are ``most`` others, or the principal has ``most_per_principal``; counted over all nodes.
        """

    async def delete_watch(self, principal: str, name: str) -> bool: ...

    async def watches(self) -> list[tuple[Watch, Vector | None]]: ...

    async def save_cursor(self, principal: str, name: str, channel: str, offset: int) -> None:
        """Insert or move a durable cursor.

        Raises:
            LimitExceededError: the principal has as many others as it may keep.
        """

    async def cursor(self, principal: str, name: str, channel: str) -> int | None: ...

    async def save_checkpoint(self, items: Sequence[CheckpointRequest], *, node: str = "") -> None:
        """Keep accepted and unprocessed requests over a restart, in their order."""

    async def take_up(self, *, due: int, held_until: int, limit: int) -> list[CheckpointRequest]:
        """Kept requests whose time has come at ``due`` (unix ms), in order, at most ``limit``.

        Each counts as tried once more, stays in the vault until it is settled, and is taken up by nobody else before
        ``held_until`` (unix ms).
        """

    async def put_off(self, refs: Sequence[RequestRef], *, until: int, attempts: int = 0) -> None:
        """Kept requests are taken up no sooner than ``until`` (unix ms); ``attempts`` is added to those counted."""

    async def release(self) -> None:
        """All kept requests may be taken up at once: whoever held them is gone."""

    async def settle(self, refs: Sequence[RequestRef]) -> None:
        """Forget kept requests that are done."""

    async def set_aside(self, letters: Sequence[DeadLetter], *, most: int) -> int:
        """Keep them as dead letters, and no longer as requests; beyond ``most`` in all the oldest are dropped. Returns how
        many were."""

    async def count_dead_letters(self) -> int: ...

    async def usage(self, *, since_day: int = 0, principal: str | None = None, limit: int = ...) -> list[UsageRecord]:
        """What was published per principal and day (days since 1970, UTC), at most ``limit`` rows of it."""

    async def trim(self, upto: int) -> int:
        """Drop log entries at or below ``upto``; returns how many. Entities stay."""

    async def ping(self) -> None:
        """Raises UnavailableError if a trivial read does not come back."""


# -- the index -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Candidate:
    """A stored geoid that the scan thinks worth a closer look.

    ``relatedness`` cosine in [-1, 1]; ``symbolic`` opposed keys found by the signature (exact); ``fused`` what ranked it;
    ``named``: both texts name the same numbered thing (of ``scan`` only).
    """

    geoid_id: str
    relatedness: float
    symbolic: int
    fused: float
    named: bool = False


class IndexRoom(Protocol):
    """What is left in the index for a group of geoids, before any of them is committed."""

    def refusal(self, stored: StoredGeoid) -> LimitExceededError | None:
        """Why there is no room for it; None keeps it for this one. Asked once for each of the group."""


@runtime_checkable
class IndexService(Protocol):
    """All live geoids in memory: vectors and signatures in the form that the kernel scans."""

    @property
    def size(self) -> int: ...

    @property
    def bytes(self) -> int: ...

    def __contains__(self, geoid_id: str) -> bool: ...

    def put(self, stored: StoredGeoid) -> None:
        """Insert or replace.

        Raises:
            LimitExceededError: the index is full and its policy is to refuse.
        """

    def remove(self, geoid_id: str) -> None: ...

    def room(self) -> IndexRoom:
        """What is left for geoids that are put later: a geoid that it does not refuse can be put."""

    async def scan(
        self,
        queries: Sequence[StoredGeoid],
        *,
        k: int,
        min_relatedness: float,
        exclude_self: bool = True,
        everywhere: bool = False,
    ) -> list[list[Candidate]]:
        """Top-k candidates for a contradiction per query: by fused score, symbolic oppositions always included.

        ``everywhere``: also among statements that by setting are not compared with each other.
        """

    async def related(self, vectors: Matrix, *, k: int) -> list[list[Candidate]]:
        """Top-k by relatedness alone, per row."""


class Among(Protocol):
    """The part of the stored geoids that some statements are compared with."""

    async def scan(
        self, queries: Sequence[StoredGeoid], *, k: int, min_relatedness: float, exclude_self: bool = True
    ) -> list[list[Candidate]]:
        """As ``IndexService.scan``."""

    def takes(self, older: StoredGeoid, newer: StoredGeoid) -> bool:
        """Whether the pair is one of those that are to be judged here."""


# -- meaning -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the engine says of a pair. ``reported``: it is as sure as whoever decided has to be for a contradiction to be told."""

    score: float
    result: ScoreResult
    gradient_type: Literal["semantic", "symbolic", "composite"]
    model: str
    provisional: bool = False
    reported: bool = False


@dataclass(frozen=True, slots=True)
class Detection:
    """What the engine finds for a batch of new statements.

    Attributes:
        hits: For each, the statements that it contradicts (threshold applied), the surest first.
        unread: For each, whether its texts were decided without the verifier, which is to read them later.
    """

    hits: list[list[tuple[StoredGeoid, Judgement]]]
    unread: list[bool]


@runtime_checkable
class ContradictionEngine(Protocol):
    """The cascade: scan -> prefilter -> verify -> scope."""

    async def judge_pairs(self, pairs: Sequence[tuple[StoredGeoid, StoredGeoid]]) -> list[Judgement]:
        """(older, newer) pairs judged, batched; no threshold applied."""

    async def explain(self, older: StoredGeoid, newer: StoredGeoid) -> Judgement:
        """As ``judge_pairs`` for one pair, with what each stage said of it and how long it took in ``result.stages``."""

    def comparable(self, one: StoredGeoid, other: StoredGeoid) -> bool:
        """Whether the two are compared at all, by setting (``scoring.compare_within``)."""

    async def detect(
        self, fresh: Sequence[StoredGeoid], *, everywhere: bool = False
    ) -> list[list[tuple[StoredGeoid, Judgement]]]:
        """For each new geoid, the stored ones and the earlier ones of ``fresh`` that it contradicts (threshold applied).

        ``everywhere``: also those that by setting it is not compared with.
        """

    async def look(
        self, fresh: Sequence[StoredGeoid], *, hurried: bool = False, among: Among | None = None
    ) -> Detection:
        """As ``detect``, and who was not read.

        Args:
            hurried: The verifier is left out, and what it would have read is decided provisionally.
            among: Instead of everything that is stored.
        """

    @property
    def threshold(self) -> float:
        """Score at and above which a pair is reported that nobody had to stand in for the verifier on, set by the operating point."""


@dataclass(frozen=True, slots=True)
class PublishResult:
    geoid: Geoid
    offset: int
    contradictions: list[Contradiction]
    duplicate: bool


class KnowledgeService(Protocol):
    """What the doors ask: intake -> embed -> score -> commit -> bus behind one face. Every method may raise OperationalError."""

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
        """Returns once the geoid is durable, scored and in the log.

        ``session_id``: used where the body names none. ``merge`` keeps what the body leaves out (PATCH); otherwise an
        existing geoid's statement is replaced as a whole. ``must_exist`` raises NotFoundError for an unknown id.
        Cancelling the caller never tears a commit: what was admitted is finished or refused as a whole.
        """

    async def delete(self, geoid_id: str, *, principal: Principal, session_id: str | None = None) -> int:
        """``session_id``: whose publishes it must not overtake."""

    async def resolve(
        self,
        contradiction_id: str,
        decision: Decision,
        reason: str | None,
        *,
        principal: Principal,
        session_id: str | None = None,
    ) -> tuple[Scar, int]: ...

    async def score(self, a: GeoidBody, b: GeoidBody, *, explain: bool = False) -> ScoreResult:
        """``explain``: with what each stage of the cascade said."""

    async def search(
        self,
        *,
        text: str | None,
        vector: list[float] | None,
        relation: WatchKind,
        k: int,
        filter: Mapping[str, Any] | None = None,
    ) -> list[ScoredGeoid]: ...

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
    ) -> Watch: ...

    async def unwatch(self, name: str, *, principal: Principal) -> None: ...

    async def watches(self, *, principal: Principal) -> list[Watch]: ...

    def watch_owner(self, watch_id: str) -> str | None:
        """The id of the principal whose watch it is; None: this node knows of no such watch."""

    async def find_watch(self, watch_id: str) -> str | None:
        """The same, sure where other nodes keep watches too; None: there is no such watch."""


class FieldService(Protocol):
    """Thermodynamics and cognitive field dynamics over everything said so far."""

    def state(self) -> FieldState: ...


class LogFollower(Protocol):
    """What is kept in memory beside the index and follows the same log: written into its snapshots and restored with it."""

    def clear(self) -> None:
        """Forget everything."""

    def freeze(self) -> Callable[[], bytes]:
        """The state as it is now; what is returned is called in a worker thread and gives it as bytes."""

    def thaw(self, frozen: bytes) -> None:
        """Take over what ``freeze`` gave, in place of everything.

        Raises:
            ValueError: it is of another version or encoder.
        """

    def restore(self, geoids: GeoidColumns) -> None:
        """Take in geoids of the store, new or in a newer version."""

    def forget(self, geoid_id: str) -> None:
        """A geoid is no longer held; one that is not there is no error."""

    def restore_contradictions(self, contradictions: Sequence[Contradiction]) -> None:
        """Take in contradictions of the store in their newest state."""


# -- the way out ---------------------------------------------------------------------------------------------------------


class EventSink(Protocol):
    """Where committed entries go, in order; called on the event loop, must not block."""

    def deliver(self, entries: Sequence[LogEntry]) -> None: ...

    def latest(self, channel: str, type: str, data: bytes, *, offset: int) -> None:
        """A new value of a latest channel; ``data`` is JSON."""


@runtime_checkable
class Pingable(Protocol):
    """A service that can say whether it works."""

    async def ping(self) -> None: ...


class Threads(Protocol):
    """Worker threads by purpose, limited per purpose and in all. The only way blocking work is run."""

    async def run(self, purpose: Literal["encode", "score", "io"], fn: Callable[..., T], *args: Any) -> T:
        """Run ``fn(*args)`` in a worker thread; a cancelled caller waits until the thread is done with it."""
