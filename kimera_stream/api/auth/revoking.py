"""Tokens that no longer count: told through one node, kept in the vault, heard by every node within a second."""

import hashlib
import math
import re
import time
from base64 import urlsafe_b64decode
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import anyio
import msgspec
import structlog

from kimera_stream.api.auth.api_keys import id_of_token, is_key_id
from kimera_stream.core.access import Principal, RevocationStore
from kimera_stream.core.kept import FORGIVEN_MS, Revocation, RevocationKind
from kimera_stream.protocol.errors import UnavailableError

EVERY: Final = 1.0
"""Seconds between looks at what other nodes, or a file, have revoked."""
PAGE: Final = 1_000
MAX_TOKEN_CHARS: Final = 8_192
_JWT: Final = re.compile(r"[A-Za-z0-9_-]+\.([A-Za-z0-9_-]+)\.[A-Za-z0-9_-]+")

log = structlog.get_logger(__name__)


class _Claims(msgspec.Struct):
    exp: float | None = None


def digest_of(token: str) -> str:
    """What names a JSON Web Token: of the part that is signed, for a signature may be written in more than one way."""
    return hashlib.sha256(token.rpartition(".")[0].encode()).hexdigest()


def subject_of(token: str) -> tuple[RevocationKind, str, int | None]:
    """What to revoke so that a token no longer counts, and when (unix ms) it would have ended by itself, if it says so.

    Args:
        token: An API key, the id of one, or a JSON Web Token. It is not verified: it may have been made with a key that is gone.

    Raises:
        ValueError: it is none of these.
    """
    if is_key_id(token):
        return "key", token, None
    key_id = id_of_token(token)
    if key_id is not None:
        return "key", key_id, None
    found = _JWT.fullmatch(token) if len(token) <= MAX_TOKEN_CHARS else None
    if found is None:
        raise ValueError("expected an API key, the id of one, or a JSON Web Token")
    try:
        expires = msgspec.json.decode(urlsafe_b64decode(found[1] + "=" * (-len(found[1]) % 4)), type=_Claims).exp
    except (ValueError, msgspec.MsgspecError, RecursionError):
        expires = None
    known = expires is not None and 0 <= expires < 2**33
    return "jwt", digest_of(token), math.ceil(expires) * 1000 if expires is not None and known else None


class Revocations:
    """What was revoked, as far as this node has heard."""

    def __init__(self) -> None:
        self.last = 0
        """The id up to which all were heard of."""
        self._principals: dict[str, int] = {}
        self._tokens: dict[str, int | None] = {}
        """Until when (unix ms) each would be taken; None: for ever."""

    def __len__(self) -> int:
        return len(self._principals) + len(self._tokens)

    def add(self, each: Revocation) -> None:
        """Take one in, in whatever order."""
        if each.kind == "principal":
            self._principals[each.subject] = max(each.revoked_at, self._principals.get(each.subject, 0))
        else:
            self._tokens[f"{each.kind}:{each.subject}"] = each.expires_at

    def forget(self, before: int) -> None:
        """Let go of those whose tokens have ended by themselves before that time (unix ms)."""
        over = [token for token, expires in self._tokens.items() if expires is not None and expires < before]
        for token in over:
            del self._tokens[token]

    def heard(self, following: Sequence[Revocation]) -> None:
        """Take in those that follow the last one in the order of ids."""
        for each in following:
            self.add(each)
            self.last = each.id

    def cover(self, principal: Principal) -> bool:
        """Whether what the principal has shown is among it."""
        if not principal.credential:
            return False
        until = self._principals.get(principal.id)
        if until is not None and (principal.issued is None or principal.issued * 1000 <= until):
            return True
        return principal.credential in self._tokens


class Revoking:
    """Hears of revocations, and makes them.

    Args:
        store: Where every node finds them.
        revocations: What is known here.
        look: Looks at whatever else may have changed what tokens count (files of keys); whether it has.
        changed: Called with every change.
        clock: Unix seconds.
    """

    def __init__(
        self,
        store: RevocationStore,
        revocations: Revocations,
        *,
        look: Callable[[], Awaitable[bool]],
        changed: Callable[[], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._known = revocations
        self._look = look
        self._changed = changed
        self._clock = clock
        self._recheck: Callable[[], None] = lambda: None
        self._failing = False

    async def load(self, recheck: Callable[[], None]) -> None:
        """Hear of everything, however long the vault refuses; from now on ``recheck`` is called with every change as well."""
        self._recheck = recheck
        await self._try_to_hear()
        while self._failing:
            await anyio.sleep(EVERY)
            await self._try_to_hear()

    async def run(self) -> None:
        """Listen until cancelled."""
        while True:
            await anyio.sleep(EVERY)
            if await self._look():
                self._tell()
            await self._try_to_hear()
            self._known.forget(int(self._clock() * 1000) - FORGIVEN_MS)

    async def _try_to_hear(self) -> None:
        try:
            await self._hear()
        except UnavailableError as error:
            if not self._failing:
                log.warning("revocations cannot be heard of", error=error.message)
            self._failing = True
        else:
            self._failing = False

    async def revoke(self, kind: RevocationKind, subject: str, *, by: str, expires_at: int | None = None) -> Revocation:
        """Revoke, here at once, and on other nodes when they next look.

        Raises:
            LimitExceededError: too many are kept already.
            UnavailableError: it was not recorded.
        """
        made = await self._store.revoke(kind, subject, by=by, expires_at=expires_at)
        self._known.add(made)  # `last` stays: there may be others before it
        self._tell()
        log.info("tokens revoked", kind=kind)
        return made

    async def _hear(self) -> None:
        more = True
        while more:
            heard = await self._store.revocations(after=self._known.last, limit=PAGE)
            more = len(heard) == PAGE
            if heard:
                self._known.heard(heard)
                self._tell()

    def _tell(self) -> None:
        self._changed()
        self._recheck()
