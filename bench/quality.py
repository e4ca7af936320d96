"""How good detection is: ``python -m bench.quality --data ../shared/data --json``.

Pairs: ROC-AUC, and precision, recall and F1 at each operating point, per labelled set. Pool: whether the scan hands on
the contradicted statement, and false alarms per statement published, on the corpus' clusters beside other statements.
Only what neither the rules nor the verifier were fitted on: the test part of the corpus' clusters, by the split of the
verifier's training, and the sets marked for measuring.
Stories: held-out feeds in which every pair is labelled, published statement by statement beside the same pool: what a
reader would be told, and how much of it is right.
``--verifier shed``: what is told provisionally while the verifier is away, by the pair head. ``--verifier off``: by the rules.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import numpy as np
import structlog
from prometheus_client import CollectorRegistry

from bench.fit_rules import bucket, rows
from kimera_stream.core.embedding.minilm import DIMENSION, load_encoder
from kimera_stream.core.geoid import built
from kimera_stream.core.index import FlatIndex
from kimera_stream.core.interfaces import StoredGeoid
from kimera_stream.engines.contradiction import CascadeEngine
from kimera_stream.engines.pair_head import PairHead
from kimera_stream.engines.scores import THRESHOLDS
from kimera_stream.engines.verifier import CrossEncoderVerifier, Verifier, weights_available
from kimera_stream.infrastructure.compute import plan_compute
from kimera_stream.infrastructure.settings import PerformanceSettings, ScoringSettings
from kimera_stream.protocol.errors import UnavailableError
from kimera_stream.protocol.objects import GeoidBody
from training.verifier.clusters import Cluster, read_clusters
from training.verifier.examples import CONTRADICTION, LABELS, split_of
from training.verifier.recipe import OWN_CORPUS
from training.verifier.stories import Story, read_stories

T = TypeVar("T")
MEASURED = ("mnli_dev_part", "cad_dev", "conjnli_dev", "sick_trial_eval_only")
UNSEEN = ("snli_dev",)
"""Sets of which a part trains: measured on the premises that the split of the verifier's training keeps for measuring."""
FILLERS = (
    "snli_dev", "wikifactcheck_part", "mnli_train", "conjnli_train", "semantoneg_part", "cad_train", "breaking_nli_part",
)  # fmt: skip
NAMES = {label: name for name, label in LABELS.items()}
BATCH = 32
FAMILIES = {
    "negation": "negation", "antonym": "antonym", "number": "number", "entity": "entity", "double-negation": "double-negation",
    "paraphrase": "paraphrase", "unit": "unit", "quantifier": "quantifier", "time": "time", "commonsense": "commonsense",
}  # fmt: skip


class Pool:
    """``Threads`` on anyio's default pool."""

    async def run(self, purpose: str, fn: Callable[..., T], *args: Any) -> T:
        return await anyio.to_thread.run_sync(fn, *args)


class Away:
    """A verifier that has no time."""

    name = "away"

    async def judge(self, pairs: Sequence[tuple[str, str]]) -> Any:
        raise UnavailableError("verifier: left out")


class Shelf(dict[str, StoredGeoid]):
    """``GeoidLoader`` over a dictionary."""

    async def get_many(self, ids: Sequence[str]) -> Mapping[str, StoredGeoid]:
        return {each: self[each] for each in ids if each in self}


def auc(labels: np.ndarray, scores: np.ndarray) -> float | None:
    """Area under the ROC curve, ties counted half; None where only one label occurs."""
    positive, negative = int(labels.sum()), int((1 - labels).sum())
    if not positive or not negative:
        return None
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[labels == 1].sum() - positive * (positive + 1) / 2) / (positive * negative))


def at(labels: np.ndarray, scores: np.ndarray, threshold: float) -> dict[str, float]:
    """Precision, recall and F1 of reporting what scores at least ``threshold``."""
    flagged = scores >= threshold
    hits = int((flagged & (labels == 1)).sum())
    precision = hits / max(1, int(flagged.sum()))
    recall = hits / max(1, int(labels.sum()))
    f1 = 2 * precision * recall / max(1e-9, precision + recall)
    return {"precision": round(precision, 3), "recall": round(recall, 3), "f1": round(f1, 3)}


