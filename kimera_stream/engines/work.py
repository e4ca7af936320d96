"""What the pipeline is asked to do: one class per command, with all that its planning needs."""

from dataclasses import dataclass
from typing import TypeAlias

from kimera_stream.core.access import Principal
from kimera_stream.core.interfaces import PublishResult, Vector
from kimera_stream.core.kept import CheckpointRequest
from kimera_stream.engines.intake import Ticket
from kimera_stream.protocol.objects import Decision, GeoidBody, Scar


@dataclass(frozen=True, slots=True)
class RequestId:
    """What another node calls a request; recorded with its first result, so that it is done once however often it comes.

    Attributes:
        id: The same each time it comes.
        partition: Of the intake it came through: only who owns that may commit it.
        generation: Of the ownership under which it was taken: what a former one left undone comes again, in its order. None: of any.
    """

    id: str
    partition: int
    generation: int | None = None

    @property
    def name(self) -> str:
        """What its first result is recorded under, beside the clients' keys."""
        return f"~request:{self.id}"


@dataclass(slots=True)
class PublishWork:
    """One statement to publish.

    Attributes:
        vector: Filled in when the text has been encoded.
        kept: The row of the vault that keeps it, where it was taken up from there.
        at_fault: The server met a defect over this statement alone.
        tries: How often a stage failed over it by a cause that may pass, and was begun again.
        request: Where it came from another node.
    """

    ticket: Ticket[PublishResult]
    body: GeoidBody
    principal: Principal
    session_id: str | None
    key: str | None
    merge: bool
    must_exist: bool
    vector: Vector | None = None
    tokens: int = 0
    kept: CheckpointRequest | None = None
    at_fault: bool = False
    tries: int = 0
    request: RequestId | None = None

    @property
    def text(self) -> str | None:
        """The text to encode, if any: a vector that was brought along takes its place."""
        return self.body.text if self.body.vector is None else None


@dataclass(slots=True)
class DeleteWork:
    ticket: Ticket[int]
    geoid_id: str
    principal: Principal
    request: RequestId | None = None


@dataclass(slots=True)
class ResolveWork:
    ticket: Ticket[tuple[Scar, int]]
    contradiction_id: str
    decision: Decision
    reason: str | None
    principal: Principal
    request: RequestId | None = None


@dataclass(slots=True)
class RereadWork:
    """Have the verifier read stored statements that were decided without it; answers how many it read."""

    ticket: Ticket[int]
    geoid_ids: list[str]


Work: TypeAlias = PublishWork | DeleteWork | ResolveWork | RereadWork
