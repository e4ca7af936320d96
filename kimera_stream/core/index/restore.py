"""Filling the index at start: the snapshot and the tail of the log, or everything from the vault."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import structlog

from kimera_stream.core.index.flat import FlatIndex
from kimera_stream.core.index.snapshot import SnapshotError
from kimera_stream.core.interfaces import VaultService
from kimera_stream.protocol.errors import LimitExceededError

_PAGE = 1_000

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Restored:
    """Where the index came from: ``replayed`` geoids from the log's tail or, without a snapshot, from the vault."""

    source: Literal["snapshot", "vault"]
    replayed: int


async def restore_index(index: FlatIndex, vault: VaultService, path: Path, *, model: str) -> Restored:
    """Fill an empty index.

    A snapshot that is damaged, foreign, older than what retention kept of the log, or ahead of the log is reported and
    the index rebuilt from the vault.

    Raises:
        LimitExceededError: there are more geoids than the index may hold.
        UnavailableError: the vault cannot be read.
    """
    try:
        info = await index.load(path, model=model, epoch=vault.epoch)
    except SnapshotError as error:
        if error.reason != "missing":
            log.warning("index snapshot not used: rebuilding from the vault", reason=error.reason, detail=str(error))
        return Restored("vault", await index.rebuild(vault.scan_geoids(batch=_PAGE)))
    except LimitExceededError:
        return Restored("vault", await index.rebuild(vault.scan_geoids(batch=_PAGE)))
    if not vault.trimmed <= info.offset <= vault.head:
        log.warning("index snapshot not used: the log does not reach back to it", offset=info.offset)
        index.clear()
        return Restored("vault", await index.rebuild(vault.scan_geoids(batch=_PAGE)))
    return Restored("snapshot", await _replay(index, vault, info.offset))


async def _replay(index: FlatIndex, vault: VaultService, after: int) -> int:
    """Put or remove every geoid that the log mentions after an offset, as the vault has it now."""
    count = 0
    while True:
        page = await vault.read("geoids", after=after, limit=_PAGE)
        changed = {str(entry.value()["id"]) for entry in page.entries}
        current = await vault.geoids(sorted(changed)) if changed else {}
        await index.reserve(len(current))
        for geoid_id in changed:
            if geoid_id in current:
                index.put(current[geoid_id])
            else:
                index.remove(geoid_id)
        count += len(changed)
        after = page.scanned
        if not page.more:
            return count
