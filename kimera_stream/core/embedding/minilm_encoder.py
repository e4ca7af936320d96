"""The model behind ``MiniLmProvider``. Imports torch: only a worker thread that loads the model imports this module.

sentence-transformers pads a batch to its longest text and carries a mask through every layer. Here the tokens of all texts
of a batch lie behind each other in one matrix: every projection runs on exactly the tokens there are, and only attention
looks at texts, those of equal length together. The numbers are the same (cosine to float32 at least 0.999 in bfloat16).
"""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt
import structlog
import tokenizers
import torch
from safetensors.torch import load_file

from kimera_stream.core.interfaces import Matrix
from kimera_stream.infrastructure.batches import in_batches, lane_on
from kimera_stream.infrastructure.compute import ComputePlan

log = structlog.get_logger(__name__)

DIMENSION = 384
LAYERS = 6
HEADS = 12
MAX_TOKENS = 256
"""As the model was trained (sentence_bert_config.json); a longer text is cut."""
_EPSILON = 1e-12


class MiniLmEncoder:
    """The model itself; blocking. Not for concurrent use.

    Args:
        path: Folder of weights and tokenizer.
        plan: Device and precision.
        batch_size: Texts per pass.
    """

    def __init__(self, path: Path, plan: ComputePlan, batch_size: int = 32) -> None:
        self.plan = plan
        self._batch_size = batch_size
        self._dtype = plan.torch_dtype
        self._device = plan.torch_device
        self._tokenizer: tokenizers.Tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        self._tokenizer.enable_truncation(MAX_TOKENS)
        self._tokenizer.no_padding()
        weights = load_file(str(path / "model.safetensors"))
        self._words = weights["embeddings.word_embeddings.weight"].to(self._device)
        self._places = (
            weights["embeddings.position_embeddings.weight"] + weights["embeddings.token_type_embeddings.weight"][0]
        ).to(self._device)
        self._norm = _norm(weights, "embeddings.LayerNorm", self._device, torch.float32)
        self._layers = [_Layer(weights, number, plan) for number in range(LAYERS)]
        self._lane = lane_on(plan.device)

    def encode(self, texts: Sequence[str]) -> Matrix:
        """One unit row per text, in order; shape (n, 384), float32. Out of memory, a batch is halved until it fits.

        Raises:
            UnavailableError: the device fails, or has no memory for a single text.
        """
        return self.encode_counted(texts)[0]

    def encode_counted(self, texts: Sequence[str]) -> tuple[Matrix, list[int]]:
        """As ``encode``, and the number of tokens of each text."""
        if self.plan.device == "cpu" and torch.get_num_threads() != self.plan.threads:
            torch.set_num_threads(self.plan.threads)
        tokens = [np.asarray(each.ids, dtype=np.int64) for each in self._tokenizer.encode_batch(list(texts))]
        order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))
        rows = np.empty((len(texts), DIMENSION), dtype=np.float32)
        with torch.inference_mode():
            batches = in_batches(
                order,
                self._batch_size,
                lambda part: self._forward([tokens[i] for i in part]),
                self._lane,
                what="embedding",
                one="text",
                device=self.plan.device,
            )
            for part, found in batches:
                rows[part] = found
        return rows, [len(each) for each in tokens]

    def _forward(self, tokens: list[npt.NDArray[np.int64]]) -> torch.Tensor:
        """Texts in order of length -> unit rows, on the device."""
        lengths = [len(each) for each in tokens]
        block = torch.from_numpy(np.stack([np.concatenate(tokens), np.concatenate([np.arange(n) for n in lengths])]))
        if self.plan.device == "cuda":
            block = block.pin_memory()
        ids, places = block.to(self._device, non_blocking=True).unbind(0)
        # (first row, texts, length) of each run of equally long texts
        runs: list[tuple[int, int, int]] = []
        first = 0
        for length, group in groupby(lengths):
            count = sum(1 for _ in group)
            runs.append((first, count, length))
            first += count * length
        state = torch.nn.functional.layer_norm(
            self._words[ids] + self._places[places], (DIMENSION,), *self._norm, _EPSILON
        ).to(self._dtype)
        for layer in self._layers:
            state = layer(state, runs)
        means = [
            state[start : start + count * length].view(count, length, DIMENSION).float().mean(dim=1)
            for start, count, length in runs
        ]
        return torch.nn.functional.normalize(torch.cat(means), dim=1)


