"""The C variants against the scalar one: natively, and for Arm by a cross compiler and an emulator where they are installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

from kimera_stream import kernels

ROOT = Path(__file__).parents[2]
SOURCES = ("dispatch", "quantize", "isa_scalar", "isa_avx2", "isa_avx512", "isa_neon")
X86 = {"isa_avx2": ["-mavx2", "-mfma"], "isa_avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl",
       "-mavx512vnni", "-mavx2", "-mfma"]}  # fmt: skip


def build(compiler: str, to: Path, flags: dict[str, list[str]], *more: str) -> Path:
    objects = []
    for name in SOURCES:
        target = to / f"{name}.o"
        command = [compiler, "-std=c11", "-O2", "-c", str(ROOT / "ext" / f"{name}.c"), "-o", str(target)]
        subprocess.run([*command, *flags.get(name, []), *more], check=True, timeout=300)
        objects.append(str(target))
    program = to / "isa_check"
    check = str(ROOT / "tests/kernels/isa_check.c")
    subprocess.run(
        [compiler, "-std=c11", "-O2", f"-I{ROOT / 'ext'}", check, *objects, "-o", str(program), "-lm", *more],
        check=True, timeout=300,
    )  # fmt: skip
    return program


def checked(command: list[str]) -> list[str]:
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.split()


@pytest.mark.skipif(not kernels.variants() or shutil.which("cc") is None, reason="needs a compiler")
def test_every_variant_of_this_machine_agrees_with_the_scalar_one(tmp_path: Path) -> None:
    flags = X86 if {"avx2", "avx512"} & set(kernels.variants()) else {}
    if not flags and "neon" not in kernels.variants():
        pytest.skip("there is only the scalar variant here")
    assert checked([str(build("cc", tmp_path, flags))]) == list(kernels.variants())


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["armv8-a", "armv8.2-a+dotprod"])
def test_neon_agrees_with_the_scalar_one(tmp_path: Path, machine: str) -> None:
    compiler = shutil.which("aarch64-linux-gnu-gcc")
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-gcc and qemu-aarch64")
    program = build(compiler, tmp_path, {}, "-static", f"-march={machine}")
    assert checked([emulator, str(program)]) == ["neon", "scalar"]
