"""The loaded verifier: a network on its device, statements to its input, logits to calibrated probabilities. Synchronous.

Imports torch only where the network needs it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from kimera_stream.engines.verifier_integer import IntegerNetwork
from kimera_stream.engines.verifier_pairs import EncodedPair, PairTokenizer, Statement, plain_digest
from kimera_stream.engines.verifier_text import normal_form
from kimera_stream.infrastructure.compute import (
    DeviceChoice,
    PrecisionChoice,
    limit_memory,
    on_device,
    plan_compute,
    processor_has_bfloat16,
)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Platt scaling of the contradiction margin: ``sigmoid(scale * margin + shift)``."""

    scale: float
    shift: float

    def __call__(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Probability of contradiction from logits of shape (n, 3)."""
        raw = self.scale * margin(logits) + self.shift
        return (1.0 / (1.0 + np.exp(-np.clip(raw, -30.0, 30.0)))).astype(np.float32)


def margin(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Log-odds of contradiction against the rest, shape (n,), from logits of shape (n, 3)."""
    wide = logits.astype(np.float64)
    odds: npt.NDArray[np.float64] = wide[:, 0] - np.logaddexp(wide[:, 1], wide[:, 2])
    return odds


DOUBT = (0.15, 0.25, 0.85, 0.95)
"""Between the two inner probabilities a pair is read in the other order too and the mean of both is its score; towards the outer ones
that second reading counts for less. A third of the pairs of held-out clusters are read twice, fewer of what a feed brings, and of what
is flagged at the same recall about 1.5 % more is right (kept-out writer: precision 0.792 to 0.809 at a recall of 0.80)."""


def twice_read(
    scores: npt.NDArray[np.float32], turned: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float32]]
) -> npt.NDArray[np.float32]:
    """Scores with a second opinion where they are in doubt (see ``DOUBT``), shape (n,).

    Args:
        scores: Probabilities of one order, shape (n,).
        turned: Probabilities of the pairs at the given places in the other order.
    """
    share = 0.5 * np.interp(scores, DOUBT, (0.0, 1.0, 1.0, 0.0))
    doubtful = np.flatnonzero(share)
    if not doubtful.size:
        return scores
    settled = scores.copy()
    settled[doubtful] += share[doubtful] * (turned(doubtful) - scores[doubtful])
    return settled


class Network(Protocol):
    """What computes: encoded pairs to logits."""

    @property
    def device(self) -> str: ...

    def logits(self, pairs: Sequence[EncodedPair]) -> npt.NDArray[np.float32]:
        """Logits over the classes contradiction, entailment, neutral; shape (len(pairs), 3)."""


class VerifierRuntime:
    """A network ready to judge. Not for two threads at once; the caller sees to that.

    Args:
        card: What ``weights/verifier.json`` says: name, calibration, operating points.
    """

    def __init__(
        self,
        network: Network,
        card: Mapping[str, object],
        *,
        precision: str,
        max_length: int = 128,
    ) -> None:
        calibration, points = card["calibration"], card["operating_points"]
        if not isinstance(calibration, dict) or not isinstance(points, dict):
            raise ValueError("the verifier's card: calibration and operating_points must be objects")  # noqa: TRY004
        self.name = str(card["name"])
        self.precision = precision
        self.calibration = Calibration(float(calibration["scale"]), float(calibration["shift"]))
        self.operating_points = {str(name): float(value) for name, value in points.items()}
        self._network = network
        self._tokenizer = PairTokenizer(max_length)

    @classmethod
    def load(
        cls,
        weights: Path | None,
        device: DeviceChoice,
        precision: PrecisionChoice,
        max_length: int,
        batch_size: int,
        memory_fraction: float = 1.0,
    ) -> Self:
        """Build the network from its files.

        Args:
            weights: A ``.safetensors`` file with its ``.json`` beside it; None for the shipped ones.

        Raises:
            OSError: a file is missing or unreadable.
            ValueError: the files do not fit the network.
            UnavailableError: the device or the precision asked for is not there.
            DeviceFailedError: the device fails while the network is put on it, or has no memory for it.
        """
        path = shipped_weights() if weights is None else weights
        card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        plan = plan_compute(device, precision)
        network: Network
        if plan.precision == "int16":
            network = IntegerNetwork.load(path, plan)
        else:
            from kimera_stream.engines.verifier_torch import TorchNetwork  # imports torch, which takes seconds

            with on_device("verifier", plan.device):
                limit_memory(plan.device, memory_fraction)
                network = TorchNetwork.load(path, plan, batch_size)
        return cls(network, card, precision=plan.precision, max_length=max_length)

    @property
    def device(self) -> str:
        return self._network.device

    def judge(self, pairs: Sequence[tuple[str, str]]) -> npt.NDArray[np.float32]:
        """Probability of contradiction per pair, shape (len(pairs),), of both orders where one leaves it in doubt. What is said
        again in the same words has none.

        Raises:
            UnavailableError: the device has no memory even for a single pair.
        """
        read = self._tokenizer.statement_pairs(pairs)
        scores = twice_read(
            self.calibration(self._logits(read)),
            lambda doubtful: self.calibration(self._logits([read[i][::-1] for i in doubtful.tolist()])),
        )
        scores[[first.plain == second.plain for first, second in read]] = 0
        return scores

    def logits(self, pairs: Sequence[tuple[str, str]]) -> npt.NDArray[np.float32]:
        """Raw logits over the classes contradiction, entailment, neutral; shape (len(pairs), 3)."""
        return self._logits(self._tokenizer.statement_pairs(pairs))

    def _logits(self, pairs: Sequence[tuple[Statement, Statement]]) -> npt.NDArray[np.float32]:
        return self._network.logits([self._tokenizer.pair(first, second) for first, second in pairs])


def same_words(one: str, other: str) -> bool:
    """Whether two statements differ in capitals, punctuation at their ends and spelled-out values at most."""
    return plain_digest(normal_form(one)) == plain_digest(normal_form(other))


def shipped_weights() -> Path:
    """Where the package keeps the verifier's weights."""
    return Path(str(resources.files("kimera_stream.engines"))) / "weights" / "verifier.safetensors"


def fast_half(device: str) -> bool:
    """Whether bfloat16 is faster than float32 there."""
    if device == "cuda":
        import torch

        return bool(torch.cuda.is_bf16_supported())
    return processor_has_bfloat16()
