"""JSON Web Tokens: the signature by a pinned algorithm and its own kind of key, then the claims."""

import json
import math
from collections.abc import Callable
from typing import Any, Final

from joserfc.errors import (
    BadSignatureError,
    ClaimError,
    ExpiredTokenError,
    InvalidKeyIdError,
    InvalidKeyTypeError,
    JoseError,
    MissingClaimError,
    UnsupportedAlgorithmError,
)
from joserfc.jwk import ECKey, GuestProtocol, Key, KeySet, OctKey, OKPKey, RSAKey, import_key
from joserfc.jws import JWSRegistry
from joserfc.jwt import ClaimsOption, JWTClaimsRegistry, decode

from kimera_stream.api.auth.revoking import digest_of
from kimera_stream.api.auth.watched import WatchedFile
from kimera_stream.core.access import ALL_ROLES, Principal, Role
from kimera_stream.core.interfaces import Threads
from kimera_stream.infrastructure.settings import SecuritySettings
from kimera_stream.protocol.errors import UnauthorizedError

SHARED_SECRET_ALGORITHM: Final = "HS256"  # noqa: S105 - a name
RELOAD_INTERVAL: Final = 10.0
MIN_RSA_BITS: Final = 2048
FARTHEST_EXPIRY: Final = 253_402_300_799
"""The end of the year 9999; what comes later is a mistake, and overflows timers."""
MAX_SUBJECT: Final = 255


class JwtVerifier:
    """Verifies tokens of an identity provider.

    Asymmetric algorithms are checked with the keys of ``jwt_key_file`` alone, HS256 with ``jwt_secret`` alone, whatever the token
    says of itself: a public key is never taken for a shared secret. ``none`` does not exist here.

    Args:
        settings: Keys, algorithms, issuer, audience and leeway.
        threads: Where the disk is waited for.
        clock: Unix seconds.
    """

    def __init__(self, settings: SecuritySettings, threads: Threads, clock: Callable[[], float]) -> None:
        self._clock = clock
        secret = settings.jwt_secret.get_secret_value()
        self._secret = OctKey.import_key(secret) if secret else None
        path = settings.jwt_key_file
        self._file = None if path is None else WatchedFile(path, parse_keys, threads, clock, RELOAD_INTERVAL)
        allowed = set(settings.jwt_algorithms) - {SHARED_SECRET_ALGORITHM} if path is not None else set()
        if secret:
            allowed.add(SHARED_SECRET_ALGORITHM)
        self._registry = _PinnedRegistry(allowed)
        demanded: dict[str, ClaimsOption] = {
            "exp": {"essential": True},
            "sub": {"essential": True},
            "aud": {"essential": True, "value": settings.jwt_audience},
        }
        if settings.jwt_issuer:
            demanded["iss"] = {"essential": True, "value": settings.jwt_issuer}
        self._claims = JWTClaimsRegistry(
            now=lambda: math.floor(clock()), leeway=math.ceil(settings.jwt_leeway), **demanded
        )

    @property
    def enabled(self) -> bool:
        """Whether there is any key to verify with."""
        return self._secret is not None or self._file is not None

    async def load(self) -> None:
        """Read the key file now. Later changes are picked up; one that cannot be understood leaves the old keys in force.

        Raises:
            ValueError: it cannot be read, or holds something else than public keys.
        """
        if self._file is not None:
            await self._file.value()

    async def authenticate(self, token: str) -> Principal:
        """The principal of a token: ``sub``, with the known ones among ``roles`` (list) or ``scope`` (space separated).

        Raises:
            UnauthorizedError: malformed, wrongly signed, expired, or not meant for this server; says which, without repeating
                any of it.
        """
        keys = None if self._file is None else await self._file.value()

        def key_for(signature: GuestProtocol) -> Key | KeySet:
            chosen = self._secret if signature.headers()["alg"] == SHARED_SECRET_ALGORITHM else keys
            if chosen is None:
                raise UnsupportedAlgorithmError
            return chosen

        try:
            claims = decode(token, key_for, registry=self._registry).claims
            self._claims.validate(claims)
        except (JoseError, ValueError, TypeError, RecursionError) as error:
            raise UnauthorizedError(f"token: {_reason(error)}", field="token") from None
        return _principal(claims, token)


