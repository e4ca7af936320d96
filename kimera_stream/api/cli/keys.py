"""Making API keys for ``kimera-stream config new-key``."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from kimera_stream.api.auth.api_keys import add_api_key, create_api_key
from kimera_stream.core.access import Role
from kimera_stream.protocol.errors import BadRequestError

DEFAULT_FILE = Path("data/api-keys.jsonl")


def make_key(principal: str, roles: Sequence[Role], *, days: int | None, file: Path | None) -> tuple[str, Path]:
    """A new key, added to ``file`` (or the one that the settings name); returns the token and the file.

    Raises:
        BadRequestError: no such principal can be, or the file cannot be written.
    """
    named = os.environ.get("KIMERA_SECURITY__API_KEYS_FILE")
    path = file or (Path(named) if named else DEFAULT_FILE)
    now = int(time.time())
    try:
        token, key = create_api_key(
            principal, roles, expires=None if days is None else now + days * 86_400, created=now
        )
        add_api_key(path, key)
    except ValueError as exc:
        raise BadRequestError(str(exc)) from None
    except OSError as exc:
        raise BadRequestError(f"cannot write {path}: {exc.strerror}; name another file with --file") from exc
    return token, path
