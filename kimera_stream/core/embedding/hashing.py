"""An encoder without weights: signed feature hashing of words and of the character n-grams inside them.

Related texts share words and word parts, so their cosine is high; it knows no synonyms. Deterministic across processes
and machines: features are hashed by BLAKE2b, never by Python's salted ``hash``.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Final

import numpy as np
import numpy.typing as npt

from kimera_stream.core.interfaces import Matrix, Threads
from kimera_stream.infrastructure.caching import KeptResults

_KEPT_CHARS = 24
"""Length of a word whose features are remembered: at most 0.9 KB each, 29 MB in all."""
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")
_FUNCTION_WORDS = frozenset(
    [
        "a",
        "an",
        "the",
        "of",
        "to",
        "in",
        "on",
        "at",
        "by",
        "for",
        "with",
        "from",
        "as",
        "is",
        "are",
        "was",
        "were",
        "be",
        "been",
        "being",
        "am",
        "do",
        "does",
        "did",
        "has",
        "have",
        "had",
        "it",
        "its",
        "this",
        "that",
        "these",
        "those",
        "there",
        "and",
        "or",
        "but",
        "so",
        "than",
        "then",
        "not",
        "no",
        "will",
        "would",
        "can",
        "could",
        "should",
        "may",
        "might",
        "must",
        "i",
        "you",
        "he",
        "she",
        "we",
        "they",
        "them",
        "his",
        "her",
        "their",
        "our",
        "my",
        "your",
        "me",
        "us",
    ]
)
_FUNCTION_WEIGHT = 0.2
_NGRAM_WEIGHT = 0.35
"""All n-grams of a word together weigh this much against the word itself: enough to tie inflections together."""
_NGRAM_SIZES = (3, 4)
_CHUNK = 256


class HashingProvider:
    """``Provider`` by feature hashing.

    Args:
        dimension: Length of the vectors.
        threads: Larger batches are hashed in a worker thread.
    """

    def __init__(self, dimension: int, threads: Threads | None = None) -> None:
        self._dimension = dimension
        self._threads = threads

    @property
    def model(self) -> str:
        return f"hashing-1-{self._dimension}"

    @property
    def dimension(self) -> int:
        return self._dimension

    @property
    def counts_exactly(self) -> bool:
        return True

    async def start(self) -> None:
        """Nothing to load."""

    async def encode(self, texts: Sequence[str]) -> Matrix:
        """One unit row per text, in order."""
        return (await self.encode_counted(texts))[0]

    async def encode_counted(self, texts: Sequence[str]) -> tuple[Matrix, list[int]]:
        """As ``encode``, and the words of each text that went into its row."""
        if self._threads is None or len(texts) <= 4:
            return self._counted(texts)
        return await self._threads.run("encode", self._counted, texts)

    def encode_now(self, texts: Sequence[str]) -> Matrix:
        """As ``encode``, in the calling thread."""
        return self._counted(texts)[0]

    def _counted(self, texts: Sequence[str]) -> tuple[Matrix, list[int]]:
        rows = np.zeros((len(texts), self._dimension), dtype=np.float32)
        return rows, [self._fill(row, text) for row, text in zip(rows, texts, strict=True)]

    async def close(self) -> None:
        """Nothing to free."""

    def _fill(self, row: npt.NDArray[np.float32], text: str) -> int:
        words = _WORD.findall(text.lower())
        if not words:  # punctuation only: the text as a whole is the one feature
            words = [text.strip() or " "]
        words = words[:2048]
        for word in words:
            indices, weights = _features(word, self._dimension)
            np.add.at(row, indices, weights)
        norm = float(np.linalg.norm(row))
        if norm < 1e-6:  # features that cancel out exactly
            row[int.from_bytes(_digest(text)[:4], "little") % self._dimension] = norm = 1.0
        row /= norm
        return len(words)


def _digest(feature: str) -> bytes:
    return blake2b(feature.encode("utf-8", "replace"), digest_size=8).digest()


def _features(word: str, dimension: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    return _kept_features(word, dimension) if len(word) <= _KEPT_CHARS else _made_features(word, dimension)


@lru_cache(maxsize=32_768)
def _kept_features(word: str, dimension: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    return _made_features(word, dimension)


FEATURES: Final = KeptResults(_kept_features, each=900)
"""What is remembered of words."""


def _made_features(word: str, dimension: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    """Indices and signed weights of one word: itself, and its character n-grams with marked ends."""
    weight = _FUNCTION_WEIGHT if word in _FUNCTION_WORDS else 1.0
    features = [("w:" + word[:64], weight)]
    marked = f"<{word[:64]}>"
    grams = [marked[i : i + size] for size in _NGRAM_SIZES for i in range(len(marked) - size + 1)]
    features += [("g:" + gram, weight * _NGRAM_WEIGHT / len(grams) ** 0.5) for gram in grams]
    indices = np.empty(len(features), dtype=np.intp)
    weights = np.empty(len(features), dtype=np.float32)
    for position, (feature, value) in enumerate(features):
        number = int.from_bytes(_digest(feature), "little")
        indices[position] = (number >> 1) % dimension
        weights[position] = value if number & 1 else -value
    return indices, weights
