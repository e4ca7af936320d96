"""Secrets kept out of sight, and API-key secrets kept as hashes."""

import hashlib
import hmac
import secrets
from typing import Final
from urllib.parse import parse_qsl, urlencode, urlsplit

MASK: Final = "********"
_SENSITIVE_QUERY: Final = frozenset(
    {"password", "passwd", "pwd", "secret", "token", "api_key", "apikey", "sslpassword"}
)
_SCHEME: Final = "blake2b"
_SALT_BYTES: Final = 16
_DIGEST_BYTES: Final = 32


def mask_url(url: str) -> str:
    """``url`` with its password, and passwords among its query, replaced. What is no URL is masked as a whole."""
    if not url:
        return url
    try:
        parts = urlsplit(url)
    except ValueError:
        return MASK
    if not parts.scheme:
        return MASK
    query = urlencode(
        [
            (name, MASK if name.lower() in _SENSITIVE_QUERY else value)
            for name, value in parse_qsl(parts.query, keep_blank_values=True)
        ],
        safe="*/:,",
    )
    # Not urlunsplit: it makes another URL of sqlite:////file, whose host is empty.
    slashes = "//" if url[len(parts.scheme) + 1 :].startswith("//") else ""
    tail = (f"?{query}" if query else "") + (f"#{parts.fragment}" if parts.fragment else "")
    return f"{parts.scheme}:{slashes}{_mask_userinfo(parts.netloc)}{parts.path}{tail}"


def _mask_userinfo(netloc: str) -> str:
    userinfo, at, host = netloc.rpartition("@")
    if not at:
        return netloc
    name, colon, _ = userinfo.partition(":")
    return f"{name}{colon}{MASK if colon else ''}@{host}"


def new_secret() -> str:
    """256 random bits as URL-safe text (43 characters)."""
    return secrets.token_urlsafe(32)


def hash_secret(secret: str) -> str:
    """A salted hash to store in place of ``secret``: ``blake2b$<salt>$<digest>``.

    A fast hash is right here and only here: the secrets are 256 random bits of ``new_secret``, which no dictionary holds,
    so a slow one (scrypt) would add nothing but a way to keep the server busy. Never use it for what a person made up.
    """
    salt = secrets.token_bytes(_SALT_BYTES)
    return f"{_SCHEME}${salt.hex()}${_digest(secret, salt).hex()}"


def is_hash(stored: str) -> bool:
    """Whether ``stored`` reads as a result of ``hash_secret``."""
    return _parse(stored) is not None


def verify_secret(secret: str, stored: str | None) -> bool:
    """Whether ``secret`` is the one that ``stored`` is the hash of, in a time that tells nothing of where they differ.

    ``None`` (nothing is stored) takes as long as a wrong secret, and is false.
    """
    parsed = _parse(stored) if stored is not None else None
    salt, expected = parsed if parsed is not None else (bytes(_SALT_BYTES), bytes(_DIGEST_BYTES))
    same = hmac.compare_digest(_digest(secret, salt), expected)
    return same and parsed is not None


def _digest(secret: str, salt: bytes) -> bytes:
    return hashlib.blake2b(
        secret.encode("utf-8", "surrogatepass"), digest_size=_DIGEST_BYTES, salt=salt, person=b"kimera-key"
    ).digest()


def _parse(stored: str) -> tuple[bytes, bytes] | None:
    parts = stored.split("$")
    if len(parts) != 3 or parts[0] != _SCHEME:
        return None
    try:
        salt, digest = bytes.fromhex(parts[1]), bytes.fromhex(parts[2])
    except ValueError:
        return None
    return (salt, digest) if len(salt) == _SALT_BYTES and len(digest) == _DIGEST_BYTES else None
