"""The verifier's network in C (``kernels.transformer``): no torch, no padding, loaded in a fraction of a second.

The same weights as ``verifier_model`` has; its probabilities differ from float32's by less than 0.01.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from kimera_stream.core.embedding.weights import mapped_table
from kimera_stream.engines.verifier_marks import MARKS
from kimera_stream.engines.verifier_pairs import EncodedPair, encoder_directory
from kimera_stream.infrastructure.compute import ComputePlan
from kimera_stream.kernels.transformer import LayerWeights, Transformer

LAYERS = 6
HEADS = 12
WORDS = "embeddings.word_embeddings.weight"
Weights = Mapping[str, npt.NDArray[np.float32]]


class IntegerNetwork:
    """``Network`` in C.

    Args:
        weights: What ships, by name, float32.
        threads: That carry a batch.

    Raises:
        ValueError: the weights know other marks.
    """

    device = "cpu"

    def __init__(self, weights: Weights, threads: int) -> None:
        self._head = _projection(weights, "head")
        self._classes = _projection(weights, "classes")
        words = mapped_table(encoder_directory() / "model.safetensors", WORDS)
        if len(weights["flags.weight"]) != MARKS:
            raise ValueError(
                f"weights do not fit the model: {len(weights['flags.weight'])} kinds of marks, expected {MARKS}"
            )
        tables = [words, *(weights[f"{name}.weight"] for name in ("positions", "segments", "flags"))]
        self._network = Transformer(
            tables,
            _projection(weights, "norm"),
            [_layer(weights, number) for number in range(LAYERS)],
            heads=HEADS,
            threads=threads,
        )

    @classmethod
    def load(cls, weights: Path, plan: ComputePlan) -> Self:
        """Build the network from its file.

        Raises:
            OSError: a file is missing or unreadable.
            ValueError: the file does not fit the network.
        """
        try:
            found = load_file(weights)
        except SafetensorError as error:
            raise ValueError(f"{weights.name} is not a safetensors file: {error}") from error
        try:
            return cls(
                {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in found.items()}, plan.threads
            )
        except KeyError as missing:
            raise ValueError(f"weights do not fit the model: {missing} is missing") from missing

    def logits(self, pairs: Sequence[EncodedPair]) -> npt.NDArray[np.float32]:
        """Logits (len(pairs), 3)."""
        if not pairs:
            return np.zeros((0, 3), dtype=np.float32)
        lengths = [len(pair.tokens) for pair in pairs]
        ids = [
            np.fromiter((token for pair in pairs for token in pair.tokens), dtype=np.int32),
            np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
            np.fromiter((segment for pair in pairs for segment in pair.segments), dtype=np.int32),
            np.fromiter((flag for pair in pairs for flag in pair.flags), dtype=np.int32),
        ]
        mean, first = self._network.forward(ids, lengths, first=True)
        assert first is not None
        pooled = np.tanh(np.concatenate([first, mean], axis=1) @ self._head[0].T + self._head[1])
        logits: npt.NDArray[np.float32] = pooled @ self._classes[0].T + self._classes[1]
        return logits


def _projection(weights: Weights, name: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    return weights[f"{name}.weight"], weights[f"{name}.bias"]


def _layer(weights: Weights, number: int) -> LayerWeights:
    return LayerWeights(
        attend=_projection(weights, f"layers.{number}.projection"),
        output=_projection(weights, f"layers.{number}.output"),
        attention_norm=_projection(weights, f"layers.{number}.attention_norm"),
        widen=_projection(weights, f"layers.{number}.widen"),
        narrow=_projection(weights, f"layers.{number}.narrow"),
        output_norm=_projection(weights, f"layers.{number}.output_norm"),
    )
