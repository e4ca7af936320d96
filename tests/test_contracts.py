"""The rules that CI checks fail when they are broken: layers, strict types, banned calls. Each on a copy with one defect."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent

UPWARD_IMPORTS = {
    "core knows who calls it": ("core/geoid.py", "import kimera_stream.api.app"),
    "streaming knows engines": ("streaming/hub.py", "import kimera_stream.engines.field"),
    "the wire knows a service": ("protocol/log.py", "import kimera_stream.core.geoid"),
    "the client knows numpy": ("client/backoff.py", "import numpy"),
    "the ground uses the client": ("infrastructure/resources.py", "import kimera_stream.client"),
}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package and its configuration, to be broken."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.safetensors", "static")
    shutil.copytree(ROOT / "kimera_stream", tmp_path / "kimera_stream", ignore=ignored)
    return tmp_path


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(cwd), "HOME": str(cwd)}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("case", UPWARD_IMPORTS)
def test_an_upward_import_breaks_the_layers(case: str, copy: Path) -> None:
    file, line = UPWARD_IMPORTS[case]
    path = copy / "kimera_stream" / file
    path.write_text(f"{path.read_text()}\n{line}\n")
    result = run(BIN / "lint-imports", "--no-cache", cwd=copy)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "BROKEN" in result.stdout


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("def size(items):\n    return len(items)\n", "no-untyped-def"),
        ("from kimera_stream.protocol.channels import is_id\n\ncount: int = is_id('a') + 'b'\n", "operator"),
    ],
)
def test_a_loose_type_is_an_error(source: str, complaint: str, copy: Path) -> None:
    broken = copy / "kimera_stream" / "protocol" / "broken.py"
    broken.write_text(source)
    result = run(BIN / "mypy", "--config-file", "pyproject.toml", broken, cwd=copy)
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"[{complaint}]" in result.stdout


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("import asyncio\n\n\nasync def go() -> None:\n    asyncio.create_task(asyncio.sleep(1))\n", "TID251"),
        ("import time\n\ntime.sleep(1)\n", "TID251"),
        ("def go() -> None:\n    try:\n        print\n    except Exception:\n        pass\n", "BLE001"),
    ],
)
def test_a_banned_call_is_an_error(source: str, rule: str, copy: Path) -> None:
    broken = copy / "kimera_stream" / "engines" / "broken.py"
    broken.write_text(source)
    result = run(BIN / "ruff", "check", "--no-cache", broken, cwd=copy)
    assert result.returncode == 1, result.stdout + result.stderr
    assert rule in result.stdout


DRIVERS = {"sqlite3", "_sqlite3", "aiosqlite", "asyncpg", "psycopg", "psycopg2"}
ENGINES = {"create_engine", "create_async_engine", "engine_from_config", "async_engine_from_config", "create_pool"}


def connections(source: str) -> list[str]:
    """What a module names that opens a connection to a database: any driver, or how SQLAlchemy makes an engine."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in DRIVERS]
        elif isinstance(node, ast.ImportFrom):
            driver = (node.module or "").split(".")[0] in DRIVERS
            found += [f"{node.module}.{alias.name}" for alias in node.names if driver or alias.name in ENGINES]
        elif isinstance(node, ast.Attribute) and node.attr in ENGINES:
            found.append(node.attr)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            name = str(node.args[0].value)
            if called in ("import_module", "__import__") and name.split(".")[0] in DRIVERS:
                found.append(name)
    return found


def test_only_the_database_package_opens_connections() -> None:
    package = ROOT / "kimera_stream"
    one = package / "infrastructure" / "database"
    opening = {path: found for path in package.rglob("*.py") if (found := connections(path.read_text()))}
    assert {str(path): found for path, found in opening.items() if one not in path.parents} == {}
    assert {path.name for path in opening} >= {"engines.py", "sessions.py"}, "they are looked for in vain"


@pytest.mark.parametrize(
    "source",
    [
        "import sqlite3\n\nsqlite3.connect('x')",
        "import sqlite3 as s\n\nopen = s.connect",
        "from sqlite3 import connect",
        "import asyncpg.pool",
        "def go():\n    from asyncpg import connect as c",
        "from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine as e",
        "import sqlalchemy as sa\n\nsa.create_engine('sqlite://')",
        "import sqlalchemy.ext.asyncio\n\nmake = sqlalchemy.ext.asyncio.create_async_engine",
        "import importlib\n\nimportlib.import_module('aiosqlite')",
    ],
)
def test_another_connection_is_noticed(source: str) -> None:
    assert connections(source) != []


def test_what_opens_nothing_is_let_be() -> None:
    source = (
        "from sqlalchemy import Connection, text\nfrom sqlalchemy.ext.asyncio import AsyncConnection\n\nhost.connect(1)"
    )
    assert connections(source) == []
