"""What the vault keeps beside the log and the geoids, as it is handed around: accepted requests, dead letters, usage, revocations."""

from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

RequestRef: TypeAlias = tuple[str, int]
"""Which row keeps a request: its checkpoint and its place in it."""


@dataclass(frozen=True, slots=True)
class CheckpointRequest:
    """A publish that was accepted and not done when the process stopped, or that is to be tried again.

    Attributes:
        body: JSON of its ``GeoidBody``.
        accepted_at: Unix ms.
        attempts: How often it has been taken up; in the dead letter of work that never was kept, how often it was tried.
        ref: The row that keeps it; None before it is kept.
    """

    principal: str
    body: bytes
    session_id: str | None = None
    key: str | None = None
    priority: int = 5
    merge: bool = False
    must_exist: bool = False
    accepted_at: int = 0
    attempts: int = 0
    ref: RequestRef | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """Accepted work that could not be done, set aside for a person.

    Attributes:
        failed_at: Unix ms.
        code: Of the error (``protocol.errors``), with its ``message``.
        id: Given by the vault; ascending, the oldest first.
    """

    request: CheckpointRequest
    failed_at: int
    code: str
    message: str
    id: int = 0


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """What a principal published on one day (days since 1970, UTC).

    Attributes:
        text_bytes: Of the texts, in UTF-8.
        tokens: As the encoder counted them.
        bytes: Of the statements as they are stored: texts, states and metadata as JSON, and 4 for each number of a vector that was
            brought along. What an update leaves as it was counts again with it.
    """

    principal: str
    day: int
    statements: int
    text_bytes: int
    tokens: int
    bytes: int = 0


RevocationKind = Literal["principal", "key", "jwt"]
"""principal: every token issued to them so far. key: one API key. jwt: one JSON Web Token."""

FORGIVEN_MS: Final = 600_000
"""Above what any node forgives the clock of a token's issuer: so long after a token's end its revocation is kept."""


@dataclass(frozen=True, slots=True)
class Revocation:
    """Word that tokens no longer count.

    Attributes:
        id: Given by the vault; later ones are greater.
        subject: Whose, or which: the principal, the id of the API key, the digest of the JSON Web Token.
        revoked_at: Unix ms.
        expires_at: Unix ms after which the token is refused anyway; None: not known, or never.
    """

    id: int
    kind: RevocationKind
    subject: str
    revoked_at: int
    expires_at: int | None = None
