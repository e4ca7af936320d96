"""Who is asking, and what they may ask for: principals, and what turns a credential into one."""

from dataclasses import dataclass, field
from typing import Literal, Protocol

from kimera_stream.core.kept import Revocation, RevocationKind

Role = Literal["publish", "subscribe", "resolve", "admin"]
ALL_ROLES: frozenset[Role] = frozenset({"publish", "subscribe", "resolve", "admin"})


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is asking. ``admin`` implies all roles.

    Attributes:
        expires: Unix seconds; None if the credential does not expire.
        credential: Which token was shown, without its secret; empty: none.
        issued: Unix seconds; None if the token does not say.
    """

    id: str
    roles: frozenset[Role]
    expires: int | None = None
    credential: str = field(default="", compare=False)
    issued: int | None = field(default=None, compare=False)

    def may(self, role: Role) -> bool:
        return role in self.roles or "admin" in self.roles


class Authenticator(Protocol):
    """Turns a credential into a principal."""

    @property
    def required(self) -> bool:
        """Whether a caller without a token is refused."""

    def known(self, token: str | None) -> Principal | None:
        """The principal where that is clear at once; None: ask ``authenticate``."""

    async def authenticate(self, token: str | None) -> Principal:
        """The principal of a token (JWT or API key); of None the anonymous principal where access is open.

        Raises:
            UnauthorizedError: missing, malformed, expired, revoked or unknown; the message never repeats the token.
        """

    def holds(self, principal: Principal) -> bool:
        """Whether what the principal has shown still counts: it was not revoked, nor changed, as far as this node has heard.
        Expiry is the caller's to watch."""

    async def revoked(self, principal: Principal) -> None:
        """Return once ``holds`` would say no."""


class RevocationStore(Protocol):
    """The word on tokens that no longer count, the same for every node."""

    async def revoke(self, kind: RevocationKind, subject: str, *, by: str, expires_at: int | None = None) -> Revocation:
        """Record it durably.

        Args:
            by: Id of the principal who says so, for the audit trail.
            expires_at: Unix ms after which the token is refused anyway, and this may be forgotten.

        Raises:
            LimitExceededError: too many are kept already.
            UnavailableError: it was not recorded.
        """

    async def revocations(self, *, after: int, limit: int) -> list[Revocation]:
        """Those with a greater id than ``after``, in its order.

        Raises:
            UnavailableError: they cannot be read.
        """
