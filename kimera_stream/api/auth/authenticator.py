"""From a token of any kind to a principal."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import anyio
import structlog

from kimera_stream.api.auth.api_keys import PREFIX, ApiKeyStore
from kimera_stream.api.auth.revoking import MAX_TOKEN_CHARS, Revocations
from kimera_stream.core.access import ALL_ROLES, Principal
from kimera_stream.core.interfaces import Threads
from kimera_stream.infrastructure.settings import Problem, SecuritySettings, SettingsError
from kimera_stream.protocol.errors import UnauthorizedError

if TYPE_CHECKING:
    from kimera_stream.api.auth.jwt import JwtVerifier

ANONYMOUS: Final = Principal("anonymous", ALL_ROLES)

log = structlog.get_logger(__name__)


class TokenAuthenticator:
    """Implements ``core.access.Authenticator`` with JSON Web Tokens and API keys.

    Args:
        security: Keys and what is demanded of tokens.
        open_access: Callers without a token are anonymous and have every role (``settings.access_is_open`` says when).
        threads: Where the disk is waited for.
        clock: Unix seconds.
    """

    def __init__(
        self,
        security: SecuritySettings,
        *,
        open_access: bool,
        threads: Threads,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._open = open_access
        self._jwt = _jwt_verifier(security, threads, clock)
        self._keys = ApiKeyStore(security.api_keys_file, threads, clock)
        self._has_keys = security.api_keys_file is not None
        self._changed = anyio.Event()
        self.revocations = Revocations()

    @property
    def required(self) -> bool:
        return not self._open

    async def load(self) -> None:
        """Read the key files; to be awaited before the first ``authenticate``.

        Raises:
            SettingsError: one cannot be read or understood.
        """
        try:
            if self._jwt is not None:
                await self._jwt.load()
        except ValueError as error:
            raise SettingsError([Problem("KIMERA_SECURITY__JWT_KEY_FILE", str(error))]) from error
        try:
            count = await self._keys.load()
        except ValueError as error:
            raise SettingsError(
                [Problem("KIMERA_SECURITY__API_KEYS_FILE", str(error), "`kimera-stream config new-key` makes keys")]
            ) from error
        log.info("authentication_ready", required=self.required, signed=self._jwt is not None, keys=count)

    def known(self, token: str | None) -> Principal | None:
        """See ``core.access.Authenticator``. Where access is open and nothing is configured to check a token against, a
        token is passed over: a client's setting need not change with the server it is tried on.
        """
        if self._open and (not token or not (self._has_keys or self._jwt is not None)):
            return ANONYMOUS
        return None

    async def authenticate(self, token: str | None) -> Principal:
        """See ``core.access.Authenticator``."""
        known = self.known(token)
        if known is not None:
            return known
        if not token:
            raise UnauthorizedError(
                "token: a token is required, as `Authorization: Bearer TOKEN`, in `connect` or as subprotocol",
                field="token",
            )
        kind = "api_key" if token.startswith(PREFIX) else "jwt"
        try:
            if len(token) > MAX_TOKEN_CHARS or not token.isascii():
                raise UnauthorizedError("token: it is malformed", field="token")  # noqa: TRY301
            if kind == "api_key":
                principal = await self._keys.authenticate(token)
            elif self._jwt is None:
                raise UnauthorizedError("token: its algorithm is not accepted", field="token")  # noqa: TRY301
            else:
                principal = await self._jwt.authenticate(token)
            # From here until the caller has the principal nothing is awaited: who is let in now is found by the next recheck.
            if self.revocations.cover(principal):
                raise UnauthorizedError("token: it has been revoked", field="token")  # noqa: TRY301
            return principal  # noqa: TRY300
        except UnauthorizedError as error:
            log.info("authentication_refused", kind=kind, reason=error.message)
            raise

    async def look(self) -> bool:
        """Whether the file of API keys has changed since the last look."""
        return await self._keys.look()

    def holds(self, principal: Principal) -> bool:
        """See ``core.access.Authenticator``."""
        kind, _, which = principal.credential.partition(":")
        if kind == "key" and not self._keys.holds(which, principal):
            return False
        return not self.revocations.cover(principal)

    def changed(self) -> None:
        """Something may not hold any more that did."""
        self._changed.set()
        self._changed = anyio.Event()

    async def revoked(self, principal: Principal) -> None:
        """See ``core.access.Authenticator``."""
        while self.holds(principal):
            await self._changed.wait()


def _jwt_verifier(security: SecuritySettings, threads: Threads, clock: Callable[[], float]) -> "JwtVerifier | None":
    """None where no key is configured: the cryptography it needs is not loaded then."""
    if not security.jwt_secret.get_secret_value() and security.jwt_key_file is None:
        return None
    from kimera_stream.api.auth.jwt import JwtVerifier

    return JwtVerifier(security, threads, clock)