class _PinnedRegistry(JWSRegistry):
    """Exactly the given algorithms. Headers that nobody knows are passed over, as RFC 7515 wants, unless ``crit`` lists them."""

    def __init__(self, allowed: set[str]) -> None:
        super().__init__(algorithms=sorted(allowed), strict_check_header=False)
        self._pinned = frozenset(allowed)

    def get_alg(self, name: Any) -> Any:
        # Not the base's: with nothing allowed it would allow what it recommends, and it warns of EdDSA at every token.
        if not isinstance(name, str) or name not in self._pinned or name == "none":
            raise UnsupportedAlgorithmError
        return self.algorithms[name]


def parse_keys(content: bytes | None) -> Key | KeySet:
    """The public keys of a PEM, JWK or JWKS file.

    A single key verifies tokens whatever their ``kid``; of a set the token names one.

    Raises:
        ValueError: no such file, a symmetric or private key, a short RSA key, or nothing that can be understood.
    """
    if content is None:
        raise ValueError("the file of the JWT key cannot be read")
    try:
        keys = _import(content)
    except (JoseError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"the file of the JWT key is no public key as PEM, JWK or JWKS ({type(error).__name__})"
        ) from None
    for key in keys if isinstance(keys, KeySet) else [keys]:
        _check_key(key)
    return keys


def _import(content: bytes) -> Key | KeySet:
    if not content.lstrip().startswith(b"{"):
        kinds = (RSAKey, ECKey, OKPKey)
        for kind in kinds:
            try:
                return kind.import_key(content)
            except (InvalidKeyTypeError, ValueError, TypeError, AttributeError):
                if kind is kinds[-1]:
                    raise
    data = json.loads(content)
    if "keys" in data:
        signing = [entry for entry in data["keys"] if entry.get("use", "sig") == "sig"]
        return KeySet.import_key_set({"keys": signing})
    return import_key(data)


def _check_key(key: Key) -> None:
    if isinstance(key, OctKey):
        raise ValueError(  # noqa: TRY004 - the file's content is wrong
            "the file of the JWT key holds a shared secret: give that as KIMERA_SECURITY__JWT_SECRET"
        )
    if key.is_private:
        raise ValueError("the file of the JWT key holds a private key: keep that with the issuer, give its public part")
    if isinstance(key, RSAKey) and key.raw_value.key_size < MIN_RSA_BITS:
        raise ValueError(f"the file of the JWT key holds an RSA key of fewer than {MIN_RSA_BITS} bits")


def _reason(error: Exception) -> str:
    match error:
        case ExpiredTokenError():
            return "it has expired"
        case MissingClaimError():
            return f"its claim {error.claim} is missing"
        case ClaimError():
            return f"its claim {error.claim} is not accepted"
        case UnsupportedAlgorithmError():
            return "its algorithm is not accepted"
        case BadSignatureError() | InvalidKeyIdError() | InvalidKeyTypeError():
            return "its signature cannot be verified"
        case _:
            return "it is malformed"


def _principal(claims: dict[str, Any], token: str) -> Principal:
    subject, expires, issued = claims["sub"], claims["exp"], claims.get("iat")
    if not isinstance(subject, str) or not 0 < len(subject) <= MAX_SUBJECT or not subject.isprintable():
        raise UnauthorizedError("token: its claim sub is not accepted", field="token")
    if expires > FARTHEST_EXPIRY:
        raise UnauthorizedError("token: its claim exp is not accepted", field="token")
    return Principal(
        subject,
        _roles(claims),
        math.floor(expires),
        f"jwt:{digest_of(token)}",
        None if issued is None else math.floor(issued),
    )


def _roles(claims: dict[str, Any]) -> frozenset[Role]:
    """The roles that are ours; a token may carry others, for other services."""
    roles = claims.get("roles")
    if roles is None:
        scope = claims.get("scope", "")
        if not isinstance(scope, str):
            raise UnauthorizedError("token: its claim scope is no text", field="token")
        roles = scope.split()
    if not isinstance(roles, list) or not all(isinstance(role, str) for role in roles):
        raise UnauthorizedError("token: its claim roles is no list of texts", field="token")
    return frozenset(role for role in ALL_ROLES if role in roles)
