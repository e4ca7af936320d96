"""What the benches of the log write: publishes as they usually are, and the one loop that fills a vault with them."""

from collections.abc import Callable, Mapping, Sequence

import msgspec

from kimera_stream.core.interfaces import StoredGeoid, Vector, WriteBatch
from kimera_stream.core.vault.vault import SqlVault
from kimera_stream.protocol.log import LogEntry
from kimera_stream.protocol.objects import Geoid, Scalar

BATCH = 512
SESSIONS = 50
AGENTS = 7
_TEXT = "The pump at station {} reports a pressure of {} bar and valve {} is open since this morning"


def statement(
    number: int, offset: int, vector: Vector, *, version: int = 1, symbols: Mapping[str, Scalar] | None = None
) -> StoredGeoid:
    """The ``version``-th publish of a geoid by its number: a sentence, its vector, a session and an agent."""
    geoid = Geoid(
        id=f"geoid-{number * 2_654_435_761 % 2**32:08x}",
        version=version,
        text=_TEXT.format(number % 97, number % 13, number),
        semantic_state={},
        symbolic_state=dict(symbols or {}),
        metadata={},
        session_id=f"session-{number % SESSIONS}",
        originator_agent_id=f"agent-{number % AGENTS}",
        entropy=0.0,
        created_at=1_700_000_000_000 + number,
        updated_at=1_700_000_000_000 + offset,
        offset=offset,
    )
    return StoredGeoid(geoid, vector, "bench")


def committed(stored: Sequence[StoredGeoid]) -> WriteBatch:
    """What the pipeline hands to the vault for these publishes."""
    return WriteBatch(
        entries=[
            LogEntry(
                item.geoid.offset,
                "geoid.created" if item.geoid.version == 1 else "geoid.updated",
                item.geoid.updated_at,
                (
                    "geoids",
                    f"geoid:{item.geoid.id}",
                    f"session:{item.geoid.session_id}",
                    f"agent:{item.geoid.originator_agent_id}",
                ),
                msgspec.Raw(msgspec.json.encode(item.geoid)),
            )
            for item in stored
        ],
        geoids=list(stored),
    )


async def fill(vault: SqlVault, upto: int, batch_at: Callable[[int, int], WriteBatch], *, most: int = BATCH) -> int:
    """Commit what ``batch_at(head, count)`` makes until the log ends at ``upto``, ``most`` at a time; returns its end."""
    while vault.head < upto:
        await vault.commit(batch_at(vault.head, min(most, upto - vault.head)))
    return vault.head
