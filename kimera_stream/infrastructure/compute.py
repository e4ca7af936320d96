"""Where tensors are computed: device, precision and threads, decided once from settings and what the machine has.

Nothing here imports torch at module level: its import takes seconds, so it happens in the worker thread that loads a model.
"""

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import structlog

from kimera_stream.protocol.errors import UnavailableError

if TYPE_CHECKING:
    import torch

log = structlog.get_logger(__name__)

DeviceChoice = Literal["auto", "cpu", "cuda"]
PrecisionChoice = Literal["auto", "float32", "bfloat16"]

_CPUINFO = Path("/proc/cpuinfo")
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""x86 and ARM names of the instructions that make bfloat16 faster than float32; emulated, it is several times slower."""

PRIMITIVES_KEPT = "64"
"""Compiled operations that torch's CPU library keeps, one per shape of a batch. Its own default is 1,024: 60 batches of
random sizes then added 154 MB to the verifier's memory, with a cache of 16 84 MB."""


def bound_native_caches() -> None:
    """Bound the caches of torch's native libraries; has to be called before torch is imported. The environment wins."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", PRIMITIVES_KEPT)


@dataclass(frozen=True, slots=True)
class ComputePlan:
    """What a model is loaded for.

    Attributes:
        device: ``cpu`` or ``cuda``.
        precision: ``float32`` or ``bfloat16``.
        threads: Threads torch may use inside one operation on the CPU.
    """

    device: Literal["cpu", "cuda"]
    precision: Literal["float32", "bfloat16"]
    threads: int

    @property
    def torch_device(self) -> "torch.device":
        import torch

        return torch.device(self.device)

    @property
    def torch_dtype(self) -> "torch.dtype":
        import torch

        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32


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


def plan_compute(device: DeviceChoice, precision: PrecisionChoice) -> ComputePlan:
    """Decide device and precision. Imports torch: call it in a worker thread.

    Raises:
        UnavailableError: CUDA is asked for and there is none.
    """
    import torch

    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise UnavailableError(
            "embedding.device: cuda is asked for, but torch sees no CUDA device; set KIMERA_EMBEDDING__DEVICE=auto or cpu"
        )
    chosen: Literal["cpu", "cuda"] = "cuda" if has_cuda and device != "cpu" else "cpu"
    if precision == "auto":
        fast = torch.cuda.is_bf16_supported() if chosen == "cuda" else processor_has_bfloat16()
        resolved: Literal["float32", "bfloat16"] = "bfloat16" if fast else "float32"
    else:
        resolved = precision
    plan = ComputePlan(chosen, resolved, available_processors())
    log.debug("compute planned", device=plan.device, precision=plan.precision, threads=plan.threads)
    return plan
