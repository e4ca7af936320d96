"""Settings looked at together: what must not be combined, what production refuses, and how all of it is shown."""

import ipaddress
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from pydantic import BaseModel, SecretStr

from kimera_stream.infrastructure.secrets import MASK, mask_url
from kimera_stream.infrastructure.settings_loading import (
    DEFAULT_ENV_FILE,
    Problem,
    SettingsError,
    read_settings,
    variables,
)
from kimera_stream.infrastructure.settings_model import Settings

SHARED_SECRET_BYTES: Final = 32
"""HS256 needs a key of at least the hash's length (RFC 7518, section 3.2)."""
ASYMMETRIC_ALGORITHMS: Final = frozenset(
    {"EdDSA", "Ed25519", "ES256", "ES384", "ES512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}
)
URL_FIELDS: Final = frozenset({"KIMERA_DATABASE__URL", "KIMERA_BUS__URL", "KIMERA_EMBEDDING__URL"})
"""Shown with the password masked rather than not at all: which server it is, is what one looks for."""

WINDOW_PER_ANSWER: Final = 4
"""Times the longest wait for an answer that first results are kept for, so that work that comes again is known again."""


def load_settings(
    environ: Mapping[str, str] | None = None, env_file: Path | str | None = DEFAULT_ENV_FILE, *, check: bool = True
) -> Settings:
    """The settings to run with.

    Args:
        environ: Variables; None takes those of the process.
        env_file: File of further variables; the default ``.env`` may be missing, None reads none.
        check: Refuse what ``check_environment`` finds fatal.

    Raises:
        SettingsError: one line naming the variable, the value given (masked if secret) and what is allowed.
    """
    settings = read_settings(environ, env_file).settings
    if check:
        fatal = [problem for problem in check_environment(settings) if problem.fatal]
        if fatal:
            raise SettingsError(fatal)
    return settings


# -- what settings mean ------------------------------------------------------------------------------------------------


def database_url(settings: Settings) -> str:
    """SQLAlchemy URL of the database; by default SQLite in the data directory. May hold a password."""
    url = settings.database.url.get_secret_value()
    return url or f"sqlite+aiosqlite:///{settings.paths.data_dir.absolute() / 'kimera.sqlite3'}"


def node_name(settings: Settings) -> str:
    """This node's name; by default host name and process id."""
    return settings.node or f"{socket.gethostname()}-{os.getpid()}"


def is_loopback(host: str) -> bool:
    """Whether ``host`` (name or address, as bound) can only be reached from this machine."""
    bare = host.strip().strip("[]").lower()
    if bare == "localhost":
        return True
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return False


def access_is_open(settings: Settings) -> bool:
    """Whether callers need no token: in development, on a loopback address, unless authentication is required."""
    return (
        settings.security.auth != "required"
        and settings.environment == "development"
        and is_loopback(settings.api.host)
    )


# -- checks ------------------------------------------------------------------------------------------------------------


def check_environment(settings: Settings) -> list[Problem]:
    """What is wrong with the settings taken together, in order; looks at nothing outside them."""
    return [
        *_access(settings),
        *_tokens(settings),
        *_addresses(settings),
        *_parts(settings),
        *(_deployment(settings) if settings.environment != "development" else ()),
    ]


def check_files(settings: Settings) -> list[Problem]:
    """Files that the settings name and that cannot be read. Reads the disk."""
    named = {
        "KIMERA_SECURITY__JWT_KEY_FILE": settings.security.jwt_key_file,
        "KIMERA_SECURITY__API_KEYS_FILE": settings.security.api_keys_file,
        "KIMERA_API__TLS_CERTIFICATE": settings.api.tls_certificate,
        "KIMERA_API__TLS_KEY": settings.api.tls_key,
    }
    return [
        Problem(variable, f"'{path}' is no file that this user can read", "create it, or correct the path")
        for variable, path in named.items()
        if path is not None and not (path.is_file() and os.access(path, os.R_OK))
    ]


def _access(settings: Settings) -> Iterator[Problem]:
    security, host = settings.security, settings.api.host
    if security.auth == "none" and settings.environment != "development":
        yield Problem(
            "KIMERA_SECURITY__AUTH",
            f"'none' is not allowed in {settings.environment}",
            "set it to required, and give KIMERA_SECURITY__JWT_KEY_FILE or KIMERA_SECURITY__API_KEYS_FILE",
        )
    elif security.auth == "none" and not is_loopback(host):
        yield Problem(
            "KIMERA_SECURITY__AUTH",
            f"'none' is not allowed on the public address {host!r}",
            "set KIMERA_API__HOST=127.0.0.1, or KIMERA_SECURITY__AUTH=required",
        )
    if access_is_open(settings) or security.auth == "none":
        return
    if not (security.jwt_key_file or security.jwt_secret.get_secret_value() or security.api_keys_file):
        why = "is required" if security.auth == "required" else f"is required in {settings.environment} on {host!r}"
        loopback = (
            ", or set KIMERA_API__HOST=127.0.0.1"
            if settings.environment == "development" and security.auth == "auto"
            else ""
        )
        yield Problem(
            "KIMERA_SECURITY__AUTH",
            f"authentication {why}, and there is nothing to check tokens against",
            f"set KIMERA_SECURITY__API_KEYS_FILE (`kimera-stream config new-key` makes keys) or "
            f"KIMERA_SECURITY__JWT_KEY_FILE{loopback}",
        )


def _tokens(settings: Settings) -> Iterator[Problem]:
    security = settings.security
    secret = security.jwt_secret.get_secret_value()
    length = len(secret.encode())
    if secret and length < SHARED_SECRET_BYTES:
        yield Problem(
            "KIMERA_SECURITY__JWT_SECRET",
            f"{MASK} has {length} bytes; expected at least {SHARED_SECRET_BYTES}",
            "make one with `openssl rand -base64 48`",
        )
    for algorithm in security.jwt_algorithms:
        if algorithm == "HS256" and not secret:
            yield Problem(
                "KIMERA_SECURITY__JWT_ALGORITHMS", "'HS256' needs a shared secret", "set KIMERA_SECURITY__JWT_SECRET"
            )
        elif algorithm != "HS256" and algorithm not in ASYMMETRIC_ALGORITHMS:
            yield Problem(
                "KIMERA_SECURITY__JWT_ALGORITHMS",
                f"{algorithm!r} is not allowed; expected of {', '.join(sorted(ASYMMETRIC_ALGORITHMS | {'HS256'}))}",
            )
    if security.jwt_key_file and not ASYMMETRIC_ALGORITHMS & set(security.jwt_algorithms):
        yield Problem(
            "KIMERA_SECURITY__JWT_ALGORITHMS",
            "none of them goes with KIMERA_SECURITY__JWT_KEY_FILE",
            'add the algorithm of the key, as in ["EdDSA"]',
        )
    if (security.jwt_key_file or secret) and not security.jwt_audience:
        yield Problem("KIMERA_SECURITY__JWT_AUDIENCE", "tokens are always checked for their audience", "set it")
    if (security.jwt_key_file or secret) and not security.jwt_issuer and settings.environment != "development":
        yield Problem(
            "KIMERA_SECURITY__JWT_ISSUER",
            f"is empty, and {settings.environment} needs to know whose tokens to believe",
            "set it to the `iss` of your tokens",
        )


def _addresses(settings: Settings) -> Iterator[Problem]:
    api = settings.api
    if (api.tls_certificate is None) != (api.tls_key is None):
        missing = "CERTIFICATE" if api.tls_certificate is None else "KEY"
        yield Problem(f"KIMERA_API__TLS_{missing}", "is missing: certificate and key go together", "set both, or none")
    for origin in settings.security.allowed_origins:
        parts = urlsplit(origin)
        if origin not in ("*", "null") and (parts.scheme not in ("http", "https") or not parts.netloc or parts.path):
            yield Problem(
                "KIMERA_SECURITY__ALLOWED_ORIGINS",
                f"{origin!r} is no origin",
                "write scheme, host and any port, as in https://app.example.com",
            )


def _parts(settings: Settings) -> Iterator[Problem]:
    url = settings.database.url.get_secret_value()
    if url and not url.startswith(("sqlite+aiosqlite://", "postgresql+asyncpg://")):
        yield Problem(
            "KIMERA_DATABASE__URL",
            f"'{mask_url(url)}' is not allowed; expected sqlite+aiosqlite:///FILE or postgresql+asyncpg://HOST/NAME",
        )
    url = settings.bus.url.get_secret_value()
    if url and not url.startswith(("redis://", "rediss://", "unix://")):
        yield Problem("KIMERA_BUS__URL", f"'{mask_url(url)}' is not allowed; expected redis://HOST or rediss://HOST")
    elif url and not settings.database.url.get_secret_value().startswith("postgresql+asyncpg://"):
        yield Problem(
            "KIMERA_BUS__URL",
            "joins nodes that share a PostgreSQL database, and KIMERA_DATABASE__URL names none",
            "set KIMERA_DATABASE__URL=postgresql+asyncpg://USER@HOST/NAME, or leave the bus empty: one node",
        )
    least = WINDOW_PER_ANSWER * settings.bus.answer_within
    if url and settings.performance.idempotency_window < least:
        yield Problem(
            "KIMERA_PERFORMANCE__IDEMPOTENCY_WINDOW",
            f"{settings.performance.idempotency_window:g} s is too short for work that may come again over the bus",
            f"set it to {least:g} at least ({WINDOW_PER_ANSWER} times KIMERA_BUS__ANSWER_WITHIN)",
        )
    bus = settings.bus
    taken_over = max(bus.lease, bus.claim_after)
    if url and bus.answer_within <= taken_over:
        yield Problem(
            "KIMERA_BUS__ANSWER_WITHIN",
            f"{bus.answer_within:g} s are over before another engine takes the work of one that dies ({taken_over:g} s): its publishers are told `unavailable`",
            "set it above KIMERA_BUS__LEASE and KIMERA_BUS__CLAIM_AFTER",
            fatal=False,
        )
    if not url and settings.role != "all":
        yield Problem(
            "KIMERA_ROLE",
            f"{settings.role!r} is one of several nodes, and no bus joins them",
            "set KIMERA_BUS__URL=redis://HOST and a PostgreSQL KIMERA_DATABASE__URL, or leave the role out",
        )
    embedding = settings.embedding
    if embedding.provider == "http" and not embedding.url.startswith(("http://", "https://")):
        yield Problem(
            "KIMERA_EMBEDDING__URL",
            f"'{mask_url(embedding.url)}' is not allowed with the provider http; expected http(s)://...",
        )
    if embedding.provider == "minilm" and embedding.dimension != 384:
        yield Problem(
            "KIMERA_EMBEDDING__DIMENSION", f"{embedding.dimension} is not allowed: minilm has 384", "leave it out"
        )
    scoring = settings.scoring
    if scoring.verify_candidates > scoring.candidates:
        yield Problem(
            "KIMERA_SCORING__VERIFY_CANDIDATES",
            f"{scoring.verify_candidates} is more than the {scoring.candidates} of KIMERA_SCORING__CANDIDATES",
            fatal=False,
        )
    elif scoring.verify_candidates > scoring.read_candidates and "prefilter" in scoring.stages:
        yield Problem(
            "KIMERA_SCORING__VERIFY_CANDIDATES",
            f"{scoring.verify_candidates} is more than the {scoring.read_candidates} of KIMERA_SCORING__READ_CANDIDATES",
            fatal=False,
        )


def _deployment(settings: Settings) -> Iterator[Problem]:
    """What staging and production refuse: defaults that are right on a developer's machine only."""
    environment, api = settings.environment, settings.api
    if not settings.paths.data_dir.is_absolute():
        yield Problem(
            "KIMERA_PATHS__DATA_DIR",
            f"'{settings.paths.data_dir}' depends on where the server is started, which {environment} refuses",
            "set an absolute path, as in /var/lib/kimera-stream",
        )
    if "*" in settings.security.allowed_origins:
        yield Problem(
            "KIMERA_SECURITY__ALLOWED_ORIGINS", f"'*' is not allowed in {environment}", "list the origins you serve"
        )
    if not is_loopback(api.host) and api.tls_certificate is None and not api.trusted_proxies:
        yield Problem(
            "KIMERA_API__TLS_CERTIFICATE",
            f"tokens and statements cross the network in the clear on {api.host!r}",
            "set KIMERA_API__TLS_CERTIFICATE and KIMERA_API__TLS_KEY, or put a TLS proxy before it and name it in "
            "KIMERA_API__TRUSTED_PROXIES",
            fatal=False,
        )
    if settings.telemetry.log_level == "debug":
        yield Problem(
            "KIMERA_TELEMETRY__LOG_LEVEL",
            "debug may write users' statements to the log",
            "set it to info when you are done",
            fatal=False,
        )
    if settings.scoring.kernel == "reference":
        yield Problem("KIMERA_SCORING__KERNEL", "reference is slow, for comparison only", "set it to auto", fatal=False)


# -- showing -------------------------------------------------------------------------------------------------------------


def masked(settings: Settings) -> dict[str, Any]:
    """The settings as plain values by group, fit to be shown: secrets masked, passwords in URLs masked."""

    def shown(path: tuple[str, ...], value: Any) -> Any:
        if isinstance(value, BaseModel):
            return {name: shown((*path, name), getattr(value, name)) for name in type(value).model_fields}
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
        if "KIMERA_" + "__".join(path).upper() in URL_FIELDS:
            return mask_url(text)
        if isinstance(value, SecretStr):
            return MASK if text else ""
        if isinstance(value, Path):
            return str(value)
        return list(value) if isinstance(value, list) else value

    return {name: shown((name,), getattr(settings, name)) for name in type(settings).model_fields}


def config_check(
    environ: Mapping[str, str] | None = None, env_file: Path | str | None = DEFAULT_ENV_FILE
) -> list[Problem]:
    """Everything wrong with the settings, fatal or not, files included. Empty: fit to start."""
    try:
        settings = read_settings(environ, env_file).settings
    except SettingsError as error:
        return error.problems
    return [*check_environment(settings), *check_files(settings)]


def config_show(environ: Mapping[str, str] | None = None, env_file: Path | str | None = DEFAULT_ENV_FILE) -> list[str]:
    """Every setting as one line ``KIMERA_API__PORT=8765  # default``: its value, masked, and where it is from.

    Raises:
        SettingsError: they cannot be read.
    """
    read = read_settings(environ, env_file)
    tree = masked(read.settings)
    lines = []
    for variable in variables().values():
        value: Any = tree
        for part in variable.path:
            value = value[part]
        lines.append((f"{variable.name}={_written(value)}", read.origins[variable.name]))
    width = min(60, max(len(left) for left, _ in lines))
    return [f"{left.ljust(width)}  # {origin}" for left, origin in lines]


def _written(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(f'"{item}"' for item in value) + "]"
    return str(value)
