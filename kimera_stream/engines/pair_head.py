"""The pair head: two layers over the frozen vectors of two statements and what the rules found between them.

It decides provisionally where the verifier has fallen behind or is away: microseconds a pair, no tokens are read. It only knows vectors
of the encoder that it was fitted on. Weights come from ``python -m training.pair_head``.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load

from kimera_stream import kernels
from kimera_stream.engines.evidence import Evidence
from kimera_stream.engines.evidence.findings import FEATURES
from kimera_stream.engines.pairs import Pair
from kimera_stream.kernels import Kernel, same_names, text_overlaps, text_signature, text_signatures

EXTRAS = ("overlap", "named", "rules_log_odds", "rules_plain", "elsewhere", *FEATURES)
"""Features of a pair beside the two vectors: the words shared, whether both name the same numbered thing, and what the rules found."""
MOST_LOG_ODDS = 6.0
"""Bound of the rules' log-odds: they are as good as sure beyond."""
POINTS = ("precise", "balanced", "sensitive")

_SAID = re.compile(r"[^\W_]+")

F32 = npt.NDArray[np.float32]


def extras_of(newer: str, olders: Sequence[str], evidence: Sequence[Evidence]) -> F32:
    """The features ``EXTRAS`` of the pairs of one statement, shape (n, len(EXTRAS)).

    Args:
        newer: Text of the statement.
        olders: Texts that it is compared with.
        evidence: What the rules said of each.
    """
    rows = np.zeros((len(olders), len(EXTRAS)), np.float32)
    rows[:, 0] = text_overlaps(newer, olders)
    rows[:, 1] = same_names(text_signature(newer), text_signatures(olders))
    given = np.clip([each.probability for each in evidence], 1e-6, 1 - 1e-6)
    rows[:, 2] = np.clip(np.log(given / (1 - given)), -MOST_LOG_ODDS, MOST_LOG_ODDS)
    rows[:, 3] = [each.plain for each in evidence]
    rows[:, 4] = [bool(each.elsewhere) for each in evidence]
    rows[:, 5:] = [each.features for each in evidence]
    return rows


