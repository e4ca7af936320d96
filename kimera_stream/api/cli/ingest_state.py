"""Where an ingest has come to, kept in a small file so that the next run of the same file goes on there."""

import hashlib
import os
from pathlib import Path

import msgspec


class IngestState(msgspec.Struct):
    """What is known of an earlier run.

    Attributes:
        url: Server it was sent to.
        epoch: Identity of that server's log: a new database starts from the beginning.
        file: Absolute path of the file.
        line: Every line up to this one has been answered.
        digest: Digest of the first lines at the time (``head_digest`` of ``digest_lines``): a changed file starts anew.
        digest_lines: How many lines the digest covers.
        done: The run came to the end of the file.
    """

    url: str
    epoch: str
    file: str
    line: int = 0
    digest: str = ""
    digest_lines: int = 0
    done: bool = False


def default_path(file: str, url: str) -> Path:
    """Where the state of ``file`` and this server is kept: under the data directory of this environment."""
    data = Path(os.environ.get("KIMERA_PATHS__DATA_DIR") or "data")
    name = hashlib.blake2b(f"{Path(file).absolute()}\0{url}".encode(), digest_size=8).hexdigest()
    return data / "ingest" / f"{Path(file).name}.{name}.json"


def load(path: Path) -> IngestState | None:
    """The state, or None if there is none that can be used."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=IngestState)
    except (OSError, msgspec.DecodeError):
        return None


def save(path: Path, state: IngestState) -> None:
    """Replace the file in one step, so that it is never half-written.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    with fresh.open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(state)))
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
