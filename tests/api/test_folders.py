"""A start looks at what it has to write to before it begins."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from kimera_stream.api.folders import FolderError, check_folders
from kimera_stream.infrastructure.settings import load_settings


def settings_of(data: Path, **changes: str):
    return load_settings({"KIMERA_PATHS__DATA_DIR": str(data), **changes}, None)


def test_what_can_be_written_or_made_is_right(tmp_path: Path) -> None:
    check_folders(settings_of(tmp_path))
    check_folders(settings_of(tmp_path / "to" / "be" / "made"))
    assert list(tmp_path.iterdir()) == []


def test_what_lies_in_a_folder_that_shows_nothing_is_named_too(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    (closed / "data" / "deep").mkdir(parents=True)
    settings = settings_of(closed / "data" / "deep")
    tmp_path.chmod(0o755)
    closed.chmod(0)
    user = os.getuid()
    if user == 0:  # whom no permissions stop
        os.setresuid(65_534, 65_534, 0)
    try:
        with pytest.raises(FolderError, match="cannot be written by this user; change its owner or permissions"):
            check_folders(settings)
    finally:
        os.setresuid(user, user, user)
        closed.chmod(0o755)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (os.ST_RDONLY, "is on a read-only file system; remount it writable"),
        (0, "cannot be written by this user; change its owner or permissions"),
    ],
)
def test_what_cannot_is_named_with_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: int, message: str
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    (closed / "kept.sqlite3").touch()
    monkeypatch.setattr(os, "access", lambda path, _mode: not Path(path).is_relative_to(closed))
    monkeypatch.setattr(os, "statvfs", lambda _path: SimpleNamespace(f_flag=flag))
    with pytest.raises(FolderError) as caught:
        check_folders(settings_of(closed / "data"))
    assert str(caught.value) == f"KIMERA_PATHS__DATA_DIR: {closed / 'data'} {message}, or name another place"
    elsewhere = f"sqlite+aiosqlite:///{closed / 'kept.sqlite3'}"
    with pytest.raises(FolderError, match="KIMERA_DATABASE__URL"):
        check_folders(settings_of(tmp_path, KIMERA_DATABASE__URL=elsewhere))
    postgres = "postgresql+asyncpg://ann@db.example/kimera"
    check_folders(settings_of(tmp_path, KIMERA_DATABASE__URL=postgres))
    edge = {"KIMERA_ROLE": "edge", "KIMERA_BUS__URL": "redis://db.example/0"}
    check_folders(settings_of(closed, KIMERA_DATABASE__URL=postgres, **edge))
