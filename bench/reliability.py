"""Is a score a probability: ``python -m bench.reliability --svg docs/reliability.svg --json``.

What the cascade says in the end, not the verifier alone, of pairs that neither the rules nor the verifier were fitted on:
the test parts of the corpus' clusters and stories, states told as symbols, and days named from where the speaker stands.
For each part the mean score beside the share of contradictions in bins of equal width, their mean distance (ECE), and a diagram.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry

from bench.fit_rules import bucket
from bench.quality import Pool, Shelf
from kimera_stream.core.embedding.minilm import DIMENSION, load_encoder
from kimera_stream.core.geoid import built
from kimera_stream.core.index import FlatIndex
from kimera_stream.core.interfaces import StoredGeoid
from kimera_stream.engines.contradiction import READ_RELATED, CascadeEngine
from kimera_stream.engines.scope import DAY_MS, other_day
from kimera_stream.engines.verifier import CrossEncoderVerifier, Verifier
from kimera_stream.infrastructure.compute import plan_compute
from kimera_stream.infrastructure.settings import PerformanceSettings, ScoringSettings
from kimera_stream.protocol.objects import GeoidBody, Scalar
from training.verifier.clusters import Cluster, read_clusters
from training.verifier.examples import CONTRADICTION
from training.verifier.measure import calibration_error, reliability
from training.verifier.recipe import OWN_CORPUS
from training.verifier.stories import Story, read_stories, story_examples
from training.verifier.vocabulary import part
from training.verifier.vocabulary_updates import SYMBOLS

Vectors = Mapping[str, npt.NDArray[np.float32]]
SIDE, MARGIN = 200, 46
"""Of one diagram, and round it, in pixels."""


@dataclass(frozen=True, slots=True)
class Said:
    """One statement. ``at``: when, in days."""

    text: str
    state: Mapping[str, Scalar] = field(default_factory=dict)
    at: int = 0

    def stored(self, geoid_id: str, vectors: Vectors) -> StoredGeoid:
        body = GeoidBody(text=self.text, symbolic_state=dict(self.state))
        now = self.at * DAY_MS
        geoid = built(body, geoid_id=geoid_id, session_id=None, now=now, offset=0, previous=None)
        return StoredGeoid(geoid, vectors[self.text], "bench")


@dataclass(frozen=True, slots=True)
class Case:
    """A pair, and whether it is a contradiction."""

    older: Said
    newer: Said
    truth: bool


def clusters_as_cases(clusters: Sequence[Cluster]) -> list[Case]:
    """The pairs as written: anchor first."""
    return [
        Case(Said(cluster.anchor), Said(item.text), item.label == CONTRADICTION)
        for cluster in clusters
        for item in cluster.items
    ]


def stories_as_cases(stories: Sequence[Story], vectors: Vectors) -> list[Case]:
    """The pairs that the cascade reads: those of a cosine of at least ``READ_RELATED``."""
    pairs = itertools.chain.from_iterable(story_examples([story]) for story in stories)
    return [
        Case(Said(e.first), Said(e.second), e.label == CONTRADICTION)
        for e in pairs
        if float(vectors[e.first] @ vectors[e.second]) >= READ_RELATED
    ]


def other_days(cases: Sequence[Case]) -> list[Case]:
    """Those whose statements name their day by one word, said two days apart: then they speak of different days."""
    return [
        Case(case.older, Said(case.newer.text, at=2), False)
        for case in cases
        if other_day(case.older.text, 0, case.newer.text, 2 * DAY_MS)
    ]


def states(subjects: bool) -> list[Case]:
    """States told as symbols beside their text: of one thing with another value and with the same one, and of another thing."""
    cases: list[Case] = []
    for things, key, values, _, _ in part(SYMBOLS, "test"):
        told = {
            (thing, value): Said(f"{thing}: {key} {value}", {key: value} | ({"subject": thing} if subjects else {}))
            for thing in things
            for value in values
        }
        for (x, one), (y, other) in itertools.combinations(told, 2):
            cases.append(Case(told[x, one], told[y, other], x == y and one != other))
    return cases


def engine_with(verifier: Verifier | None) -> CascadeEngine:
    """The cascade as it is shipped; nothing is stored, as pairs are asked about."""
    settings = ScoringSettings()
    index = FlatIndex(DIMENSION, threads=Pool(), performance=PerformanceSettings(), scoring=settings)
    return CascadeEngine(index, Shelf(), verifier, settings, Pool(), CollectorRegistry())


async def scores_of(engine: CascadeEngine, cases: Sequence[Case], vectors: Vectors) -> npt.NDArray[np.float64]:
    found: list[float] = []
    for start in range(0, len(cases), 256):
        pairs = [(c.older.stored("a", vectors), c.newer.stored("b", vectors)) for c in cases[start : start + 256]]
        found += [judgement.score for judgement in await engine.judge_pairs(pairs)]
    return np.array(found)


def figures(truth: npt.NDArray[np.bool_], scores: npt.NDArray[np.float64]) -> dict[str, Any]:
    return {
        "pairs": len(truth),
        "contradictions": int(truth.sum()),
        "ece": round(calibration_error(truth, scores), 3),
        "bins": [(count, round(mean, 3), round(share, 3)) for count, mean, share in reliability(truth, scores)],
    }


def diagram(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """The bins of each part as SVG: across the mean score, upwards the share of contradictions, the area of a dot by its pairs.

    A dot on the line is honest; one below it promises too much.
    """
    width, height = len(parts) * (SIDE + MARGIN) + MARGIN, SIDE + 2 * MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11" role="img" aria-label="Reliability of scores">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, (name, part_of) in enumerate(parts.items()):
        left, top = MARGIN + number * (SIDE + MARGIN), MARGIN
        lines += [
            f'<g transform="translate({left} {top})">',
            f'<text x="0" y="-22" font-weight="bold">{name}</text>',
            f'<text x="0" y="-8">{part_of["pairs"]} pairs, ECE {part_of["ece"]:.3f}</text>',
            f'<rect width="{SIDE}" height="{SIDE}" fill="none" stroke="#888"/>',
            f'<line x1="0" y1="{SIDE}" x2="{SIDE}" y2="0" stroke="#888" stroke-dasharray="4 3"/>',
        ]
        for tick in (0.0, 0.5, 1.0):
            lines.append(f'<text x="{tick * SIDE:g}" y="{SIDE + 14}" text-anchor="middle">{tick:g}</text>')
            lines.append(f'<text x="-6" y="{SIDE - tick * SIDE + 4:g}" text-anchor="end">{tick:g}</text>')
        for count, mean, share in part_of["bins"]:
            radius = 3 + 12 * (count / part_of["pairs"]) ** 0.5
            lines.append(
                f'<circle cx="{mean * SIDE:.1f}" cy="{SIDE - share * SIDE:.1f}" r="{radius:.1f}" fill="#2563eb" '
                f'fill-opacity="0.6"><title>{count} pairs: score {mean:g}, contradictions {share:g}</title></circle>'
            )
        lines += [f'<text x="{SIDE / 2:g}" y="{SIDE + 30}" text-anchor="middle">mean score</text>', "</g>"]
    lines.append(
        f'<text transform="translate(12 {MARGIN + SIDE / 2:g}) rotate(-90)" text-anchor="middle">'
        "share of contradictions</text></svg>"
    )
    return "\n".join(lines) + "\n"


async def measure(
    verifier: Verifier | None, clusters: Sequence[Cluster], stories: Sequence[Story], vectors: Vectors
) -> dict[str, dict[str, Any]]:
    """Figures by part; the verifier's own points and probabilities are those of ``verifier``."""
    engine = engine_with(verifier)
    of_clusters, of_stories = clusters_as_cases(clusters), stories_as_cases(stories, vectors)
    parts = {
        "clusters": of_clusters,
        "stories": of_stories,
        "the same day word, two days apart": other_days([*of_clusters, *of_stories]),
        "states with a subject": states(subjects=True),
        "states without a subject": states(subjects=False),
    }
    found: dict[str, dict[str, Any]] = {}
    for name, cases in parts.items():
        truth = np.array([case.truth for case in cases], dtype=np.bool_)
        found[name] = figures(truth, await scores_of(engine, cases, vectors))
    return found


