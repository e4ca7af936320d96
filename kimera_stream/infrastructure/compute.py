"""Where tensors are computed: device, precision and threads, decided once from settings and what the machine has.

Nothing here imports torch at module level: its import takes seconds, so it happens in the worker thread that loads a model,
and not at all where the models run in C (``kernels.transformer``).
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import structlog
from threadpoolctl import ThreadpoolController

from kimera_stream.kernels import transformer
from kimera_stream.protocol.errors import UnavailableError

if TYPE_CHECKING:
    import torch

log = structlog.get_logger(__name__)

DeviceChoice = Literal["auto", "cpu", "cuda"]
Precision = Literal["float32", "bfloat16", "int16"]
PrecisionChoice = Literal["auto", "float32", "bfloat16", "int16"]

_CPUINFO = Path("/proc/cpuinfo")
_DEVICES = Path("/dev")
_WSL_DEVICE = Path("/dev/dxg")
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""x86 and ARM names of the instructions that make bfloat16 faster than float32; emulated, it is several times slower."""

PRIMITIVES_KEPT = "64"
"""Compiled operations that torch's CPU library keeps, one per shape of a batch. Its own default is 1,024: 60 batches of
random sizes then added 154 MB to the verifier's memory, with a cache of 16 84 MB."""


def bound_native_caches() -> None:
    """Bound the caches of torch's native libraries; has to be called before torch is imported. The environment wins."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", PRIMITIVES_KEPT)


def use_one_blas_thread() -> None:
    """Let numpy multiply on the calling thread. Our products are small, and its library's threads spin while they wait for each
    other: on a busy machine a product of 1,000 by 64 vectors took 500 ms with two threads and 10 ms with one.

    Only numpy's own library is asked: torch may use another copy of the same one, whose threads pay.
    """
    for library in ThreadpoolController().lib_controllers:
        if library.user_api == "blas" and "numpy" in library.filepath:
            library.set_num_threads(1)


@dataclass(frozen=True, slots=True)
class ComputePlan:
    """What a model is loaded for.

    Attributes:
        device: ``cpu`` or ``cuda``.
        precision: ``float32`` or ``bfloat16``: by torch. ``int16``: in C, on the CPU.
        threads: Threads that one batch may use on the CPU.
    """

    device: Literal["cpu", "cuda"]
    precision: Precision
    threads: int

    @property
    def torch_device(self) -> "torch.device":
        import torch

        return torch.device(self.device)

    @property
    def torch_dtype(self) -> "torch.dtype":
        import torch

        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32


class DeviceFailedError(UnavailableError):
    """The device is at fault, not the model or the request: on another device the same may work."""


@lru_cache(maxsize=1)
def processor_flags() -> frozenset[str]:
    """Instruction-set flags of the first processor; empty where the system does not tell."""
    try:
        text = _CPUINFO.read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def processor_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware."""
    return not _BF16_FLAGS.isdisjoint(processor_flags())


def available_processors() -> int:
    """Processors this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else (os.cpu_count() or 1)


def cuda_possible() -> bool:
    """Whether a look for a CUDA device is worth the import of torch: on Linux a device has a node under ``/dev``."""
    if not sys.platform.startswith("linux"):
        return True
    return _WSL_DEVICE.exists() or next(_DEVICES.glob("nvidia[0-9]*"), None) is not None


def plan_compute(device: DeviceChoice, precision: PrecisionChoice) -> ComputePlan:
    """Decide device and precision. May import torch: call it in a worker thread.

    ``auto`` on the CPU: bfloat16 where the processor multiplies it, else 16-bit integers in C where there is a kernel for
    it, else float32. On CUDA ``int16`` means ``auto``.

    Raises:
        UnavailableError: CUDA, or integers, are asked for and there are none.
        DeviceFailedError: there is a CUDA device, and it cannot be asked what it can do.
    """
    has_cuda = False
    if device == "cuda" or (device == "auto" and cuda_possible()):
        import torch

        has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise UnavailableError(
            "embedding.device: cuda is asked for, but torch sees no CUDA device; set KIMERA_EMBEDDING__DEVICE=auto or cpu"
        )
    if has_cuda:
        with on_device("compute", "cuda"):
            plan = ComputePlan("cuda", _on_cuda(precision), available_processors())
    else:
        plan = ComputePlan("cpu", _on_cpu(precision), available_processors())
    log.debug("compute planned", device=plan.device, precision=plan.precision, threads=plan.threads)
    return plan


def limit_memory(device: str, fraction: float) -> None:
    """Take no more than this share of a CUDA device's memory. Beyond it torch is out of memory, as on a full device."""
    if device == "cuda" and fraction < 1.0:
        import torch

        torch.cuda.set_per_process_memory_fraction(fraction)


@contextmanager
def on_device(what: str, device: str) -> Iterator[None]:
    """A RuntimeError of torch in here is the device's failure; see ``device_failure``.

    Raises:
        DeviceFailedError: the device fails, or has no memory.
    """
    try:
        yield
    except RuntimeError as error:
        raise device_failure(what, device, error) from error


def device_failure(what: str, device: str, error: RuntimeError) -> DeviceFailedError:
    """What a RuntimeError of torch on ``device`` is: on CUDA the device's failure; on the CPU a defect, raised again.

    torch's OutOfMemoryError and AcceleratorError are RuntimeErrors; many failures of the driver have no class of their own.
    """
    if device == "cpu":
        raise error
    lines = str(error).splitlines()
    return DeviceFailedError(
        f"{what}: the device failed ({lines[0] if lines else type(error).__name__})", retry_after=1.0
    )


def _on_cuda(precision: PrecisionChoice) -> Precision:
    if precision in ("auto", "int16"):
        import torch

        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return "bfloat16" if precision == "bfloat16" else "float32"


def _on_cpu(precision: PrecisionChoice) -> Precision:
    if precision == "auto":
        if processor_has_bfloat16():
            return "bfloat16"
        return "int16" if transformer.variants() else "float32"
    if precision == "int16" and not transformer.variants():
        raise UnavailableError(
            "embedding.precision: int16 is asked for, but the kernels were built without it, or this processor has no "
            "AVX2; set KIMERA_EMBEDDING__PRECISION=auto or float32"
        )
    return precision
