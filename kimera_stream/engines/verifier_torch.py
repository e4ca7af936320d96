"""The verifier's network run by torch: on CUDA, and on processors that multiply bfloat16 or have no integer kernel."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kimera_stream.engines.verifier_model import CrossEncoder, collate, load_encoder, load_trained
from kimera_stream.engines.verifier_pairs import EncodedPair
from kimera_stream.infrastructure.batches import in_batches, lane_on
from kimera_stream.infrastructure.compute import ComputePlan


class TorchNetwork:
    """``Network`` by torch.

    Args:
        model: Weights loaded, on its device.
        batch_size: Pairs that the network reads at once at most.
        device: Where the weights are.
    """

    def __init__(self, model: CrossEncoder, batch_size: int, device: str = "cpu") -> None:
        self.device = device
        self._model = model.eval()
        self._batch_size = batch_size
        self._lane = lane_on(device)

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
        return cls(model, batch_size, plan.device)

    @torch.inference_mode()
    def logits(self, pairs: Sequence[EncodedPair]) -> npt.NDArray[np.float32]:
        """Logits (len(pairs), 3). See ``in_batches`` for what happens without memory.

        Raises:
            UnavailableError: the device has no memory even for a single pair.
            DeviceFailedError: the device fails.
        """
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].tokens))
        logits = np.zeros((len(pairs), 3), dtype=np.float32)
        batches = in_batches(
            order,
            self._batch_size,
            lambda part: self.forward([pairs[i] for i in part]),
            self._lane,
            what="verifier",
            one="pair",
            device=self.device,
        )
        for part, rows in batches:
            logits[part] = rows
        return logits

    def forward(self, pairs: Sequence[EncodedPair]) -> Tensor:
        """One batch, padded to its longest pair."""
        result: Tensor = self._model(*collate(pairs, self.device))
        return result.float()
