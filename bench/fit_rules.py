"""Fit the evidence rules' weights: ``python -m bench.fit_rules --data ../shared/data [--write]``.

Features of pairs (``engines/evidence``) and the encoder's cosine go into a logistic regression over the features, their
squares where it helps, and a two-layer network; whichever is better on clusters kept aside is exported. Split by cluster, as the
verifier's training splits them, so that one set is unseen by both.
"""

import argparse
import gzip
import hashlib
import json
from pathlib import Path

import numpy as np

from kimera_stream.core.embedding.minilm import load_encoder
from kimera_stream.engines.evidence.findings import FEATURES, compare
from kimera_stream.engines.evidence.reading import read
from kimera_stream.infrastructure.compute import plan_compute
from training.verifier.examples import split_of

CORPUS = ("ops", "policy", "memory", "news", "products", "science", "business", "language")
PAIRS = {"snli_dev": 3000, "mnli_train": 3000, "cad_train": 3000, "conjnli_train": 1500, "breaking_nli_part": 1500}
DEV = {"mnli_dev_part": 1500, "cad_dev": 1000, "conjnli_dev": 623}


def rows(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def bucket(text: str) -> float:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little") / 2**32


def load(data: Path) -> list[tuple[str, str, int, str, str, bool]]:
    """(a, b, contradiction, set, kind, held out)."""
    pairs = []
    for name in CORPUS:
        for cluster in rows(data / "corpus" / f"{name}.jsonl.gz"):
            held = split_of(cluster["anchor"]) != "train"
            for item in cluster["items"]:
                label = int(item["label"] == "contradiction")
                one, other = cluster["anchor"], item["text"]
                if bucket(one + other) < 0.5:
                    one, other = other, one
                pairs.append((one, other, label, "corpus", f"{item['label']}/{item['kind']}", held))
    for table, held in ((PAIRS, False), (DEV, True)):
        for name, count in table.items():
            chosen = sorted(rows(data / f"{name}.jsonl.gz"), key=lambda row: bucket(row["premise"] + row["hypothesis"]))
            pairs += [
                (row["premise"], row["hypothesis"], int(row["label"] == "contradiction"), name, row["label"], held)
                for row in chosen[:count]
            ]
    return pairs


def matrix(pairs: list, cache: Path | None = None) -> np.ndarray:
    if cache is not None and cache.exists():
        cosines = np.load(cache)
    else:
        encoder = load_encoder(plan_compute("auto", "auto"), 64)
        texts = list(dict.fromkeys(text for pair in pairs for text in pair[:2]))
        vectors = dict(zip(texts, encoder.encode(texts), strict=True))
        cosines = np.array([vectors[pair[0]] @ vectors[pair[1]] for pair in pairs], dtype=np.float32)
        if cache is not None:
            np.save(cache, cosines)
    values = np.array(
        [[compare(read(pair[0]), read(pair[1])).features[name] for name in FEATURES] for pair in pairs],
        dtype=np.float32,
    )
    values[:, 0] = cosines
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
    from sklearn.neural_network import MLPClassifier

    pairs = load(arguments.data)
    values = matrix(pairs, arguments.cache)
    labels = np.array([pair[2] for pair in pairs])
    held = np.array([pair[5] for pair in pairs])
    sets = np.array([pair[3] for pair in pairs])
    mean, scale = values[~held].mean(0), values[~held].std(0) + 1e-6
    scaled = (values - mean) / scale
    logistic = LogisticRegression(C=0.3, max_iter=2000).fit(scaled[~held], labels[~held])
    network = MLPClassifier((24,), alpha=3e-3, max_iter=60, early_stopping=True, random_state=1).fit(
        scaled[~held], labels[~held]
    )
    results = {}
    for name, model in (("logistic", logistic), ("network", network)):
        scores = model.predict_proba(scaled)[:, 1]
        for part in ("corpus", *DEV):
            pick = held & (sets == part)
            precision, recall, thresholds = precision_recall_curve(labels[pick], scores[pick])
            f1 = 2 * precision * recall / np.maximum(1e-9, precision + recall)
            best = int(f1[:-1].argmax())
            results[f"{name}/{part}"] = {
                "auc": round(float(roc_auc_score(labels[pick], scores[pick])), 3),
                "ap": round(float(average_precision_score(labels[pick], scores[pick])), 3),
                "f1": round(float(f1[best]), 3), "at": round(float(thresholds[best]), 3),
                "precision": round(float(precision[best]), 3), "recall": round(float(recall[best]), 3),
            }  # fmt: skip
    for name, result in results.items():
        print(name, result)
    order = np.argsort(-np.abs(logistic.coef_[0]))
    print({FEATURES[i]: round(float(logistic.coef_[0][i]), 2) for i in order})
    scores = network.predict_proba(scaled)[:, 1]
    kinds = np.array([pair[4] for pair in pairs])
    pick = held & (sets == "corpus")
    for kind in sorted(set(kinds[pick])):
        chosen = pick & (kinds == kind)
        if chosen.sum() >= 15:
            print(f"{kind:32s} n={chosen.sum():4d} flagged at 0.5: {(scores[chosen] > 0.5).mean():.2f}")
    if arguments.write:
        first, second = network.coefs_
        target = Path(__file__).parent.parent / "kimera_stream/engines/evidence/data/rules.json"
        weights = {
            "name": "rules-1", "features": list(FEATURES),
            "mean": mean.tolist(), "scale": scale.tolist(), "hidden": first.tolist(), "hidden_bias": network.intercepts_[0].tolist(),
            "out": second[:, 0].tolist(), "out_bias": float(network.intercepts_[1][0]), "fitted": results,
        }  # fmt: skip
        target.write_text(
            json.dumps(json.loads(json.dumps(weights), parse_float=lambda text: round(float(text), 5)), indent=None)
            + "\n"
        )
        print("written", target.name)


if __name__ == "__main__":
    main()
