"""The verifier: a cross-encoder that reads two statements together and says how likely it is that they cannot both hold.

``CrossEncoderVerifier`` runs the shipped network (``verifier_model``) in worker threads. Callers that come while a batch
runs are judged together in the next one, so concurrent requests fill batches without waiting on a timer.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import anyio
import numpy as np
import numpy.typing as npt
import structlog

from kimera_stream.core.interfaces import Threads
from kimera_stream.infrastructure.compute import DeviceChoice, DeviceFailedError, PrecisionChoice
from kimera_stream.infrastructure.failover import SECONDS, Failover, WayNumbers
from kimera_stream.protocol.errors import UnavailableError

if TYPE_CHECKING:  # torch may be needed, and is heavy: it is imported in the worker thread that loads the model
    from kimera_stream.engines.verifier_runtime import VerifierRuntime

log = structlog.get_logger(__name__)

MODEL_NAME = "kimera-verifier-6"
"""Name of the shipped weights; ``weights/verifier.json`` says the same."""


@runtime_checkable
class Verifier(Protocol):
    """Judges pairs of statements by reading them side by side."""

    @property
    def name(self) -> str:
        """Name and version of the model, as given in ``Contradiction.model``."""

    async def judge(self, pairs: Sequence[tuple[str, str]]) -> npt.NDArray[np.float32]:
        """Calibrated probability of contradiction per (older, newer) pair, shape (len(pairs),), in [0, 1].

        Raises:
            UnavailableError: the model cannot run at present.
        """


@dataclass(slots=True, eq=False)
class _Request:
    pairs: Sequence[tuple[str, str]]
    result: npt.NDArray[np.float32] | None = None


class CrossEncoderVerifier:
    """The shipped cross-encoder behind ``Verifier``. Loads at ``start`` or at the first pair, in a worker thread.

    Args:
        threads: Runs loading and judging, as purpose ``score``.
        device: ``auto`` takes CUDA when there is one.
        precision: See ``plan_compute``.
        max_length: Tokens of a pair; what exceeds it is cut from the longer statement.
        batch_size: Pairs that the network reads at once at most.
        round_size: Pairs of waiting callers that are judged in one round at most; bounds what one caller can delay others.
        weights: Another ``.safetensors`` with its ``.json`` beside it, instead of the shipped one.
        memory_fraction: Of a CUDA device's memory that may be taken.
        device_pause: Seconds that a device which keeps failing is left alone; the CPU reads meanwhile.
    """

    def __init__(
        self,
        threads: Threads,
        *,
        device: DeviceChoice = "auto",
        precision: PrecisionChoice = "auto",
        max_length: int = 128,
        batch_size: int = 32,
        round_size: int = 512,
        weights: Path | None = None,
        memory_fraction: float = 1.0,
        device_pause: float = SECONDS,
    ) -> None:
        self._threads = threads
        self._device = device
        self._precision = precision
        self._max_length = max_length
        self._batch_size = batch_size
        self._round_size = round_size
        self._weights = weights
        self._memory_fraction = memory_fraction
        self._device_pause = device_pause
        self._started = False
        self._name = MODEL_NAME
        self._operating_points: dict[str, float] = {}
        self._runtimes: dict[str, VerifierRuntime] = {}
        """By device. Nothing else holds one: a network that is made anew needs the memory of the one before it."""
        self._failover: Failover | None = None
        self._loading = anyio.Lock()
        self._running = anyio.Lock()
        self._waiting: deque[_Request] = deque()
        self.judged = 0
        """Pairs judged since the start."""

    @property
    def name(self) -> str:
        return self._name

    @property
    def waiting(self) -> int:
        """Pairs that wait for their round."""
        return sum(len(request.pairs) for request in self._waiting)

    @property
    def operating_points(self) -> dict[str, float]:
        """Thresholds found on held-out pairs, by name (precise, balanced, sensitive); empty before the model is loaded."""
        return dict(self._operating_points)

    async def start(self) -> None:
        """Load the model, once. Where the device fails at it, on the CPU; the device is tried again with the pairs that come.

        Raises:
            UnavailableError: weights or encoder are missing or do not fit.
        """
        async with self._loading:
            if self._started:
                return
            try:
                runtime = await self._make(self._device)
            except DeviceFailedError as error:
                log.warning("the verifier's device fails, the CPU reads", error=error.message)
                self._stand_in_for("cuda")
                runtime = await self._make("cpu")
            else:
                if runtime.device != "cpu":
                    self._stand_in_for(runtime.device)
            self._name, self._operating_points = runtime.name, dict(runtime.operating_points)
            self._started = True

    async def _make(self, device: DeviceChoice) -> "VerifierRuntime":
        runtime = await self._threads.run("score", partial(self._build, device))
        self._runtimes[runtime.device] = runtime
        log.info("verifier loaded", model=runtime.name, device=runtime.device, precision=runtime.precision)
        return runtime

    def _stand_in_for(self, device: str) -> None:
        self._failover = Failover("verifier", [device, "cpu"], seconds=self._device_pause)

    def _build(self, device: DeviceChoice) -> "VerifierRuntime":
        try:
            from kimera_stream.engines.verifier_runtime import VerifierRuntime

            return VerifierRuntime.load(
                self._weights,
                device,
                self._precision,
                self._max_length,
                self._batch_size,
                self._memory_fraction,
            )
        except (OSError, ImportError, ValueError, KeyError) as error:
            raise UnavailableError(
                f"verifier: {error}; reinstall the package or set scoring.verifier to off"
            ) from error

    async def judge(self, pairs: Sequence[tuple[str, str]]) -> npt.NDArray[np.float32]:
        """Calibrated probability of contradiction per (older, newer) pair, shape (len(pairs),), in [0, 1].

        Raises:
            UnavailableError: the model cannot be loaded, or the device refuses.
        """
        if not pairs:
            return np.zeros(0, dtype=np.float32)
        if not self._started:
            await self.start()
        request = _Request(pairs)
        self._waiting.append(request)
        try:
            async with self._running:
                if request.result is None:
                    await self._round(request)
        finally:
            if request.result is None and request in self._waiting:  # cancelled while it waited
                self._waiting.remove(request)
        assert request.result is not None
        return request.result

    async def _round(self, leader: _Request) -> None:
        """Judge the leader's pairs, and those of callers behind it as long as the round has room.

        Only the leader learns of a failure: the others stay in line and try on their own, so that no caller's pairs
        can fail another's.
        """
        self._waiting.remove(leader)
        together = [leader]
        room = self._round_size - len(leader.pairs)
        for request in self._waiting:
            if len(request.pairs) > room:
                break
            room -= len(request.pairs)
            together.append(request)
        everything = [pair for request in together for pair in request.pairs]
        scores = await self._read(everything)
        self.judged += len(everything)
        at = 0
        for request in together:
            request.result = scores[at : at + len(request.pairs)]
            at += len(request.pairs)
            if request is not leader and request in self._waiting:
                self._waiting.remove(request)

    @property
    def devices(self) -> dict[str, WayNumbers]:
        """Health and use of the device and of the CPU that stands in for it; empty where there is only the CPU."""
        return {} if self._failover is None else self._failover.numbers

    async def _read(self, pairs: Sequence[tuple[str, str]]) -> npt.NDArray[np.float32]:
        if self._failover is None:
            return await self._read_on("cpu", pairs)
        device, cpu = self._failover.numbers
        return await self._failover.run(
            partial(self._read_on, device, pairs, self._failover), partial(self._read_on, cpu, pairs)
        )

    async def _read_on(
        self, device: str, pairs: Sequence[tuple[str, str]], failover: Failover | None = None
    ) -> npt.NDArray[np.float32]:
        """By the network on ``device``, which is loaded if it is not there, and once more where the device failed for long."""
        if failover is not None and failover.returning(device):
            self._runtimes.pop(device, None)  # before the new one takes its memory
        runtime = self._runtimes.get(device) or await self._make("cuda" if device == "cuda" else "cpu")
        return await self._threads.run("score", runtime.judge, pairs)


def weights_available() -> bool:
    """Whether this installation carries the verifier's weights; does not import torch."""
    return Path(str(resources.files("kimera_stream.engines")), "weights", "verifier.safetensors").is_file()
