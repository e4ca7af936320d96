"""The network behind the verifier in torch: MiniLM's layers fine-tuned to read two statements. Trained, and run on CUDA.

Only what was trained ships with the package (``weights/verifier.safetensors``, half precision): six transformer layers, the
position and segment embeddings and the head. The word embeddings stay those of the packaged encoder and are read from there.
How pairs become its input is in ``verifier_pairs``; the same network in C, for the CPU, in ``verifier_integer``.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from kimera_stream.engines.verifier_marks import MARKS
from kimera_stream.engines.verifier_pairs import (
    CLS,
    PAD,
    POSITIONS,
    SEP,
    EncodedPair,
    PairTokenizer,
    Statement,
    encoder_directory,
)

__all__ = [
    "CLASSES",
    "CLS",
    "PAD",
    "POSITIONS",
    "SEP",
    "CrossEncoder",
    "EncodedPair",
    "PairTokenizer",
    "Statement",
    "collate",
    "encoder_directory",
    "load_encoder",
    "load_trained",
    "trained_state",
]

LAYERS = 6
WIDTH = 384
HEADS = 12
INNER = 1536
CLASSES = ("contradiction", "entailment", "neutral")


class Layer(nn.Module):
    """One post-norm transformer layer, (n, t, WIDTH) -> (n, t, WIDTH)."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.projection = nn.Linear(WIDTH, 3 * WIDTH)
        self.output = nn.Linear(WIDTH, WIDTH)
        self.attention_norm = nn.LayerNorm(WIDTH, eps=1e-12)
        self.widen = nn.Linear(WIDTH, INNER)
        self.narrow = nn.Linear(INNER, WIDTH)
        self.output_norm = nn.LayerNorm(WIDTH, eps=1e-12)
        self.dropout = dropout

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        rows, length, _ = hidden.shape
        kind = self.projection.weight.dtype  # bfloat16 weights: multiply in bfloat16, add and normalise in float32
        query, key, value = (
            self.projection(hidden.to(kind))
            .view(rows, length, 3, HEADS, WIDTH // HEADS)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        drop = self.dropout if self.training else 0.0
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=drop)
        attended = self.output(attended.transpose(1, 2).reshape(rows, length, WIDTH))
        hidden = self.attention_norm(hidden + functional.dropout(attended, drop, self.training))
        inner = self.narrow(functional.gelu(self.widen(hidden.to(kind))))
        normed: Tensor = self.output_norm(hidden + functional.dropout(inner, drop, self.training))
        return normed


class CrossEncoder(nn.Module):
    """Pairs of statements to logits over ``CLASSES``."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.words = nn.Embedding(30_522, WIDTH)
        self.words.weight.requires_grad_(False)
        self.positions = nn.Embedding(POSITIONS, WIDTH)
        self.segments = nn.Embedding(2, WIDTH)
        self.flags = nn.Embedding(MARKS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, eps=1e-12)
        self.layers = nn.ModuleList(Layer(dropout) for _ in range(LAYERS))
        self.head = nn.Linear(2 * WIDTH, WIDTH)
        self.classes = nn.Linear(WIDTH, len(CLASSES))
        self.dropout = dropout

    def halve(self) -> None:
        """Keep the layers' matrices in bfloat16, for inference; sums, norms and the head stay in float32."""
        for layer in self.layers:
            for part in layer.children():
                if isinstance(part, nn.Linear):
                    part.to(torch.bfloat16)

    def forward(self, tokens: Tensor, segments: Tensor, flags: Tensor) -> Tensor:
        """Logits, shape (n, 3); the inputs are integers of shape (n, t), padded with ``PAD``."""
        present = tokens != PAD
        hidden = (
            self.words(tokens) + self.positions.weight[: tokens.shape[1]] + self.segments(segments) + self.flags(flags)
        )
        hidden = functional.dropout(self.norm(hidden), self.dropout, self.training)
        mask = present[:, None, None, :]
        for layer in self.layers:
            hidden = layer(hidden, mask)
        weights = present.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weights).sum(1) / weights.sum(1)
        pooled = torch.cat([hidden[:, 0], mean], dim=-1)
        pooled = functional.dropout(torch.tanh(self.head(pooled)), self.dropout, self.training)
        logits: Tensor = self.classes(pooled)
        return logits


def load_encoder(model: CrossEncoder, *, words_only: bool) -> None:
    """Fill ``model`` with the packaged encoder's word embeddings, or (``words_only=False``) with all its layers."""
    with safe_open(encoder_directory() / "model.safetensors", framework="pt") as file:
        get = file.get_tensor
        state = {"words.weight": get("embeddings.word_embeddings.weight")}
        if not words_only:
            state["positions.weight"] = get("embeddings.position_embeddings.weight")
            state["segments.weight"] = get("embeddings.token_type_embeddings.weight")
            state["flags.weight"] = torch.zeros(MARKS, WIDTH)
            for kind in ("weight", "bias"):
                state[f"norm.{kind}"] = get(f"embeddings.LayerNorm.{kind}")
                for i in range(LAYERS):
                    old, new = f"encoder.layer.{i}", f"layers.{i}"
                    parts = [get(f"{old}.attention.self.{part}.{kind}") for part in ("query", "key", "value")]
                    state[f"{new}.projection.{kind}"] = torch.cat(parts)
                    state[f"{new}.output.{kind}"] = get(f"{old}.attention.output.dense.{kind}")
                    state[f"{new}.attention_norm.{kind}"] = get(f"{old}.attention.output.LayerNorm.{kind}")
                    state[f"{new}.widen.{kind}"] = get(f"{old}.intermediate.dense.{kind}")
                    state[f"{new}.narrow.{kind}"] = get(f"{old}.output.dense.{kind}")
                    state[f"{new}.output_norm.{kind}"] = get(f"{old}.output.LayerNorm.{kind}")
    model.load_state_dict(state, strict=False)


def trained_state(model: CrossEncoder) -> dict[str, Tensor]:
    """What ships: everything but the frozen word embeddings."""
    return {name: value for name, value in model.state_dict().items() if name != "words.weight"}


def load_trained(model: CrossEncoder, state: Mapping[str, Tensor]) -> None:
    """Put shipped weights over a model that has its word embeddings.

    Raises:
        ValueError: a weight is missing, unknown or of the wrong shape.
    """
    expected = {name: value.shape for name, value in trained_state(model).items()}
    given = {name: value.shape for name, value in state.items()}
    if expected != given:
        wrong = sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
        raise ValueError(f"weights do not fit the model: {', '.join(wrong[:5])}")
    model.load_state_dict({name: value.float() for name, value in state.items()}, strict=False)


def collate(pairs: Sequence[EncodedPair], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Pad pairs to one length: tokens, segments, flags, each int64 of shape (n, longest)."""
    longest = max(len(pair.tokens) for pair in pairs)
    block: npt.NDArray[np.int64] = np.zeros((3, len(pairs), longest), dtype=np.int64)
    for row, pair in enumerate(pairs):
        size = len(pair.tokens)
        block[0, row, :size] = pair.tokens
        block[1, row, :size] = pair.segments
        block[2, row, :size] = pair.flags
    tensor = torch.from_numpy(block)
    if torch.device(device).type == "cuda":
        # The copy is queued behind the batch that runs, from memory that the device reads by itself: nothing waits for it here.
        tensor = tensor.pin_memory()
    tensor = tensor.to(device, non_blocking=True)
    return tensor[0], tensor[1], tensor[2]
