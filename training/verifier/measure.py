"""How good a verifier is: ranking, decisions and honesty of its probabilities, per set and per phenomenon."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from training.verifier.clusters import KEPT_OUT, Cluster, anchor_examples, turned
from training.verifier.examples import CONTRADICTION, Example
from training.verifier.generators import generated_clusters
from training.verifier.public import MEASURING, public_examples, read_public

Scores = npt.NDArray[np.float64]
Truth = npt.NDArray[np.bool_]
FALSE_ALARMS = 0.1
"""Most that the balanced point may cost a reader, per statement published."""
AS_GOOD = 0.005
"""F-scores nearer than that are not told apart by the development stories: their standard error is twice as much."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one set: contradiction against the rest. ``auc`` is NaN where only one side occurs."""

    pairs: int
    contradictions: int
    auc: float
    precision: float
    recall: float
    f1: float
    ece: float


def roc_auc(truth: Truth, scores: Scores) -> float:
    """Probability that a contradiction scores above something else, ties counted half."""
    positive, negative = int(truth.sum()), int((~truth).sum())
    if not positive or not negative:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[truth].sum() - positive * (positive + 1) / 2) / (positive * negative))


def calibration_error(truth: Truth, scores: Scores, bins: int = 10) -> float:
    """Expected calibration error over bins of equal width."""
    which = np.minimum((scores * bins).astype(int), bins - 1)
    error = 0.0
    for b in range(bins):
        inside = which == b
        if inside.any():
            error += inside.mean() * abs(scores[inside].mean() - truth[inside].mean())
    return float(error)


def reliability(truth: Truth, scores: Scores, bins: int = 10) -> list[tuple[int, float, float]]:
    """Per bin of equal width: pairs, mean score, share of contradictions."""
    which = np.minimum((scores * bins).astype(int), bins - 1)
    return [
        (int(inside.sum()), float(scores[inside].mean()), float(truth[inside].mean()))
        for inside in (which == b for b in range(bins))
        if inside.any()
    ]


def decide(truth: Truth, scores: Scores, threshold: float) -> tuple[float, float, float]:
    """Precision, recall and F1 of "score at or above ``threshold``"."""
    flagged = scores >= threshold
    hits = float((flagged & truth).sum())
    precision = hits / max(1.0, float(flagged.sum()))
    recall = hits / max(1.0, float(truth.sum()))
    return precision, recall, 2 * precision * recall / max(1e-9, precision + recall)


def figures(examples: Sequence[Example], scores: Scores, threshold: float) -> Figures:
    """All figures of one set."""
    truth = np.array([e.label == CONTRADICTION for e in examples])
    precision, recall, f1 = decide(truth, scores, threshold)
    return Figures(
        len(examples), int(truth.sum()), roc_auc(truth, scores), precision, recall, f1, calibration_error(truth, scores)
    )


def flagged_by_kind(examples: Sequence[Example], scores: Scores, threshold: float) -> dict[str, dict[str, float]]:
    """Per "contradiction/<kind>" or "other/<kind>": pairs, and the share that is flagged at ``threshold``."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for example, score in zip(examples, scores, strict=True):
        side = "contradiction" if example.label == CONTRADICTION else "other"
        groups[f"{side}/{example.kind}"].append(bool(score >= threshold))
    return {
        name: {"pairs": len(flags), "flagged": round(sum(flags) / len(flags), 4)}
        for name, flags in sorted(groups.items())
    }


def operating_points(truth: Truth, scores: Scores, statements: int | None = None) -> dict[str, float]:
    """Thresholds by what a reader wants, found on pairs kept out of training.

    precise: the lowest score with 92 % precision. balanced: best F-score with precision counted twice as much as recall,
    for a false alarm costs the reader's trust; of scores that are as good but for ``AS_GOOD`` the highest, which alarms least. Only scores
    with at most ``FALSE_ALARMS`` per statement count, where the pairs are those of ``statements`` published ones. sensitive: the highest score that still finds 93 %.
    """
    grid = np.arange(0.02, 0.99, 0.01)
    results = [(float(t), *decide(truth, scores, float(t))) for t in grid]
    most = np.inf if statements is None else FALSE_ALARMS * statements
    quiet = [r for r in results if ((scores >= r[0]) & ~truth).sum() <= most] or results[-1:]

    def worth(precision: float, recall: float) -> float:
        return 1.5 * precision * recall / max(1e-9, 0.5 * precision + recall)

    best = max(worth(p, r) for _, p, r, _ in quiet)
    balanced = max(t for t, p, r, _ in quiet if worth(p, r) >= best - AS_GOOD)
    precise = min((r[0] for r in results if r[1] >= 0.92 and r[0] >= balanced), default=max(balanced, 0.9))
    sensitive = max((r[0] for r in results if r[2] >= 0.93 and r[0] <= balanced), default=min(balanced, 0.1))
    return {"precise": round(precise, 2), "balanced": round(balanced, 2), "sensitive": round(sensitive, 2)}


def fit_calibration(truth: Truth, margins: Scores, steps: int = 60) -> tuple[float, float]:
    """Platt scaling by Newton's method: the ``scale`` and ``shift`` of ``sigmoid(scale * margin + shift)``."""
    # Platt's smoothed targets keep a perfectly separable sample from asking for an infinite scale.
    positive, negative = truth.sum(), (~truth).sum()
    target = np.where(truth, (positive + 1) / (positive + 2), 1 / (negative + 2))
    design = np.stack([margins, np.ones_like(margins)], axis=1)
    weights = np.array([1.0, 0.0])
    for _ in range(steps):
        p = 1 / (1 + np.exp(-np.clip(design @ weights, -30, 30)))
        gradient = design.T @ (p - target)
        hessian = (design * (p * (1 - p))[:, None]).T @ design + 1e-6 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        weights = weights - step
        if np.abs(step).max() < 1e-9:
            break
    return float(weights[0]), float(weights[1])


def measuring_sets(data: Path, clusters: Sequence[Cluster], seed: int, *, most: int = 800) -> dict[str, list[Example]]:
    """What no training has seen: test clusters, test vocabulary, test parts of public sets, and the measure-only sets."""
    held = [cluster for cluster in clusters if cluster.split == "test"]
    sets: dict[str, list[Example]] = defaultdict(list)
    sets["corpus"] = anchor_examples([cluster for cluster in held if cluster.source not in KEPT_OUT])
    sets["kept out"] = anchor_examples([cluster for cluster in held if cluster.source in KEPT_OUT])
    sets["corpus, turned"] = [turned(example) for example in sets["corpus"]]
    sets["generated"] = anchor_examples(generated_clusters("test", seed, share=0.12))
    for example in public_examples(data, "test", seed):
        sets[example.source].append(example)
    for name in MEASURING:
        sets[name] = list(read_public(data, name))
    rng = random.Random(f"{seed}:measure")
    return {
        name: rng.sample(rows, most)
        if len(rows) > most and not name.startswith(("corpus", "kept out", "generated"))
        else rows
        for name, rows in sets.items()
    }


def as_dict(result: Figures) -> dict[str, float | None]:
    """Figures rounded for a report; None for what is not a number, which JSON does not know."""
    return {name: None if np.isnan(value) else round(value, 4) for name, value in asdict(result).items()}