class Bench:
    """Encodes once, judges many. ``head``: for a verifier that has no time. ``threshold``: instead of the operating point."""

    def __init__(
        self, verifier: Verifier | None, head: PairHead | None, texts: list[str], threshold: float | None = None
    ) -> None:

        encoder = load_encoder(plan_compute("auto", "auto"), 64)
        unique = list(dict.fromkeys(texts))
        began = time.perf_counter()
        self.vectors = dict(zip(unique, encoder.encode(unique), strict=True))
        self.encoded_per_s = len(unique) / (time.perf_counter() - began)
        self.settings = ScoringSettings(threshold=threshold)
        self.shelf = Shelf()
        self.index = FlatIndex(DIMENSION, threads=Pool(), performance=PerformanceSettings(), scoring=self.settings)
        self.engine = CascadeEngine(
            self.index, self.shelf, verifier, self.settings, Pool(), CollectorRegistry(), head=head
        )

    def stored(self, geoid_id: str, text: str) -> StoredGeoid:
        body = GeoidBody(text=text)
        geoid = built(body, geoid_id=geoid_id, session_id=None, now=0, offset=0, previous=None)
        return StoredGeoid(geoid, self.vectors[text], "bench")

    async def scores(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        found: list[float] = []
        for start in range(0, len(pairs), 256):
            part = [(self.stored("a", a), self.stored("b", b)) for a, b in pairs[start : start + 256]]
            found += [judgement.score for judgement in await self.engine.judge_pairs(part)]
        return np.array(found)

    async def pool(self, clusters: Sequence[Cluster], fillers: Sequence[str]) -> dict[str, Any]:
        """Anchors and fillers are stored; every item is then published against them."""
        for number, text in enumerate(fillers):
            self._put(self.stored(f"f{number}", text))
        for number, cluster in enumerate(clusters):
            self._put(self.stored(f"c{number}", cluster.anchor))
        items = [(number, item) for number, cluster in enumerate(clusters) for item in cluster.items]
        reach = found = own_false = other_false = filler_false = contradictions = 0
        for start in range(0, len(items), BATCH):
            part = items[start : start + BATCH]
            fresh = [self.stored(f"n{start + i}", item.text) for i, (_, item) in enumerate(part)]
            scanned = await self.index.scan(
                fresh, k=self.settings.candidates, min_relatedness=self.settings.min_relatedness
            )
            # One at a time: within a batch, items of one cluster contradict each other, and that is not labelled.
            for (number, item), new, candidates in zip(part, fresh, scanned, strict=True):
                (hits,) = await self.engine.detect([new])
                wrong = item.label == CONTRADICTION
                contradictions += wrong
                reach += wrong and any(each.geoid_id == f"c{number}" for each in candidates)
                for older, _ in hits:
                    if older.geoid.id == f"c{number}":
                        found += wrong
                        own_false += not wrong
                    elif older.geoid.id.startswith("c"):
                        other_false += 1
                    else:
                        filler_false += 1
        published = max(1, len(items))
        return {
            "stored": len(fillers) + len(clusters),
            "published": len(items),
            "contradicted_among_candidates": round(reach / max(1, contradictions), 4),
            "contradictions_found": round(found / max(1, contradictions), 4),
            "false_alarms_per_statement": {
                "labelled_near_misses": round(own_false / published, 4),
                "other_clusters": round(other_false / published, 4),
                "other_statements": round(filler_false / published, 4),
            },
        }

    async def stories(self, stories: Sequence[Story]) -> dict[str, Any]:
        """Statement after statement of each story is published, and stays in the store."""
        told = right = wanted = strangers = published = 0
        for number, story in enumerate(stories):
            wanted += sum(label == CONTRADICTION for label in story.relations.values())
            for later, text in enumerate(story.lines):
                fresh = self.stored(f"s{number}:{later}", text)
                (hits,) = await self.engine.detect([fresh])
                for older, _ in hits:
                    home, _, earlier = older.geoid.id.partition(":")
                    if home == f"s{number}":
                        told += 1
                        right += story.label(later, int(earlier)) == CONTRADICTION
                    else:
                        strangers += 1
                self._put(fresh)
                published += 1
        precision, recall = right / max(1, told), right / max(1, wanted)
        return {
            "stories": len(stories),
            "published": published,
            "contradicting_pairs": wanted,
            "precision": round(precision, 3),
            "recall": round(recall, 3),
            "f1": round(2 * precision * recall / max(1e-9, precision + recall), 3),
            "false_alarms_per_statement": {
                "labelled_pairs": round((told - right) / max(1, published), 4),
                "unlabelled_other_statements": round(strangers / max(1, published), 4),
            },
        }

    def _put(self, stored: StoredGeoid) -> None:
        self.shelf[stored.geoid.id] = stored
        self.index.put(stored)


def public_pairs(data: Path, name: str, most: int) -> list[tuple[str, str, str, str]]:
    """(premise, hypothesis, label, no kind) of a public set, at most so many; of one that trains those of unseen premises alone."""
    chosen = [
        row for row in rows(data / f"{name}.jsonl.gz") if name not in UNSEEN or split_of(row["premise"]) == "test"
    ]
    chosen.sort(key=lambda row: bucket(row["premise"] + row["hypothesis"]))
    return [(row["premise"], row["hypothesis"], row["label"], "") for row in chosen[:most]]


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    verifier: Verifier | None = None
    head: PairHead | None = None
    points: dict[str, float] = dict(THRESHOLDS)
    if arguments.verifier == "shed":
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
        verifier, head = Away(), PairHead.load()
        points = head.operating_points
    elif arguments.verifier == "auto" and weights_available():
        verifier = CrossEncoderVerifier(Pool())
        await verifier.start()
        points |= verifier.operating_points
    balanced = points["balanced"] if arguments.threshold is None else arguments.threshold
    clusters = [cluster for cluster in read_clusters([OWN_CORPUS]) if cluster.split == "test"]
    clusters = sorted(clusters, key=lambda cluster: bucket("order" + cluster.anchor))[: arguments.clusters]
    stories = [story for story in read_stories(OWN_CORPUS / "stories") if story.split == "test"]
    labelled: dict[str, list[tuple[str, str, str, str]]] = {
        "corpus": [(c.anchor, i.text, NAMES[i.label], i.kind) for c in clusters for i in c.items]
    }
    for name in (*UNSEEN, *MEASURED):
        labelled[name] = public_pairs(arguments.data, name, arguments.pairs)
    fillers: list[str] = []
    for name in FILLERS:
        for row in rows(arguments.data / f"{name}.jsonl.gz"):
            fillers += [row["premise"], row["hypothesis"]]
    fillers = list(dict.fromkeys(fillers))[: arguments.fillers]
    texts = [text for pairs in labelled.values() for pair in pairs for text in pair[:2]] + fillers
    texts += [text for story in stories for text in story.lines]
    bench = await anyio.to_thread.run_sync(Bench, verifier, head, texts, arguments.threshold)
    result: dict[str, Any] = {
        "model": bench.engine.model if head is None else head.name,
        "threshold_balanced": balanced,
        "encoded_per_second": round(bench.encoded_per_s, 1),
        "pairs": {},
    }
    for name, pairs in labelled.items():
        labels = np.array([int(label == "contradiction") for _, _, label, _ in pairs])
        began = time.perf_counter()
        scores = await bench.scores([(a, b) for a, b, _, _ in pairs])
        took = time.perf_counter() - began
        area = auc(labels, scores)
        result["pairs"][name] = {
            "n": len(pairs),
            "auc": None if area is None else round(area, 3),
            "pairs_per_second": round(len(pairs) / took, 1),
            **{point: at(labels, scores, threshold) for point, threshold in points.items()},
        }
        if name == "corpus":
            result["families"] = families(pairs, labels, scores, balanced)
    result["pool"] = await bench.pool(clusters, fillers)
    result["stories"] = await bench.stories(stories)
    return result


def families(
    pairs: Sequence[tuple[str, str, str, str]], labels: np.ndarray, scores: np.ndarray, threshold: float
) -> dict[str, dict[str, Any]]:
    """Per phenomenon: its contradictions ranked against everything of the same anchors that contradicts nothing (``auc``),
    the share of them found, and the share of its compatible statements that is flagged."""
    anchors = np.array([pair[0] for pair in pairs])
    kinds = np.array([pair[3] for pair in pairs])
    result: dict[str, dict[str, Any]] = {}
    for family, kind in FAMILIES.items():
        own = (kinds == kind) & (labels == 1)
        beside = np.isin(anchors, anchors[own]) & (labels == 0)
        quiet = (kinds == kind) & (labels == 0)
        area = auc(labels[own | beside], scores[own | beside])
        result[family] = {
            "contradictions": int(own.sum()),
            "compatible": int(quiet.sum()),
            "auc": None if area is None else round(area, 3),
            "found": _share(scores[own], threshold),
            "flagged_wrongly": _share(scores[quiet], threshold),
        }
    return result


def _share(scores: np.ndarray, threshold: float) -> float | None:
    return round(float((scores >= threshold).mean()), 3) if len(scores) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", action="store_true", help="only the one JSON line")
    parser.add_argument("--verifier", choices=("auto", "off", "shed"), default="auto")
    parser.add_argument("--threshold", type=float, help="score that a pair needs; default: the balanced point")
    parser.add_argument("--pairs", type=int, default=1000, help="pairs per set at most")
    parser.add_argument("--clusters", type=int, default=400)
    parser.add_argument("--fillers", type=int, default=100_000, help="other statements in the pool")
    arguments = parser.parse_args()
    result = anyio.run(measure, arguments)
    if not arguments.json:
        print(json.dumps(result, indent=2))
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
