"""What the services check before they let anyone in."""

from types import SimpleNamespace
from typing import cast

import pytest

from kimera_stream.api import services
from kimera_stream.api.services import EncoderMismatchError, Parts, load_index, restore_conversations
from kimera_stream.core.conversation import ConversationMemory
from kimera_stream.core.embedding import BatchingEmbedder
from kimera_stream.core.index import SnapshotKeeper
from kimera_stream.core.vault.vault import SqlVault
from kimera_stream.infrastructure.settings import Settings
from kimera_stream.infrastructure.tasks import Service
from kimera_stream.protocol.errors import UnavailableError

pytestmark = pytest.mark.anyio

NOBODY = cast("Service", SimpleNamespace(progress=lambda _: None))


class Vault:
    """Of a vault, what a load asks."""

    def __init__(self, encoder: str | None, *, watches: int = 0) -> None:
        self.encoder = encoder
        self._watches = watches

    async def count_geoids(self) -> int:
        return 0

    async def watches(self) -> list[object]:
        return [object()] * self._watches

    async def record_encoder(self, name: str) -> None:
        self.encoder = name


class Keeper:
    """Of what restores the index, that it is asked to."""

    async def restore(self, progress: object) -> None:
        """There is nothing to restore."""


def parts(vault: Vault, *, model: str) -> Parts:
    known: dict[type, object] = {
        SqlVault: vault,
        SnapshotKeeper: Keeper(),
        BatchingEmbedder: SimpleNamespace(model=model),
    }
    return cast("Parts", SimpleNamespace(container=SimpleNamespace(get=known.__getitem__), settings=Settings()))


@pytest.mark.parametrize("encoder", [None, "old"])
async def test_an_empty_database_takes_any_encoder(encoder: str | None) -> None:
    vault = Vault(encoder)
    await load_index(parts(vault, model="new"), NOBODY)
    assert vault.encoder == "new"


async def test_watches_alone_bind_a_database_to_their_encoder() -> None:
    vault = Vault("old", watches=2)
    with pytest.raises(EncoderMismatchError, match=r"the 2 stored vectors were made by old.*encodes with new"):
        await load_index(parts(vault, model="new"), NOBODY)
    assert vault.encoder == "old"
    await load_index(parts(vault, model="old"), NOBODY)


async def test_conversations_wait_for_a_vault_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "RECALL_AGAIN", 0.001)
    asked = 0

    async def recent_sessions(**_how: object) -> list[object]:
        nonlocal asked
        asked += 1
        if asked <= 10:  # more often than a service is started again
            raise UnavailableError("the database is locked")
        return []

    vault = cast("SqlVault", SimpleNamespace(recent_sessions=recent_sessions))
    await restore_conversations(ConversationMemory(10, 10, 1_000.0), vault, Settings())
    assert asked == 11