def _norm(
    weights: dict[str, torch.Tensor], name: str, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    return weights[f"{name}.weight"].to(device, dtype), weights[f"{name}.bias"].to(device, dtype)


class _Linear:
    """A projection; on the CPU in bfloat16 with weights laid out once as oneDNN wants them (about a fifth faster)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, plan: ComputePlan, *, gelu: bool = False) -> None:
        self._gelu = gelu
        self._weight = weight.to(plan.torch_device, plan.torch_dtype).contiguous()
        self._bias = bias.to(plan.torch_device, plan.torch_dtype)
        self._packed: torch.Tensor | None = None
        if plan.device == "cpu" and plan.precision == "bfloat16":
            self._packed = _packed(self._weight)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        if self._packed is not None:
            result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(  # noqa: SLF001 - an operator, so named by torch
                rows, self._packed, self._bias, "gelu" if self._gelu else "none", [], "none" if self._gelu else ""
            )
            return result
        plain = torch.nn.functional.linear(rows, self._weight, self._bias)
        return torch.nn.functional.gelu(plain) if self._gelu else plain


def _packed(weight: torch.Tensor) -> torch.Tensor | None:
    """``weight`` in oneDNN's blocked layout, or None where this torch cannot do it; then the plain operator serves."""
    try:
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 256)  # noqa: SLF001 - as above
        torch.ops.mkldnn._linear_pointwise(  # noqa: SLF001 - as above
            torch.zeros(1, weight.shape[1], dtype=weight.dtype), packed, None, "none", [], ""
        )
    except (AttributeError, RuntimeError) as error:  # no such operator, or not for this processor
        log.debug("weights not packed", error=repr(error))
        return None
    return packed


class _Layer:
    """One transformer layer over packed tokens."""

    def __init__(self, weights: dict[str, torch.Tensor], number: int, plan: ComputePlan) -> None:
        base = f"encoder.layer.{number}"
        parts = [f"{base}.attention.self.{name}" for name in ("query", "key", "value")]
        self._attend = _Linear(
            torch.cat([weights[f"{part}.weight"] for part in parts]),
            torch.cat([weights[f"{part}.bias"] for part in parts]),
            plan,
        )
        self._out = self._linear(weights, f"{base}.attention.output.dense", plan)
        self._up = self._linear(weights, f"{base}.intermediate.dense", plan, gelu=True)
        self._down = self._linear(weights, f"{base}.output.dense", plan)
        self._norms = tuple(
            _norm(weights, f"{base}.{name}", plan.torch_device, plan.torch_dtype)
            for name in ("attention.output.LayerNorm", "output.LayerNorm")
        )

    @staticmethod
    def _linear(weights: dict[str, torch.Tensor], name: str, plan: ComputePlan, *, gelu: bool = False) -> _Linear:
        return _Linear(weights[f"{name}.weight"], weights[f"{name}.bias"], plan, gelu=gelu)

    def __call__(self, state: torch.Tensor, runs: list[tuple[int, int, int]]) -> torch.Tensor:
        projected = self._attend(state)
        context = torch.empty_like(state)
        for start, count, length in runs:
            rows = slice(start, start + count * length)
            query, key, value = (
                projected[rows].view(count, length, 3, HEADS, DIMENSION // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
            )
            attended = torch.nn.functional.scaled_dot_product_attention(query, key, value)
            context[rows] = attended.transpose(1, 2).reshape(count * length, DIMENSION)
        state = torch.nn.functional.layer_norm(state + self._out(context), (DIMENSION,), *self._norms[0], _EPSILON)
        return torch.nn.functional.layer_norm(
            state + self._down(self._up(state)), (DIMENSION,), *self._norms[1], _EPSILON
        )
