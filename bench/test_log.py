"""One commit of each size and one page, for ``pytest bench --benchmark-only``; ``python -m bench.log`` compares with bare loops."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio.from_thread
import pytest

from bench.log import SETTINGS, write_batch
from kimera_stream.core.vault.vault import SqlVault


@pytest.fixture
def portal() -> Iterator[Any]:
    with anyio.from_thread.start_blocking_portal("asyncio", {"use_uvloop": True}) as opened:
        yield opened


@pytest.fixture
def vault(portal: Any, tmp_path: Path) -> Iterator[SqlVault]:
    opened = SqlVault(f"sqlite:///{tmp_path / 'vault.sqlite3'}", SETTINGS)
    portal.call(opened.start)
    yield opened
    portal.call(opened.close)


@pytest.mark.parametrize("size", [1, 32, 512])
def test_commit(benchmark: Any, portal: Any, vault: SqlVault, size: int) -> None:
    rounds = 0  # one where benchmarks are switched off

    def prepare() -> tuple[tuple[Any, ...], dict[str, Any]]:
        nonlocal rounds
        rounds += 1
        return (vault.commit, write_batch(vault.head, size)), {}

    benchmark.pedantic(portal.call, setup=prepare, rounds=20, warmup_rounds=2)
    assert vault.head == rounds * size


@pytest.mark.parametrize("channel", [None, "geoids"])
def test_page_of_a_thousand(benchmark: Any, portal: Any, vault: SqlVault, channel: str | None) -> None:
    portal.call(vault.commit, write_batch(0, 1_000))

    async def page() -> int:
        return len((await vault.read(channel, after=0, limit=1_000)).entries)

    assert benchmark(portal.call, page) == 1_000