class PairHead:
    """The network with its calibration. Every method may be called from any thread.

    Args:
        card: As ``weights/pair_head.json``: name, encoder, extras, calibration, operating points.
        weights: ``w1`` (hidden, 2 dim + extras), ``b1`` and ``w2`` (hidden,), ``b2`` (1,).
        kernel: Computes; None takes the best there is.

    Raises:
        ValueError: the card lacks something, or the weights do not fit it.
    """

    def __init__(
        self, card: Mapping[str, object], weights: Mapping[str, npt.ArrayLike], kernel: Kernel | None = None
    ) -> None:
        if card.get("extras") != list(EXTRAS):
            raise ValueError("it was fitted for other features; run python -m training.pair_head --write")
        points, calibration = card.get("operating_points"), card.get("calibration")
        if not isinstance(points, dict) or not all(0 < float(points.get(name, 0)) < 1 for name in POINTS):
            raise ValueError(f"its card lacks an operating point: {', '.join(POINTS)}, each in (0, 1)")
        if not isinstance(calibration, dict) or not {"scale", "shift"} <= calibration.keys():
            raise ValueError("its card lacks the calibration: scale, shift")
        self.name, self.encoder = str(card["name"]), str(card["encoder"])
        self.operating_points = {name: float(points[name]) for name in POINTS}
        self._scale, self._shift = float(calibration["scale"]), float(calibration["shift"])
        missing = {"w1", "b1", "w2", "b2"} - weights.keys()
        if missing:
            raise ValueError(f"its weights lack {', '.join(sorted(missing))}")
        self._w1, self._b1, self._w2, b2 = (
            np.ascontiguousarray(weights[name], dtype=np.float32) for name in ("w1", "b1", "w2", "b2")
        )
        hidden = len(self._w1)
        fitting = self._w1.ndim == 2 and (self._w1.shape[1] - len(EXTRAS)) % 2 == 0
        if not fitting or self._b1.shape != (hidden,) or self._w2.shape != (hidden,) or b2.shape != (1,):
            raise ValueError("its weights have other shapes than those of a pair head")
        if not all(np.isfinite(each).all() for each in (self._w1, self._b1, self._w2, b2)):
            raise ValueError("its weights are not all finite")
        self._b2 = float(b2[0])
        self.dimension = (self._w1.shape[1] - len(EXTRAS)) // 2
        self._kernel = kernels.load() if kernel is None else kernel

    @classmethod
    def load(cls, path: Path | None = None) -> Self:
        """The head of a ``.safetensors`` file with its ``.json`` beside it; None: the shipped one.

        Raises:
            OSError: a file is missing or unreadable.
            ValueError: a file is damaged, or they do not fit each other or this version; the message names the file.
        """
        path = shipped_head() if path is None else path
        try:
            card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            return cls(card, _checked(card, path.read_bytes()))
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"pair head {path.name}: {error}; reinstall the package") from error

    def fits(self, pair: Pair) -> bool:
        """Whether it can judge a pair: both have vectors of its encoder, and the rules have read their texts.

        A vector that a client brought along may be of any model. Of a statement that is read back it is not known who made its
        vector; it is taken for the encoder's, as the index takes it.
        """
        return pair.evidence is not None and all(
            each.vector is not None and len(each.vector) == self.dimension and not each.own_vector
            for each in (pair.older, pair.newer)
        )

    def judge(self, pairs: Sequence[Pair]) -> list[float]:
        """Calibrated probability of contradiction per pair, each of which it ``fits``; 0 of what is said again. One call of the
        kernel per newer statement."""
        found = [0.0] * len(pairs)
        groups: dict[int, list[int]] = {}
        for place, pair in enumerate(pairs):
            groups.setdefault(id(pair.newer), []).append(place)
        for places in groups.values():
            group = [pairs[place] for place in places]
            query = np.ascontiguousarray(group[0].newer.vector, dtype=np.float32)
            rows = np.array([pair.older.vector for pair in group], np.float32)
            texts = [pair.older.geoid.text or "" for pair in group]
            evidence = [pair.evidence for pair in group if pair.evidence is not None]
            extra = extras_of(group[0].newer.geoid.text or "", texts, evidence)
            for place, probability in zip(places, self.probabilities(query, rows, extra).tolist(), strict=True):
                found[place] = 0.0 if said_again(pairs[place]) else probability
        return found

    def probabilities(self, query: F32, rows: F32, extra: F32) -> npt.NDArray[np.float64]:
        """Of the pairs (query, row i), shape (n,). ``query`` (dim,), ``rows`` (n, dim), ``extra`` (n, len(EXTRAS))."""
        logits = self._kernel.pair_head(query, rows, extra, self._w1, self._b1, self._w2, self._b2)
        raw = self._scale * logits.astype(np.float64) + self._shift
        calibrated: npt.NDArray[np.float64] = 1.0 / (1.0 + np.exp(-np.clip(raw, -30.0, 30.0)))
        return calibrated


def said_again(pair: Pair) -> bool:
    """Whether both say the same words and numbers in the same order. The network has learnt this from rewordings alone, and is less sure."""
    older, newer = (_SAID.findall((each.geoid.text or "").casefold()) for each in (pair.older, pair.newer))
    return older == newer


def _checked(card: Mapping[str, object], raw: bytes) -> Mapping[str, F32]:
    if card["digest"] != digest_of(raw):
        raise ValueError("its weights are not those that its card is of: a file is damaged")
    return load(raw)


def digest_of(raw: bytes) -> str:
    """Of a file of weights, as its card gives it."""
    return hashlib.blake2b(raw, digest_size=16).hexdigest()


def shipped_head() -> Path:
    """Where the package keeps the pair head's weights."""
    return Path(str(resources.files("kimera_stream.engines"))) / "weights" / "pair_head.safetensors"
