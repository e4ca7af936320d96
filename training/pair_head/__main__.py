"""``python -m training.pair_head --data ../shared/data --write``: from the packaged encoder's vectors to the shipped pair head.

Takes minutes: the encoder is not trained, its vectors are kept in ``--work``.
"""

import json
from datetime import date
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from safetensors.numpy import save

from kimera_stream.engines.contradiction import READ_RELATED
from kimera_stream.engines.pair_head import EXTRAS, digest_of, shipped_head
from kimera_stream.engines.scores import THRESHOLDS
from training.pair_head import material
from training.pair_head.network import Choice, Read, Table, fit, logits
from training.verifier import measure, sources
from training.verifier.clusters import KEPT_OUT, anchor_examples
from training.verifier.examples import CONTRADICTION, Example
from training.verifier.recipe import Materials

NAME = "kimera-pair-head-1"
ENCODER = "all-MiniLM-L6-v2"
"""As ``MiniLmProvider.model`` says it."""

app = typer.Typer(add_completion=False, help=__doc__)


def calibrate(
    weights: dict[str, material.F32], clusters: Table, stories: Table, statements: int
) -> tuple[dict[str, float], dict[str, float]]:
    """As the verifier's: Platt scaling from the development clusters and stories, operating points from the stories alone."""
    of_stories = logits(weights, stories)
    truth = np.concatenate([stories.truth, clusters.truth])
    scale, shift = measure.fit_calibration(truth, np.concatenate([of_stories, logits(weights, clusters)]))
    scores = _scores(of_stories, scale, shift)
    return {"scale": round(scale, 5), "shift": round(shift, 5)}, measure.operating_points(
        stories.truth, scores, statements
    )


def _scores(raw: measure.Scores, scale: float, shift: float) -> measure.Scores:
    return 1 / (1 + np.exp(-(scale * raw + shift)))


def measured(
    weights: dict[str, material.F32],
    calibration: dict[str, float],
    point: float,
    sets: dict[str, list[Example]],
    encoded: material.Encoded,
    kept: Read,
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Figures of what no training has seen: of the head at its ``balanced`` point, and of the rules at theirs."""
    result = {}
    for name, examples in sets.items():
        vectors = encoded.of([text for e in examples for text in (e.first, e.second)])
        table = Table.of(examples, vectors, kept)
        scores = _scores(logits(weights, table), calibration["scale"], calibration["shift"])
        result[name] = {
            "head": measure.as_dict(measure.figures(examples, scores, point)),
            "rules": measure.as_dict(measure.figures(examples, table.rules, THRESHOLDS["balanced"])),
        }
        print(f"{name}: {result[name]}", flush=True)
    return result


def development(materials: Materials, vectors: material.Vectors, kept: Read) -> list[Table]:
    """What choices rest on: clusters and stories of the development split, and the contradictions of its clusters among strangers."""
    written = material.written(materials, "dev")
    pool = material.worlds(materials, "dev")
    apart = material.strangers(pool, vectors, materials.seed, asked=4_000, each=5)
    return [
        Table.of(written, vectors, kept),
        Table.of(material.near(material.told(materials, "dev"), vectors, READ_RELATED), vectors, kept),
        Table.of([*apart, *(e for e in written if e.label == CONTRADICTION)], vectors, kept),
    ]


def held_out(materials: Materials, encoded: material.Encoded) -> dict[str, list[Example]]:
    """What is measured on: the test split, and the file that is kept out whole."""
    held = [cluster for cluster in materials.clusters if cluster.split == "test"]
    stories = material.told(materials, "test")
    vectors = encoded.of([text for e in stories for text in (e.first, e.second)])
    return {
        "corpus": anchor_examples([cluster for cluster in held if cluster.source not in KEPT_OUT]),
        "kept out": anchor_examples([cluster for cluster in held if cluster.source in KEPT_OUT]),
        "stories": material.near(stories, vectors, READ_RELATED),
    }


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="Directory of the public pairs.")] = Path("../shared/data"),
    work: Annotated[Path, typer.Option(help="Vectors and the report.")] = Path("build/pair_head"),
    target: Annotated[Path | None, typer.Option(help="File to write; default: where the package ships it.")] = None,
    threads: Annotated[int, typer.Option(help="torch threads.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of sampling, order and initialisation.")] = 7,
    write: Annotated[bool, typer.Option(help="Write the weights and their card.")] = False,
) -> None:
    """Encode, fit, calibrate, measure, export."""
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    materials = Materials.read(data, seed)
    encoded, kept = material.Encoded(work), Read(work)
    vectors = encoded.of(material.texts_of(materials))
    examples, shares = material.training_pairs(materials, vectors, work)
    first = slice(len(material.both_ways(materials)))
    table = Table.of(examples, vectors, kept).turned(first)
    shares = np.concatenate([shares, shares[first]])
    print(f"{len(table.truth)} pairs", flush=True)
    clusters, stories, strangers = development(materials, vectors, kept)
    weights, _ = fit(table, shares, (clusters, stories, strangers), Choice(), seed)
    statements = sum(len(story.lines) for story in materials.stories if story.split == "dev")
    calibration, points = calibrate(weights, clusters, stories, statements)
    print(f"calibration {calibration}, operating points {points}", flush=True)
    figures = measured(weights, calibration, points["balanced"], held_out(materials, encoded), encoded, kept)
    raw = save({name: value.astype(np.float16) if name == "w1" else value for name, value in weights.items()})
    known = sources.licences(materials.clusters, materials.stories)
    card = {
        "name": NAME,
        "made": date.today().isoformat(),  # noqa: DTZ011 - a day for people
        "encoder": ENCODER,
        "licence": "Apache-2.0; training data in docs/model_card.md",
        "data": sources.named({example.source for example in examples}, known),
        "extras": list(EXTRAS),
        "hidden": len(weights["b1"]),
        "calibration": calibration,
        "operating_points": points,
        "digest": digest_of(raw),
        "metrics": figures,
    }
    (work / "report.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    if write:
        path = shipped_head() if target is None else target
        path.write_bytes(raw)
        path.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        print(f"{path}: {len(raw)} bytes")


if __name__ == "__main__":
    app()
