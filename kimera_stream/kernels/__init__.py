"""The scoring kernels: one face, two backends.

    caller ──> Kernel (checks dtype, shape, contiguity, NaN) ──> compiled: ext/*.c by way of _kernel.pyx
                                                            └──> reference: numpy, the fallback and the tests' oracle

Only this package imports the compiled module. ``IMPLEMENTATION`` says which backend ``load()`` gives by default; where
the module was not built a warning says so once, on import.
"""

import warnings
from typing import Literal

from kimera_stream.kernels.face import Kernel, View, quantize, write_row, write_rows
from kimera_stream.kernels.layout import (
    EMPTY_RECORD,
    NAMED_MASK,
    NEGATED_BIT,
    NUMBERS_MASK,
    SAME,
    SYMBOLIC_BONUS,
    TEXT_BIT,
    Hits,
    Queries,
    Record,
    Segment,
    Weights,
    bitmap,
    build_record,
    record_codes,
    record_length,
    stride_of,
)
from kimera_stream.kernels.reference import Reference
from kimera_stream.kernels.sieving import Sieve
from kimera_stream.kernels.texts import same_names, text_overlaps, text_signature, text_signatures

try:
    import kimera_stream.kernels._kernel as _kernel
except ImportError as error:
    _MISSING: str | None = str(error)
    warnings.warn(
        f"The compiled scoring kernel is not there ({error}): running on the numpy reference, which is more than ten "
        "times slower. Install a C compiler and reinstall kimera-stream.",
        RuntimeWarning,
        stacklevel=2,
    )
else:
    _MISSING = None

IMPLEMENTATION: Literal["compiled", "reference"] = "reference" if _MISSING else "compiled"

Choice = Literal["auto", "compiled", "reference"]

__all__ = [
    "EMPTY_RECORD",
    "IMPLEMENTATION",
    "NAMED_MASK",
    "NEGATED_BIT",
    "NUMBERS_MASK",
    "SAME",
    "SYMBOLIC_BONUS",
    "TEXT_BIT",
    "Choice",
    "Hits",
    "Kernel",
    "Queries",
    "Record",
    "Segment",
    "Sieve",
    "View",
    "Weights",
    "bitmap",
    "build_record",
    "load",
    "quantize",
    "record_codes",
    "record_length",
    "same_names",
    "stride_of",
    "text_overlaps",
    "text_signature",
    "text_signatures",
    "variants",
    "write_row",
    "write_rows",
]


def variants() -> tuple[str, ...]:
    """The instruction-set variants that this machine can run, best first; none without the compiled module."""
    return () if _MISSING else _kernel.variants()


def load(choice: Choice = "auto", *, variant: str | None = None, threads: int = 1) -> Kernel:
    """A kernel.

    Args:
        choice: ``auto`` takes the compiled one where there is one.
        variant: One of ``variants()``, for tests; None takes the best.
        threads: Threads of one scan, the caller's included; the others are started now and end with the kernel.

    Raises:
        ImportError: the compiled kernel was asked for and is not there.
        ValueError: this machine cannot run the variant.
    """
    if threads < 1:
        raise ValueError(f"threads: expected at least 1, got {threads}")
    if choice == "reference" or (choice == "auto" and _MISSING):
        return Kernel(Reference())
    if _MISSING:
        raise ImportError(f"the compiled scoring kernel is not there: {_MISSING}")
    from kimera_stream.kernels.compiled import Compiled

    return Kernel(Compiled(variant, threads))
