"""A CUDA device that is not there: what we ask torch for on it happens on the processor, is noted, and fails on demand.

What is replaced is what torch itself offers, so that our own code runs as it is. It says nothing about speed, nor about what a
real device does with streams and pinned memory.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from kimera_stream.core import embedding
from kimera_stream.infrastructure import compute


def errors_of_a_device() -> list[RuntimeError]:
    """As torch raises them."""
    return [
        RuntimeError("CUDA error: an illegal memory access was encountered\nmore"),
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 46 MiB"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
    ]


class PretendedCuda:
    """What was asked of the device, and what is wrong with it."""

    def __init__(self) -> None:
        self.broken: RuntimeError | None = None
        """Raised by whatever is moved to the device."""
        self.fractions: list[float] = []
        """Of its memory, as limits were set."""
        self.told: list[str] = []
        """Batches queued, and waited for, by number."""
        self.pinned = 0
        """Tensors put into pinned memory."""
        self.moved = 0
        self.queued = 0


class _Event:
    def __init__(self, cuda: PretendedCuda) -> None:
        self._cuda = cuda
        self._number = 0

    def record(self) -> None:
        self._cuda.queued += 1
        self._number = self._cuda.queued
        self._cuda.told.append(f"queued {self._number}")

    def synchronize(self) -> None:
        self._cuda.told.append(f"waited {self._number}")


class _Stream:
    def wait_stream(self, other: Any) -> None:
        assert other is not self


@pytest.fixture
def pretended_cuda(monkeypatch: pytest.MonkeyPatch) -> PretendedCuda:
    """See the module."""
    cuda = PretendedCuda()
    to: Callable[..., torch.Tensor] = torch.Tensor.to

    def moved(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        there = [torch.device("cpu") if _is_cuda(each) else each for each in args]
        if any(_is_cuda(each) for each in args):
            cuda.moved += 1
            if cuda.broken is not None:
                raise cuda.broken
        return to(tensor, *there, **kwargs)

    def pinned(tensor: torch.Tensor) -> torch.Tensor:
        cuda.pinned += 1
        return tensor

    @contextmanager
    def entered(stream: Any) -> Iterator[None]:
        assert isinstance(stream, _Stream)
        yield

    monkeypatch.setattr(torch.Tensor, "to", moved)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", cuda.fractions.append)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: _Event(cuda))
    monkeypatch.setattr(torch.cuda, "current_stream", _Stream)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    for module in (compute, embedding):
        monkeypatch.setattr(module, "cuda_possible", lambda: True)
    return cuda


def _is_cuda(value: object) -> bool:
    return isinstance(value, (str, torch.device)) and torch.device(value).type == "cuda"
