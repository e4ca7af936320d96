"""API keys: ``kst_<id>_<secret>`` in the hands of a client, a salted hash in a file here.

The file has one JSON object per line: ``{"id": ..., "hash": ..., "principal": ..., "roles": [...], "expires": ...}``, times
in unix seconds; empty lines and lines that begin with ``#`` are passed over. It is read again when it changes, so removing a
line revokes the key within a second.
"""

import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import msgspec
import structlog

from kimera_stream.api.auth.watched import WatchedFile
from kimera_stream.core.access import ALL_ROLES, Principal, Role
from kimera_stream.core.interfaces import Threads
from kimera_stream.infrastructure.secrets import hash_secret, is_hash, new_secret, verify_secret
from kimera_stream.protocol.errors import UnauthorizedError

PREFIX: Final = "kst_"
RELOAD_INTERVAL: Final = 1.0
_ID: Final = re.compile(r"[0-9a-f]{12}")
_TOKEN: Final = re.compile(r"kst_([0-9a-f]{12})_([A-Za-z0-9_-]{32,128})")

log = structlog.get_logger(__name__)


class ApiKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One key as it is stored. ``expires`` in unix seconds, None if it does not; ``note`` is for people."""

    id: str
    hash: str
    principal: str
    roles: list[Role]
    expires: int | None = None
    created: int | None = None
    note: str | None = None


class ApiKeyStore:
    """Checks API keys against a file of hashes.

    Args:
        path: The file; None: there are no keys.
        threads: Where the disk is waited for.
        clock: Unix seconds.
    """

    def __init__(self, path: Path | None, threads: Threads, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._file = None if path is None else WatchedFile(path, self._parse, threads, clock, RELOAD_INTERVAL)
        self._loaded = False
        self._known: dict[str, ApiKey] = {}
        self._told = self._known

    async def load(self) -> int:
        """Read the file now; returns the number of keys.

        Raises:
            ValueError: the file cannot be read, or a line of it cannot be understood; the message names the line.
        """
        self._told = await self._read()
        self._loaded = True
        return len(self._told)

    async def look(self) -> bool:
        """Read the file again if its time has come; whether it says something else than at the last look."""
        before, self._told = self._told, await self._read()
        return self._told is not before

    async def _read(self) -> dict[str, ApiKey]:
        if self._file is not None:
            self._known = await self._file.value()
        return self._known

    def holds(self, key_id: str, principal: Principal) -> bool:
        """Whether the key stands for that principal still, as of when the file was last read."""
        key = self._known.get(key_id)
        return key is not None and _principal(key) == principal

    async def authenticate(self, token: str) -> Principal:
        """The principal of a key.

        Raises:
            UnauthorizedError: malformed, unknown, revoked, wrong or expired; which of them is not told apart, but for expiry,
                which only the holder of the right secret learns of.
        """
        match = _TOKEN.fullmatch(token)
        keys = await self._read()
        key = keys.get(match[1]) if match is not None else None
        # An unknown key takes as long as a wrong secret.
        right = verify_secret(match[2] if match is not None else "", key.hash if key is not None else None)
        if key is None or not right:
            raise UnauthorizedError("token: the API key is not valid", field="token")
        if key.expires is not None and self._clock() >= key.expires:
            raise UnauthorizedError("token: the API key has expired", field="token")
        return _principal(key)

    def _parse(self, content: bytes | None) -> dict[str, ApiKey]:
        """Keys by id. Strict when the server starts; later a bad line costs that key alone, and a missing file every key:
        what is not known to be valid is not."""
        if content is None:
            if not self._loaded:
                raise ValueError("the file of API keys cannot be read")
            log.error("api_keys_unreadable", effect="every API key is refused")
            return {}
        keys: dict[str, ApiKey] = {}
        for number, line in enumerate(content.splitlines(), 1):
            if not line.strip() or line.lstrip().startswith(b"#"):
                continue
            try:
                key = parse_api_key(line)
                if key.id in keys:
                    raise ValueError(f"the id {key.id!r} is there twice")  # noqa: TRY301
            except ValueError as error:
                if not self._loaded:
                    raise ValueError(f"line {number} of the file of API keys: {error}") from None
                log.error("api_key_refused", line=number, error=str(error))  # noqa: TRY400
                continue
            keys[key.id] = key
        return keys


def _principal(key: ApiKey) -> Principal:
    return Principal(key.principal, frozenset(key.roles), key.expires, f"key:{key.id}", key.created)


def is_key_id(text: str) -> bool:
    return _ID.fullmatch(text) is not None


def id_of_token(token: str) -> str | None:
    """The id in a token; None: it is no API key."""
    match = _TOKEN.fullmatch(token)
    return None if match is None else match[1]


def parse_api_key(line: bytes) -> ApiKey:
    """One line of the file.

    Raises:
        ValueError: not such an object; the message never repeats the hash.
    """
    key = msgspec.json.decode(line, type=ApiKey)
    if not is_key_id(key.id):
        raise ValueError("id: expected 12 hexadecimal digits")
    if not is_hash(key.hash):
        raise ValueError("hash: expected blake2b$<salt>$<digest>")
    if not key.principal:
        raise ValueError("principal: expected a name")
    return key


def create_api_key(
    principal: str,
    roles: Iterable[Role],
    *,
    expires: int | None = None,
    note: str | None = None,
    created: int | None = None,
) -> tuple[str, ApiKey]:
    """A new key: the token to hand over, shown this once, and what to store of it (``add_api_key``).

    Args:
        principal: Whom it stands for.
        roles: Of publish, subscribe, resolve, admin; at least one.
        expires: Unix seconds; None: never.
        note: For people.
        created: Unix seconds.

    Raises:
        ValueError: no principal, no role or an unknown one.
    """
    granted = sorted(set(roles))
    if not principal.strip() or len(principal) > 128:
        raise ValueError("principal: expected a name of 1-128 characters")
    if not granted or not ALL_ROLES.issuperset(granted):
        raise ValueError(f"roles: expected some of {', '.join(sorted(ALL_ROLES))}")
    secret = new_secret()
    key = ApiKey(
        id=secrets.token_hex(6),
        hash=hash_secret(secret),
        principal=principal,
        roles=granted,
        expires=expires,
        created=created,
        note=note,
    )
    return f"{PREFIX}{key.id}_{secret}", key


def add_api_key(path: Path, key: ApiKey) -> None:
    """Add a key to the file, which is made (readable by its owner alone) where there is none. Blocks on the disk.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.read_bytes() if path.exists() else b""
    _replace(path, old + (b"\n" if old and not old.endswith(b"\n") else b"") + msgspec.json.encode(key) + b"\n")


def revoke_api_key(path: Path, key_id: str) -> bool:
    """Remove a key from the file; whether it was there. Blocks on the disk.

    Raises:
        OSError: the file cannot be read or written.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _id_of(line) != key_id]
    if len(kept) == len(lines):
        return False
    _replace(path, b"".join(kept))
    return True


def _id_of(line: bytes) -> str | None:
    try:
        return parse_api_key(line).id
    except ValueError:
        return None


def _replace(path: Path, content: bytes) -> None:
    """Write a whole new file in place of the old one: a reader sees the one or the other, a crash leaves one of them."""
    before = path.stat() if path.exists() else None
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if before is not None:
            Path(temporary).chmod(before.st_mode & 0o777)
            if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
                os.chown(temporary, before.st_uid, before.st_gid)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
