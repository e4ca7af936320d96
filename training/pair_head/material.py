"""What the pair head learns from: written pairs in both orders, the pairs of stories, public pairs, and strangers that look alike."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from training.pair_head.again import FRAMES, reworded
from training.verifier.clusters import anchor_examples
from training.verifier.examples import CONTRADICTION, ENTAILMENT, NEUTRAL, Example, Split
from training.verifier.mining import named
from training.verifier.public import public_examples
from training.verifier.recipe import Materials
from training.verifier.stories import story_examples

F32 = npt.NDArray[np.float32]
Vectors = Mapping[str, F32]
LEAST = 0.25
"""Cosine from which pairs of stories and strangers are taken: a little below what the cascade reads."""
CORPUS_WEIGHT, STORY_WEIGHT, PUBLIC_WEIGHT, STRANGER_WEIGHT = 1.0, 1.0, 0.3, 0.5
"""How much a pair counts. Public pairs describe one scene, and most of them would be strangers in a store."""
REPEATED = 5_000
"""Anchors, and as many other statements, that are said again."""


def written(materials: Materials, split: Split) -> list[Example]:
    """The pairs of the clusters of ``split``, as written: anchor first."""
    return anchor_examples([cluster for cluster in materials.clusters if cluster.split == split])


def told(materials: Materials, split: Split) -> list[Example]:
    """Every pair of the stories of ``split``, the earlier statement first."""
    return story_examples([story for story in materials.stories if story.split == split])


def public(materials: Materials) -> list[Example]:
    """The public pairs that the verifier trains on."""
    return public_examples(materials.data, "train", materials.seed)


def repeated(materials: Materials) -> list[Example]:
    """Statements and what repeats them in nearly the same words: no written pair does, and a feed is full of it.

    Some of what is said again is beside a contradiction of it and another item of its cluster too: the frame alone must not tell.
    """
    rng = materials.rng("again")
    clusters = [cluster for cluster in materials.clusters if cluster.split == "train"]
    found = []
    for cluster in rng.sample(clusters, min(REPEATED, len(clusters))):
        again = reworded(rng, cluster.anchor, FRAMES)
        found.append(Example(cluster.anchor, again, ENTAILMENT, "repeated", "repeated"))
        items = anchor_examples([cluster])
        for apart in (True, False):
            beside = [each for each in items if (each.label == CONTRADICTION) == apart]
            found += [
                Example(again, e.second, e.label, "repeated", "beside") for e in rng.sample(beside, min(1, len(beside)))
            ]
    texts = [text for _, text in worlds(materials, "train")]
    for text in rng.sample(texts, min(REPEATED, len(texts))):
        found.append(Example(text, reworded(rng, text), ENTAILMENT, "repeated", "repeated"))
    return found


def both_ways(materials: Materials) -> list[Example]:
    """What is learnt in both orders: the written pairs of the training split, and what is said again."""
    return [*written(materials, "train"), *repeated(materials)]


def worlds(materials: Materials, split: Split) -> list[tuple[int, str]]:
    """(number of its world, text) of every statement of the clusters and stories of ``split``."""
    clusters = [cluster for cluster in materials.clusters if cluster.split == split]
    stories = [story for story in materials.stories if story.split == split]
    own = [[cluster.anchor, *(item.text for item in cluster.items)] for cluster in clusters]
    own += [list(story.lines) for story in stories]
    return [(number, text) for number, texts in enumerate(own) for text in texts]


def strangers(
    pool: Sequence[tuple[int, str]], vectors: Vectors, seed: int, *, asked: int, each: int, among: int = 50_000
) -> list[Example]:
    """For some statements of the pool the nearest ones of other worlds, as neutral.

    Only those that share no named thing: two worlds may tell of the same one by accident, and then contradict.

    Args:
        pool: (number of its world, text).
        asked: Statements whose neighbours are looked for.
        each: Neighbours of each at most, of a cosine of at least ``LEAST``.
        among: Statements of the pool that are looked at.
    """
    rng = random.Random(f"{seed}:strangers")
    others = rng.sample(list(pool), min(among, len(pool)))
    queries = rng.sample(list(pool), min(asked, len(pool)))
    rows = np.stack([vectors[text] for _, text in others])
    home = np.array([number for number, _ in others])
    names = [named(text) for _, text in others]
    found: list[Example] = []
    for start in range(0, len(queries), 512):
        part = queries[start : start + 512]
        cosines = np.stack([vectors[text] for _, text in part]) @ rows.T
        nearest = np.argpartition(-cosines, 40, axis=1)[:, :40] if len(others) > 40 else np.argsort(-cosines, axis=1)
        for row, (number, text) in enumerate(part):
            mine, taken = named(text), 0
            for column in sorted(nearest[row].tolist(), key=lambda place: -cosines[row, place]):
                if cosines[row, column] < LEAST or taken == each:
                    break
                if home[column] != number and not mine & names[column]:
                    found.append(Example(others[column][1], text, NEUTRAL, "pool", "pool"))
                    taken += 1
    return found


def near(examples: Sequence[Example], vectors: Vectors, least: float) -> list[Example]:
    """Those of a cosine of at least ``least``."""
    return [each for each in examples if float(vectors[each.first] @ vectors[each.second]) >= least]


def training_pairs(materials: Materials, vectors: Vectors, work: Path | None = None) -> tuple[list[Example], F32]:
    """Everything of the training split, ``both_ways`` first, and how much each pair counts, float32 (n,).

    ``work``: where the strangers are kept, which take longest to find.
    """
    parts = [
        (CORPUS_WEIGHT, both_ways(materials)),
        (STORY_WEIGHT, near(told(materials, "train"), vectors, LEAST)),
        (PUBLIC_WEIGHT, public(materials)),
        (STRANGER_WEIGHT, _kept_strangers(materials, vectors, work)),
    ]
    weights = np.concatenate([np.full(len(part), weight, np.float32) for weight, part in parts])
    return [example for _, part in parts for example in part], weights


def _kept_strangers(materials: Materials, vectors: Vectors, work: Path | None) -> list[Example]:
    kept = None if work is None else work / "strangers.json"
    if kept is not None and kept.is_file():
        return [Example(*pair, NEUTRAL, "pool", "pool") for pair in json.loads(kept.read_text(encoding="utf-8"))]
    found = strangers(worlds(materials, "train"), vectors, materials.seed, asked=24_000, each=4)
    if kept is not None:
        kept.write_text(json.dumps([[e.first, e.second] for e in found], ensure_ascii=False), encoding="utf-8")
    return found


def texts_of(materials: Materials) -> list[str]:
    """Every text that training and choosing need, once."""
    texts = [text for split in ("train", "dev") for _, text in worlds(materials, split)]
    pairs = [*public(materials), *repeated(materials)]
    texts += [text for example in pairs for text in (example.first, example.second)]
    return list(dict.fromkeys(texts))


class Encoded:
    """Vectors of texts by the packaged encoder, kept in a folder between runs.

    Args:
        folder: Where they are kept.
    """

    def __init__(self, folder: Path) -> None:
        self._rows, self._texts = folder / "vectors.npy", folder / "texts.txt"

    def of(self, texts: Sequence[str]) -> dict[str, F32]:
        """The vector of each; what is not kept is encoded first."""
        from kimera_stream.core.embedding.minilm import load_encoder
        from kimera_stream.infrastructure.compute import plan_compute

        known: dict[str, F32] = {}
        if self._rows.is_file() and self._texts.is_file():
            kept = self._texts.read_text(encoding="utf-8").split("\0")
            known = dict(zip(kept, np.load(self._rows), strict=True))
        missing = sorted({text for text in texts if text not in known}, key=len)  # alike lengths need no padding
        encoder = load_encoder(plan_compute("auto", "auto"), 64) if missing else None
        for start in range(0, len(missing), 8192):
            assert encoder is not None
            part = missing[start : start + 8192]
            known |= dict(zip(part, encoder.encode(part), strict=True))
            print(f"encoded {start + len(part)} of {len(missing)}", flush=True)
        if missing:
            np.save(self._rows, np.stack(list(known.values())))
            self._texts.write_text("\0".join(known), encoding="utf-8")
        return known
