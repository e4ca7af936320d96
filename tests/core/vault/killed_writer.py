"""Commits batch after batch and says so on stdout, until it is killed. Run by test_vault_faults.py."""

import sys

import anyio
import msgspec

from kimera_stream.core.interfaces import StoredGeoid, WriteBatch
from kimera_stream.core.vault.vault import SqlVault
from kimera_stream.infrastructure.settings import DatabaseSettings
from kimera_stream.protocol.log import LogEntry
from kimera_stream.protocol.objects import Geoid

SIZE = 5


def batch(head: int) -> WriteBatch:
    made = WriteBatch()
    for offset in range(head + 1, head + 1 + SIZE):
        geoid = Geoid(
            id=f"g{offset}",
            version=1,
            text=f"statement {offset}",
            semantic_state={"a": 1.0},
            symbolic_state={"n": offset},
            metadata={},
            entropy=0.0,
            created_at=offset,
            updated_at=offset,
            offset=offset,
        )
        data = msgspec.Raw(msgspec.json.encode(geoid))
        made.entries.append(LogEntry(offset, "geoid.created", offset, ("geoids", f"geoid:g{offset}"), data))
        made.geoids.append(StoredGeoid(geoid, None, "p"))
    return made


async def main(url: str) -> None:
    vault = SqlVault(url, DatabaseSettings.model_validate({}))
    await vault.start()
    while True:
        await vault.commit(batch(vault.head))
        sys.stdout.write(f"{vault.head}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    anyio.run(main, sys.argv[1])
