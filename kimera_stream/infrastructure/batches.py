"""Batches through a network of torch, one ahead: while the device runs one, the processor prepares the next.

    prepare 1 ─ queue 1 ─ prepare 2 ─ queue 2 ─ wait for 1 ─ prepare 3 ─ queue 3 ─ wait for 2 ─ ...
    device:     └──── runs 1 ────┴──────── runs 2 ────────┴──────── runs 3 ──── ...

On CUDA each network has a stream of its own, so that encoder and verifier, which run in different threads, do not wait for
each other's kernels, and results come back through pinned memory behind an event: waiting for one batch is not waiting for the
next one, which is queued behind it. On the processor a batch is computed when it is queued.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt
import structlog
import torch
from torch import Tensor

from kimera_stream.infrastructure.compute import device_failure
from kimera_stream.protocol.errors import UnavailableError

log = structlog.get_logger(__name__)

Rows = npt.NDArray[np.float32]


class Lane(Protocol):
    """Where batches are queued."""

    def queue(self, work: Callable[[], Tensor]) -> Callable[[], Rows]:
        """Start ``work``; calling what is returned waits for its rows."""


class ProcessorLane:
    """Computes at once."""

    def queue(self, work: Callable[[], Tensor]) -> Callable[[], Rows]:
        rows: Rows = work().numpy()
        return lambda: rows


class CudaLane:
    """A stream of its own. Made after the weights are on the device, in the thread that put them there."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream())

    def queue(self, work: Callable[[], Tensor]) -> Callable[[], Rows]:
        with torch.cuda.stream(self._stream):
            result = work().to("cpu", non_blocking=True)  # into pinned memory, which torch takes for such a copy
            # Blocking: the thread sleeps until then, where it would spin on a processor that the next batch needs.
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record()

        def rows() -> Rows:
            done.synchronize()
            found: Rows = result.numpy()
            return found

        return rows


def lane_on(device: str) -> Lane:
    """The lane of a network whose weights are on ``device``."""
    return CudaLane() if device == "cuda" else ProcessorLane()


def in_batches(
    order: Sequence[int],
    size: int,
    run: Callable[[Sequence[int]], Tensor],
    lane: Lane,
    *,
    what: str,
    one: str,
    device: str,
) -> Iterator[tuple[Sequence[int], Rows]]:
    """Run all of ``order``, ``size`` at a time; yields what was in a batch, and its rows. In order, the next one queued already.

    Out of memory, a batch is halved until it fits, and so are those after it.

    Args:
        run: Queues one batch on the device; (n, ...) float32.
        what, one: For messages: what runs, and what a batch consists of.

    Raises:
        UnavailableError: the device has no memory even for one.
        DeviceFailedError: the device fails.
    """
    start = 0
    ahead: tuple[Sequence[int], Callable[[], Rows]] | None = None
    try:
        while start < len(order):
            part = order[start : start + size]
            try:
                queued = part, lane.queue(partial(run, part))
            except torch.OutOfMemoryError as error:
                if ahead is not None:  # what it holds may be what is missing
                    yield ahead[0], ahead[1]()
                    ahead = None
                    torch.cuda.empty_cache()
                    continue
                if size == 1:
                    raise UnavailableError(f"{what}: the device has no memory for a single {one}") from error
                size = max(1, size // 2)
                torch.cuda.empty_cache()
                log.warning("out of memory, halving the batch", what=what, batch=size)
                continue
            start += len(part)
            if ahead is not None:
                yield ahead[0], ahead[1]()
            ahead = queued
        if ahead is not None:
            yield ahead[0], ahead[1]()
    except RuntimeError as error:
        raise device_failure(what, device, error) from error
