"""The rules that CI checks fail when they are broken: layers, strict types, banned calls. Each on a copy with one defect."""

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
