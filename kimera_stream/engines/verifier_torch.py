"""The verifier's network run by torch: on CUDA, and on processors that multiply bfloat16 or have no integer kernel."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import structlog
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kimera_stream.engines.verifier_model import CrossEncoder, collate, load_encoder, load_trained
from kimera_stream.engines.verifier_pairs import EncodedPair
from kimera_stream.infrastructure.compute import ComputePlan, device_failure
from kimera_stream.protocol.errors import UnavailableError

log = structlog.get_logger(__name__)


class TorchNetwork:
    """``Network`` by torch.

    Args:
        model: Weights loaded, on its device.
        batch_size: Pairs that the network reads at once at most.
    """

    def __init__(self, model: CrossEncoder, batch_size: int) -> None:
        self._model = model.eval()
        self._batch_size = batch_size

    @classmethod
    def load(cls, weights: Path, plan: ComputePlan, batch_size: int) -> Self:
        """Build the network from its file.

        Raises:
            OSError: a file is missing or unreadable.
            ValueError: the file does not fit the network.
        """
        model = CrossEncoder()
        load_encoder(model, words_only=True)
        try:
            load_trained(model, load_file(weights))
        except SafetensorError as error:
            raise ValueError(f"{weights.name} is not a safetensors file: {error}") from error
        model.to(plan.device).requires_grad_(False)
        if plan.precision == "bfloat16":
            model.halve()
        if plan.device == "cpu":
            torch.set_num_threads(plan.threads)
        return cls(model, batch_size)

    @property
    def device(self) -> str:
        return next(self._model.parameters()).device.type

    @torch.inference_mode()
    def logits(self, pairs: Sequence[EncodedPair]) -> npt.NDArray[np.float32]:
        """Logits (len(pairs), 3). Out of memory, a batch is halved until it fits, and so are those after it.

        Raises:
            UnavailableError: the device has no memory even for a single pair.
        """
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].tokens))
        logits = np.zeros((len(pairs), 3), dtype=np.float32)
        start, size = 0, self._batch_size
        while start < len(order):
            chosen = order[start : start + size]
            try:
                logits[chosen] = self.forward([pairs[i] for i in chosen]).cpu().numpy()
            except torch.OutOfMemoryError as error:
                if size == 1:
                    raise UnavailableError("verifier: the device has no memory for a single pair") from error
                size = max(1, size // 2)
                torch.cuda.empty_cache()
                log.warning("verifier out of memory, halving the batch", batch=size)
                continue
            except RuntimeError as error:
                raise device_failure("verifier", self.device, error) from error
            start += len(chosen)
        return logits

    def forward(self, pairs: Sequence[EncodedPair]) -> Tensor:
        """One batch, padded to its longest pair."""
        result: Tensor = self._model(*collate(pairs, self.device))
        return result.float()
