"""The ways the package is built: sanitized, forced, forbidden, and without a compiler. Each builds in a directory of its own."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CC = shutil.which(os.environ.get("CC", "cc"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a build needs."""
    to = tmp_path / "source"
    to.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, to)
    shutil.copytree(ROOT / "ext", to / "ext", ignore=shutil.ignore_patterns("_kernel.c", "*.html"))
    package = to / "kimera_stream"
    package.mkdir()
    (package / "__init__.py").write_text("")
    shutil.copytree(
        ROOT / "kimera_stream/kernels", package / "kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return to


def run(arguments: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False,
        timeout=900,
    )  # fmt: skip


def wheel(source: Path, **env: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    out = source.parent / "dist"
    result = run(["-m", "pip", "wheel", "-q", ".", "--no-deps", "--no-build-isolation", "-w", str(out)], source, **env)
    found = list(out.glob("*.whl"))
    return result, zipfile.ZipFile(found[0]).namelist() if found else []


@pytest.mark.slow
def test_forbidden_it_is_a_pure_package(source: Path) -> None:
    result, names = wheel(source, KIMERA_BUILD_EXT="forbid")
    assert result.returncode == 0, result.stderr
    assert "kimera_stream/kernels/reference.py" in names
    assert "kimera_stream/kernels/_kernel.pyi" in names
    assert not [name for name in names if name.endswith((".so", ".c", ".pyx"))]


@pytest.mark.slow
def test_without_a_compiler_it_is_built_without_the_kernel_unless_forced(source: Path) -> None:
    result, names = wheel(source, CC="/nonexistent/cc")
    assert result.returncode == 0, result.stderr
    assert names
    assert not [name for name in names if name.endswith(".so")]
    shutil.rmtree(source.parent / "dist")
    result, names = wheel(source, CC="/nonexistent/cc", KIMERA_BUILD_EXT="force")
    assert result.returncode != 0
    assert not names


def test_a_switch_with_an_unknown_value_stops_the_build(source: Path) -> None:
    result = run(["setup.py", "--version"], source, KIMERA_BUILD_EXT="maybe")
    assert result.returncode != 0
    assert "KIMERA_BUILD_EXT: expected one of" in result.stderr
    result = run(["setup.py", "--version"], source, KIMERA_BUILD_DEBUG="yes")
    assert "KIMERA_BUILD_DEBUG: expected 0 or 1" in result.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(CC is None or sys.platform != "linux", reason="needs a compiler on Linux")
def test_the_kernel_is_clean_under_the_sanitizers(source: Path, tmp_path: Path) -> None:
    """Every kernel test once more, on a build with AddressSanitizer and UndefinedBehaviorSanitizer."""
    assert CC is not None
    library = subprocess.run([CC, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout
    if not Path(library.strip()).is_absolute():
        pytest.skip("this compiler has no AddressSanitizer")
    to = tmp_path / "sanitized"
    build = ["setup.py", "-q", "build_ext", "--build-lib", str(to), "--build-temp", str(tmp_path / "objects")]
    result = run(build, source, KIMERA_BUILD_SANITIZE="1", KIMERA_BUILD_EXT="force")
    assert result.returncode == 0, result.stderr
    shutil.copytree(
        ROOT / "kimera_stream", to / "kimera_stream", dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.safetensors"),
    )  # fmt: skip
    tests = [
        str(ROOT / "tests/kernels" / f"test_{name}.py")
        for name in ("scan", "sift", "quantize", "heads", "texts", "framing")
    ]
    options = ["-q", "-x", "-s", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    result = run(
        ["-c", "import kimera_stream.kernels as k, pytest, sys; assert k.__file__.startswith(sys.argv[1]); "
         "sys.exit(pytest.main(sys.argv[2:]))", str(to), *options, *tests],
        to,
        PYTHONPATH=str(to),
        LD_PRELOAD=library.strip(),
        ASAN_OPTIONS="detect_leaks=0",
        UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1",
    )  # fmt: skip
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    assert "passed" in result.stdout
