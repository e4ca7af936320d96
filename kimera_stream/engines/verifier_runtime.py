"""The loaded verifier: weights on a device, batches sorted by length, logits to calibrated probabilities. Synchronous."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import structlog
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kimera_stream.engines.verifier_model import (
    CrossEncoder,
    EncodedPair,
    PairTokenizer,
    collate,
    load_encoder,
    load_trained,
)
from kimera_stream.protocol.errors import UnavailableError

log = structlog.get_logger(__name__)

CPU_FLAGS = Path("/proc/cpuinfo")


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


class VerifierRuntime:
    """A model ready to judge. Not for two threads at once; the caller sees to that.

    Args:
        model: Weights loaded, on its device.
        card: What ``weights/verifier.json`` says: name, calibration, operating points.
    """

    def __init__(
        self,
        model: CrossEncoder,
        card: Mapping[str, object],
        *,
        max_length: int,
        batch_size: int,
        both_directions: bool,
    ) -> None:
        calibration, points = card["calibration"], card["operating_points"]
        if not isinstance(calibration, dict) or not isinstance(points, dict):
            raise ValueError("the verifier's card: calibration and operating_points must be objects")  # noqa: TRY004
        self.name = str(card["name"])
        self.calibration = Calibration(float(calibration["scale"]), float(calibration["shift"]))
        self.operating_points = {str(name): float(value) for name, value in points.items()}
        self._model = model.eval()
        self._batch_size = batch_size
        self._both = both_directions
        self._tokenizer = PairTokenizer(max_length)

    @classmethod
    def load(
        cls,
        weights: Path | None,
        device: str,
        precision: str,
        max_length: int,
        batch_size: int,
        both_directions: bool,
    ) -> Self:
        """Build the model from its files.

        Args:
            weights: A ``.safetensors`` file with its ``.json`` beside it; None for the shipped ones.

        Raises:
            OSError: a file is missing or unreadable.
            ValueError: the files do not fit the network, or the device is not there.
        """
        path = shipped_weights() if weights is None else weights
        card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        elif device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: cuda asked for, but torch sees no CUDA device")
        model = CrossEncoder()
        load_encoder(model, words_only=True)
        try:
            load_trained(model, load_file(path))
        except SafetensorError as error:
            raise ValueError(f"{path.name} is not a safetensors file: {error}") from error
        model.to(device).requires_grad_(False)
        if precision == "bfloat16" or (precision == "auto" and fast_half(device)):
            model.halve()
        return cls(model, card, max_length=max_length, batch_size=batch_size, both_directions=both_directions)

    @property
    def device(self) -> str:
        return next(self._model.parameters()).device.type

    def judge(self, pairs: Sequence[tuple[str, str]]) -> npt.NDArray[np.float32]:
        """Probability of contradiction per pair, shape (len(pairs),).

        Raises:
            UnavailableError: the device has no memory even for a single pair.
        """
        scores = self.calibration(self.logits(pairs))
        if self._both:
            turned = self.calibration(self.logits([(second, first) for first, second in pairs]))
            scores = (scores + turned) / np.float32(2)
        return scores

    @torch.inference_mode()
    def logits(self, pairs: Sequence[tuple[str, str]]) -> npt.NDArray[np.float32]:
        """Raw logits over the classes contradiction, entailment, neutral; shape (len(pairs), 3)."""
        encoded = self._tokenizer.pairs(pairs)
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].tokens))
        logits = np.zeros((len(encoded), 3), dtype=np.float32)
        start, size = 0, self._batch_size
        while start < len(order):
            chosen = order[start : start + size]
            try:
                logits[chosen] = self._forward([encoded[i] for i in chosen]).cpu().numpy()
            except torch.OutOfMemoryError as error:
                if size == 1:
                    raise UnavailableError("verifier: the device has no memory for a single pair") from error
                size = max(1, size // 2)
                torch.cuda.empty_cache()
                log.warning("verifier out of memory, halving the batch", batch=size)
                continue
            start += len(chosen)
        return logits

    def _forward(self, encoded: Sequence[EncodedPair]) -> Tensor:
        result: Tensor = self._model(*collate(encoded, self.device))
        return result.float()


def shipped_weights() -> Path:
    """Where the package keeps the verifier's weights."""
    return Path(str(resources.files("kimera_stream.engines"))) / "weights" / "verifier.safetensors"


def fast_half(device: str) -> bool:
    """Whether bfloat16 is faster than float32 there."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    try:
        flags = CPU_FLAGS.read_text(encoding="ascii", errors="ignore")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
