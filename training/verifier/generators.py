"""Clusters from templates: exact phenomena in large numbers; of frames and words a part is kept for measuring."""

import random
from collections.abc import Callable

from training.verifier.clusters import Cluster, Item
from training.verifier.examples import Split
from training.verifier.frames import Draft
from training.verifier.templates_states import compared, happened, located, relation, role, state
from training.verifier.templates_updates import reach, superseded, symbolic
from training.verifier.templates_values import count, date, quantified, quantity

Generator = Callable[[random.Random, Split], Draft]

GENERATORS: dict[str, tuple[Generator, int]] = {
    "state": (state, 620),
    "count": (count, 260),
    "quantity": (quantity, 300),
    "date": (date, 260),
    "role": (role, 260),
    "quantified": (quantified, 220),
    "compared": (compared, 160),
    "relation": (relation, 160),
    "located": (located, 160),
    "happened": (happened, 220),
    "symbolic": (symbolic, 300),
    "superseded": (superseded, 360),
    "reach": (reach, 360),
}
"""How many clusters of each go into training."""


def generated_clusters(split: Split, seed: int, *, share: float = 1.0) -> list[Cluster]:
    """Clusters of every generator from the frames and words of ``split``; ``share`` scales their number."""
    clusters: list[Cluster] = []
    for name, (generator, number) in GENERATORS.items():
        rng = random.Random(f"{seed}:{name}:{split}")
        seen: set[str] = set()
        for _ in range(max(1, int(number * share))):
            anchor, drafts = generator(rng, split)
            if anchor in seen:
                continue
            seen.add(anchor)
            style = rng.choice([_sentence, _sentence, _plain, _note])
            texts: dict[str, Item] = {}
            for text, label, kind in drafts:
                told = rng.choice([style, _sentence])(text)
                texts.setdefault(told, Item(told, label, kind))
            clusters.append(Cluster(style(anchor), tuple(texts.values()), f"generated-{name}"))
    return clusters


def _sentence(text: str) -> str:
    told = text[0].upper() + text[1:]
    return told if told.endswith(("?", ".")) else f"{told}."


def _plain(text: str) -> str:
    return text


def _note(text: str) -> str:
    return text.lower() if not text.endswith("?") else text