async def main_async(arguments: argparse.Namespace) -> None:
    clusters = [cluster for cluster in read_clusters([OWN_CORPUS]) if cluster.split == "test"]
    clusters = sorted(clusters, key=lambda cluster: bucket("order" + cluster.anchor))[: arguments.clusters]
    stories = [story for story in read_stories(OWN_CORPUS / "stories") if story.split == "test"]
    stories = sorted(stories, key=lambda story: bucket("order" + story.lines[0]))[: arguments.stories]
    texts = [text for cluster in clusters for text in (cluster.anchor, *(item.text for item in cluster.items))]
    texts += [text for story in stories for text in story.lines]
    texts += [said.text for case in states(subjects=False) for said in (case.older, case.newer)]
    unique = list(dict.fromkeys(texts))
    encoder = load_encoder(plan_compute("auto", "auto"), 64)
    vectors = dict(zip(unique, encoder.encode(unique), strict=True))
    verifier = CrossEncoderVerifier(Pool())
    await verifier.start()
    found = await measure(verifier, clusters, stories, vectors)
    if arguments.svg is not None:
        shown = {name: found[name] for name in found if found[name]["pairs"]}
        await anyio.Path(arguments.svg).write_text(diagram(shown), encoding="utf-8")
    if not arguments.json:
        print(json.dumps(found, indent=2))
    sys.stdout.write(json.dumps(found) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="only the one JSON line")
    parser.add_argument("--svg", type=Path, help="where the diagram goes")
    parser.add_argument("--clusters", type=int, default=100_000)
    parser.add_argument("--stories", type=int, default=100_000)
    anyio.run(main_async, parser.parse_args())


if __name__ == "__main__":
    main()
