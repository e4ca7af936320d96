"""A damaged write-ahead log is told from one that a crash tore."""

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimera_stream.core.vault import tools
from kimera_stream.infrastructure.database.wal import lost_commits, refuse_damaged_wal
from kimera_stream.protocol.errors import UnavailableError

PAGE = 4096
FRAME = 24 + PAGE


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database as kill -9 leaves it: eight commits in the log, of one to several frames each."""
    folder = tmp_path_factory.mktemp("wal")
    with closing(sqlite3.connect(folder / "live", isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE t (x)")
        for n in range(7):
            database.execute("INSERT INTO t VALUES (?)", ("x" * n * 3_000,))
        for name in ("live", "live-wal"):
            shutil.copy(folder / name, folder / name.replace("live", "crashed"))
    return folder / "crashed"


def wal_of(database: Path) -> bytes:
    return Path(f"{database}-wal").read_bytes()


def commits_from(content: bytes, frame: int) -> int:
    """Commit frames at or behind ``frame``."""
    starts = range(32 + frame * FRAME, len(content), FRAME)
    return sum(content[start + 4 : start + 8] != b"\0" * 4 for start in starts)


def test_what_a_crash_leaves_is_sound(crashed: Path) -> None:
    content = wal_of(crashed)
    frames = (len(content) - 32) // FRAME
    assert commits_from(content, 0) >= 8
    for length in range(0, len(content), 997):  # torn at any place
        assert lost_commits(content[:length]) == 0
    rubbish = content[: 32 + (frames - 1) * FRAME + 24] + b"\xa5" * PAGE  # the last frame's page did not arrive
    assert lost_commits(rubbish) == 0
    earlier = bytearray(content[32 : 32 + 3 * FRAME])  # frames of an earlier beginning stand behind
    earlier[8] ^= 1
    for start in range(0, len(earlier), FRAME):
        earlier[start + 8 : start + 16] = b"othersal"
    assert lost_commits(content + earlier) == 0


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(min_value=32), bit=st.integers(0, 7))
def test_a_flipped_bit_is_told_unless_it_is_in_the_last_transaction(crashed: Path, place: int, bit: int) -> None:
    content = bytearray(wal_of(crashed))
    place = 32 + (place - 32) % (len(content) - 32)
    behind = commits_from(bytes(content), (place - 32) // FRAME)
    content[place] ^= 1 << bit
    assert (lost_commits(bytes(content)) > 0) is (behind > 1)


@pytest.mark.parametrize("bit", [0, 63])
@pytest.mark.parametrize("field", [8, 16], ids=["salts", "checksum"])
def test_the_head_of_a_frame_is_looked_at_as_a_whole(crashed: Path, field: int, bit: int) -> None:
    """Random flips hit these bytes of a page of 4,096 once in a while only."""
    content = wal_of(crashed)
    for frame in range((len(content) - 32) // FRAME):
        damaged = bytearray(content)
        damaged[32 + frame * FRAME + field + bit // 8] ^= 1 << bit % 8
        told = lost_commits(bytes(damaged)) > 0
        assert told is (commits_from(content, frame) > 1), frame


def test_a_failed_sync_leaves_what_is_sound(crashed: Path) -> None:
    """A transaction that was written over one whose sync had failed: of the other, a part with its commit stands behind."""
    content = wal_of(crashed)
    last = [n for n in range((len(content) - 32) // FRAME) if commits_from(content, n) == 1]
    assert len(last) > 2
    failed = bytearray(content)
    failed[32 + last[0] * FRAME + 100] ^= 1  # as if another frame had been written there
    assert lost_commits(bytes(failed)) == 0


def damage(database: Path) -> None:
    path = Path(f"{database}-wal")
    content = bytearray(path.read_bytes())
    content[32 + FRAME + 200] ^= 4
    path.write_bytes(content)


def test_it_is_refused_before_it_is_opened(crashed: Path, tmp_path: Path) -> None:
    for name in ("crashed", "crashed-wal"):
        shutil.copy(crashed.parent / name, tmp_path / name)
    refuse_damaged_wal(str(tmp_path / "crashed"))
    refuse_damaged_wal(str(tmp_path / "nothing"))
    other = tmp_path / "other"
    other.mkdir()
    for name in ("crashed", "crashed-wal"):
        shutil.copy(crashed.parent / name, other / name)
    damage(other / "crashed")
    with pytest.raises(UnavailableError, match="restore a backup"):
        refuse_damaged_wal(str(other / "crashed"))


@pytest.mark.anyio
@pytest.mark.parametrize(
    "use", [lambda url: tools.check(url), lambda url: tools.migrate(url)], ids=["db check", "migrate, as a start does"]
)
async def test_tools_and_start_refuse_it(crashed: Path, tmp_path: Path, use: Callable[[str], object]) -> None:
    for name in ("crashed", "crashed-wal"):
        shutil.copy(crashed.parent / name, tmp_path / name)
    damage(tmp_path / "crashed")
    before = wal_of(tmp_path / "crashed")
    with pytest.raises(UnavailableError, match="crashed-wal is damaged"):
        await use(f"sqlite+aiosqlite:///{tmp_path / 'crashed'}")  # type: ignore[misc]
    assert wal_of(tmp_path / "crashed") == before, "the evidence is kept"
