"""Builds ``ext/`` into ``kimera_stream.kernels``. Everything else is in pyproject.toml.

Switches, by environment:

KIMERA_BUILD_EXT       force: fail when the kernel cannot be built. forbid: do not try (a pure package, which runs on numpy).
                       optional, auto (the default): try, and go on without it with a warning.
KIMERA_BUILD_DEBUG     1: no optimisation, debug information, Cython's bounds checks.
KIMERA_BUILD_ANNOTATE  1: also write ext/_kernel.html, which shows what is left of Python in the Cython source.
KIMERA_BUILD_COVERAGE  1: line tracing for coverage.
KIMERA_BUILD_SANITIZE  1: AddressSanitizer and UndefinedBehaviorSanitizer (run with libasan preloaded).
KIMERA_BUILD_NATIVE    1: tune for this machine; the result may not run on another.
"""

import os
import platform
import sys
import warnings
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
MODES = ("auto", "optional", "force", "forbid")
SOURCES = ("dispatch", "quantize", "signature", "overlap", "symbolic", "topk", "pool", "scan", "sieve", "head")
DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "initializedcheck": False,
    "cdivision": True,
    "embedsignature": True,
    "freethreading_compatible": True,
}


def switch(name: str) -> bool:
    """Whether the switch KIMERA_BUILD_<name> is on."""
    value = os.environ.get(f"KIMERA_BUILD_{name}", "")
    if value not in ("", "0", "1"):
        sys.exit(f"KIMERA_BUILD_{name}: expected 0 or 1, got {value!r}")
    return value == "1"


def mode() -> str:
    """The value of KIMERA_BUILD_EXT."""
    value = os.environ.get("KIMERA_BUILD_EXT", "") or "auto"
    if value not in MODES:
        sys.exit(f"KIMERA_BUILD_EXT: expected one of {', '.join(MODES)}, got {value!r}")
    return value


def variant_flags() -> dict[str, list[str]]:
    """The C files with flags of their own. On another architecture such a file compiles to nothing."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64", "i686"):
        avx2 = ["-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mlzcnt", "-mpopcnt"]
        avx512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=512"]
        fused = ["-ffp-contract=fast"]
        return {
            "isa_avx2": avx2, "isa_avx512": avx2 + avx512,
            "transformer_avx2": [*avx2, *fused], "transformer_avx512": [*avx2, *avx512, *fused],
        }  # fmt: skip
    if machine in ("aarch64", "arm64"):
        return {"isa_neon": []}
    return {}


def variants(prefix: str) -> list[str]:
    """The C files of one family that have flags of their own."""
    return [name for name in variant_flags() if name.startswith(prefix)]


class BuildKernel(build_ext):
    """Compiles each C file with its own flags, and decides what a failure means."""

    flags: ClassVar[dict[str, list[str]]] = variant_flags()

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            if mode() == "force":
                raise
            self._without(error)

    def build_extension(self, ext: Extension) -> None:
        compiler = self.compiler
        original = compiler._compile  # noqa: SLF001 - setuptools has no other way to flags per file

        def compile_one(obj, src, file_ext, cc_args, extra_postargs, pp_opts):
            return original(obj, src, file_ext, cc_args, extra_postargs + self.flags.get(Path(src).stem, []), pp_opts)

        compiler._compile = compile_one  # noqa: SLF001
        try:
            super().build_extension(ext)
        except Exception as error:
            if mode() == "force":
                raise
            self._without(error)
        finally:
            compiler._compile = original  # noqa: SLF001

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        if all(Path(self.get_ext_fullpath(ext.name)).exists() or self.inplace for ext in self.extensions):
            super().copy_extensions_to_source()

    def _without(self, error: Exception) -> None:
        self.extensions = []
        warnings.warn(
            f"The compiled kernel was not built ({error}); kimera-stream will run on its numpy reference, which is more "
            "than ten times slower. Install a C compiler and reinstall, or set KIMERA_BUILD_EXT=force to see why.",
            stacklevel=2,
        )


def extensions() -> list[Extension]:
    """The extension modules, with Cython's output generated; empty when forbidden."""
    if mode() == "forbid":
        return []
    from Cython.Build import cythonize

    # Products are rounded before they are added, as numpy does: GCC keeps to that with -std=c11, clang only when told.
    arguments = ["-std=c11", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-sign-compare"]
    links = ["-pthread"]
    macros = []
    directives = dict(DIRECTIVES)
    if switch("DEBUG"):
        arguments += ["-O0", "-g3"]
        directives |= {"boundscheck": True, "wraparound": True, "initializedcheck": True}
    else:
        arguments += ["-O3", "-g1", "-fno-math-errno", "-fno-trapping-math"]
    if switch("SANITIZE"):
        sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
        arguments += ["-g", *sanitizers]
        links += sanitizers
    if switch("NATIVE"):
        arguments += ["-march=native"]
    if switch("COVERAGE"):
        directives |= {"linetrace": True}
        macros += [("CYTHON_TRACE_NOGIL", "1"), ("CYTHON_USE_SYS_MONITORING", "0")]
    kernel = Extension(
        "kimera_stream.kernels._kernel",
        ["ext/_kernel.pyx", *(f"ext/{name}.c" for name in (*SOURCES, "isa_scalar", *variants("isa_")))],
        include_dirs=["ext"],
        depends=[str(path.relative_to(HERE)) for path in sorted(HERE.glob("ext/*.h"))],
        define_macros=macros,
        extra_compile_args=["-pthread", *arguments],
        extra_link_args=links,
    )
    transformer = Extension(
        "kimera_stream.kernels._transformer",
        ["ext/_transformer.pyx", *(f"ext/{name}.c" for name in ("transformer", "pool", *variants("transformer_")))],
        include_dirs=["ext"],
        depends=[str(path.relative_to(HERE)) for path in sorted(HERE.glob("ext/*.h"))],
        define_macros=macros,
        extra_compile_args=["-pthread", *arguments],
        extra_link_args=[*links, "-lm"],
    )
    modules = [kernel, transformer]
    if sys.platform != "win32":
        modules.append(
            Extension(
                "kimera_stream.kernels._egress",
                ["ext/_egress.pyx", "ext/framing.c"],
                include_dirs=["ext"],
                depends=["ext/framing.h"],
                define_macros=macros,
                extra_compile_args=arguments,
                extra_link_args=links,
            )
        )
    try:
        return cythonize(modules, compiler_directives=directives, annotate=switch("ANNOTATE"), quiet=True)
    except Exception as error:
        if mode() == "force":
            raise
        warnings.warn(f"Cython failed ({error}); kimera-stream will run on its numpy reference.", stacklevel=2)
        return []


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernel})
