"""What several nodes ask of the vault that they share: leases on slices, marks, and plans made under the log's lock."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from kimera_stream.core.columns import SlicedColumns
from kimera_stream.core.groups import Within
from kimera_stream.core.interfaces import IdempotencyRecord, VaultService, WriteBatch
from kimera_stream.protocol.objects import (
    Contradiction,
    ContradictionState,
    Geoid,
)


@dataclass(frozen=True, slots=True)
class Node:
    """A process of the cluster, as the database knows it.

    Attributes:
        id: Of this run of the process: one that restarts is another node, so it inherits no lease without its index.
        name: As configured; what people and ``connect`` see.
        started_at, seen_at: Unix ms by the database's clock, so the nodes' clocks do not matter.
        reachable: Whether work gets there, and it means to stay. An engine that is cut off from the bus, or is to stop, is given
            nothing while another one is not.
    """

    id: str
    name: str
    role: Literal["all", "edge", "engine"]
    started_at: int = 0
    seen_at: int = 0
    reachable: bool = True

    @property
    def is_engine(self) -> bool:
        return self.role != "edge"


@dataclass(frozen=True, slots=True)
class SliceState:
    """A slice of the geoids, and the intake partition of the same number.

    Attributes:
        owner: Id of the node that holds its lease, or held it last; None: it was given back.
        generation: Grows whenever it changes hands: the fencing token.
        covered: Whether the lease is in force.
        scored: Every statement in the log up to here has been judged against the geoids of this slice, and what was found
            is in the log.
        unread: From this offset on there may be statements up to ``scored`` that the verifier has not read; None: there are none.
        heir: Id of the node that has the geoids ready and waits for the slice; of the owner, until it has them itself.
        left: Seconds until the lease ends, if it is not renewed; past its end, below 0.
    """

    number: int
    owner: str | None
    generation: int
    covered: bool
    scored: int
    unread: int | None = None
    heir: str | None = None
    left: float = 0.0

    @property
    def filled(self) -> bool:
        """Whether the lease is in force, and its owner has the geoids."""
        return self.covered and self.heir != self.owner


@dataclass(frozen=True, slots=True)
class Coverage:
    """The cluster in one snapshot of the database: ``head`` belongs to the same moment as every ``scored``."""

    head: int
    watch_generation: int
    slices: tuple[SliceState, ...]
    nodes: tuple[Node, ...]
    """Those heard of within the lease, by id."""

    @property
    def scored(self) -> int:
        """Up to here every statement has been judged against everything before it: what an ack waits for."""
        return min((each.scored for each in self.slices), default=self.head)

    @property
    def completeness(self) -> float:
        """Share of the slices that an engine covers with all their geoids, 0 to 1."""
        return sum(each.filled for each in self.slices) / len(self.slices) if self.slices else 0.0


@dataclass(frozen=True, slots=True)
class Mark:
    """Which version of a geoid is stored. ``stated``: offset of the entry that last changed its statement."""

    version: int
    offset: int
    stated: int


class LockedLog(Protocol):
    """The vault within one write transaction that holds the log's lock: what is read here stays so until it commits.

    Its methods do not await: the function that is given one runs as the transaction and has to be short.
    """

    @property
    def head(self) -> int: ...

    @property
    def now(self) -> int:
        """Unix ms by the database's clock, and never before the newest entry: the log's times are in its order."""

    @property
    def watch_generation(self) -> int:
        """Grows with every change of a watch on any node."""

    def hold(self, node_id: str, leases: Mapping[int, int], *, shared: bool = False) -> None:
        """Make sure that the node holds the slices (number -> generation), and go on holding them until the commit.

        Args:
            shared: Neither ``advance`` nor ``put_off`` is going to be called for them.

        Raises:
            LeaseLostError: it does not hold all of them: nothing of this transaction may stand.
        """

    def advance(self, numbers: Sequence[int], scored: int) -> None:
        """Move ``scored`` of slices that ``hold`` was asked for."""

    def put_off(self, numbers: Sequence[int], since: int | None) -> None:
        """Record from where on slices that ``hold`` was asked for wait for the verifier; None: they do not."""

    def marks(self, ids: Sequence[str]) -> Mapping[str, Mark]:
        """Of those geoids that exist."""

    def geoids(self, ids: Sequence[str]) -> Mapping[str, Geoid]:
        """Those of ``ids`` that exist."""

    def contradiction(self, contradiction_id: str) -> Contradiction | None: ...

    def contradictions_of(self, geoid_ids: Sequence[str], *, state: ContradictionState) -> list[Contradiction]: ...

    def scar_weights(self) -> tuple[float, float]: ...

    def recorded(
        self, keys: Sequence[tuple[str, str]], *, not_before: int
    ) -> Mapping[tuple[str, str], IdempotencyRecord]:
        """Records by (principal, key), made at or after ``not_before`` (unix ms)."""


class ClusterVault(VaultService, Protocol):
    """The vault where other nodes write as well."""

    async def refresh(self) -> int:
        """Read the ends of the log again, which other nodes may have moved; returns the head."""

    async def transact(self, plan: Callable[[LockedLog], WriteBatch]) -> WriteBatch:
        """Run ``plan`` under the log's lock and commit what it returns, atomically and durably; returns that.

        Waits for other writers instead of racing them. ``plan`` may run twice (a connection lost before the commit); its
        entries start at ``head + 1``; without entries the log's head is not moved. Errors that it raises come
        through, and nothing is written.

        Raises:
            UnavailableError: as for ``commit``.
        """

    async def saying(self, texts: Sequence[str], *, limit: int) -> dict[str, list[str]]:
        """By text, ids of the newest geoids that say exactly that, ``limit`` of each at most."""

    def scan_slices(
        self, numbers: Sequence[int], *, slices: int, batch: int, dimension: int, within: Within
    ) -> AsyncIterator[SlicedColumns]:
        """Every live geoid of some slices in offset order; one that is updated meanwhile comes again.

        Raises:
            DamagedVaultError: a vector is not of ``dimension`` numbers.
        """


class ClusterStore(Protocol):
    """Nodes, leases and progress, in PostgreSQL, by its clock. On connections of its own: a writer that waits for the log
    keeps no lease from being renewed. Every method may raise UnavailableError."""

    async def open(self, slices: int) -> None:
        """Record the number of slices, once for the life of the database.

        Raises:
            BadRequestError: it was made with another number.
        """

    async def beat(self, node: Node, *, lease: float) -> Coverage:
        """Say that the node is alive and extend every lease it still holds by ``lease`` seconds; returns how things stand."""

    async def leave(self, node_id: str) -> None:
        """The node stops: its leases are free at once."""

    async def take(self, node_id: str, numbers: Sequence[int], *, lease: float) -> dict[int, SliceState]:
        """Take those of the slices that are free or expired; returns what was got, each in its new generation, and not filled."""

    async def filled(self, node_id: str, leases: Mapping[int, int]) -> None:
        """The node has the geoids of slices that it owns (number -> generation); of one that is no longer its own nothing is
        recorded."""

    async def unfilled(self, node_id: str, leases: Mapping[int, int]) -> None:
        """The node no longer has the geoids of slices that it owns (number -> generation); otherwise as ``filled``."""

    async def offer(self, node_id: str, numbers: Sequence[int]) -> None:
        """The node has the geoids of these slices ready: whoever owns them may hand them over."""

    async def hand_over(self, node_id: str, leases: Mapping[int, int], to: str, *, lease: float) -> None:
        """Make another node the owner of slices (number -> generation), for ``lease`` seconds until it says that it is alive."""

    async def release(self, node_id: str, leases: Mapping[int, int]) -> None:
        """Give slices back (number -> generation); one that is no longer held is no error."""

    async def advance(self, node_id: str, leases: Mapping[int, int], scored: int) -> None:
        """Move ``scored`` of slices where nothing was found. It never goes back.

        Raises:
            LeaseLostError: not all of the leases are held; nothing has moved.
        """

    async def coverage(self, *, lease: float) -> Coverage:
        """How things stand; ``lease``: seconds after which a silent node counts as gone."""

    async def lead(self, duty: str, node_id: str, *, lease: float) -> bool:
        """Take, keep or be refused the lease of a duty that one node has at a time."""

    async def resign(self, duty: str, node_id: str) -> None:
        """Give a duty back."""
