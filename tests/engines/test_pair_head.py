"""What decides while the verifier has no time."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from kimera_stream import kernels
from kimera_stream.core.embedding.minilm import DIMENSION as MINILM
from kimera_stream.core.embedding.minilm import load_encoder
from kimera_stream.core.interfaces import StoredGeoid
from kimera_stream.engines.evidence import packaged_rules
from kimera_stream.engines.pair_head import EXTRAS, PairHead, digest_of, extras_of, shipped_head
from kimera_stream.engines.pairs import Pair, Stages, pair_of
from kimera_stream.engines.scores import THRESHOLDS
from kimera_stream.infrastructure.compute import ComputePlan
from tests.engines.heads import NAME, POINTS, card, certain, weights
from tests.engines.test_contradiction import DIMENSION, Choking, Oracle, World, by_stage, geoid

pytestmark = pytest.mark.anyio

TEXTS = [
    ("Valve W7-77 is open.", "Valve W7-77 is closed."),
    ("The lab in Recife was shut on 3 March.", "Valve W7-77 is closed."),
    ("Nobody has seen the ferry.", "The Orvane ferry leaves at 10:40."),
]
"""Older and newer; the first two have the newer one in common."""


def pairs() -> list[Pair]:
    newer = {text: geoid(f"n{text}", text) for _, text in TEXTS}
    made = []
    for number, (older, text) in enumerate(TEXTS):
        one, other = geoid(str(number), older), newer[text]
        assert one.vector is not None
        assert other.vector is not None
        made.append(pair_of(one, other, float(one.vector @ other.vector)))
    for pair in made:
        [pair.evidence] = packaged_rules().judge([(said(pair.older), said(pair.newer), pair.cosine or 0.0)])
    return made


def said(stored: Any) -> str:
    return str(stored.geoid.text)


@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_a_head_is_two_layers_over_vectors_words_and_findings(kernel: kernels.Choice) -> None:
    layers = weights(DIMENSION, hidden=5)
    head = PairHead(card(calibration={"scale": 0.3, "shift": -0.7}), layers, kernels.load(kernel))
    expected = []
    for pair in (made := pairs()):
        one, other = pair.newer.vector, pair.older.vector
        assert one is not None
        assert other is not None
        [extra] = extras_of(said(pair.newer), [said(pair.older)], [pair.evidence])  # type: ignore[list-item]
        features = np.concatenate([np.abs(one - other), one * other, extra])
        logit = layers["w2"] @ np.maximum(layers["w1"] @ features + layers["b1"], 0) + layers["b2"][0]
        expected.append(1 / (1 + np.exp(-(0.3 * logit - 0.7))))
    assert head.judge(made) == pytest.approx(expected, abs=1e-5)
    assert head.judge(made[::-1]) == pytest.approx(expected[::-1], abs=1e-5)
    assert len({round(each, 4) for each in expected}) == 3


def test_the_features_are_what_their_names_say() -> None:
    [first, second, third] = pairs()
    evidence = [pair.evidence for pair in (first, second) if pair.evidence is not None]
    rows = extras_of(said(first.newer), [said(first.older), said(second.older)], evidence)
    named = [dict(zip(EXTRAS, row.tolist(), strict=True)) for row in rows]
    assert [each["named"] for each in named] == [1.0, 0.0]
    assert named[0]["overlap"] > named[1]["overlap"]
    assert [each["rules_plain"] for each in named] == [1.0, 0.0]
    assert named[0]["rules_log_odds"] == pytest.approx(np.log(0.93 / 0.07), abs=0.5)
    assert named[0]["cosine"] == pytest.approx(first.cosine, abs=1e-6)
    assert named[0]["antonym_clash"] > 0
    [row] = extras_of(said(third.newer), [said(third.older)], [third.evidence])  # type: ignore[list-item]
    assert dict(zip(EXTRAS, row, strict=True))["negation_any"] == 1.0


def test_it_fits_vectors_of_its_encoder_alone() -> None:
    [pair, *_] = pairs()
    head = certain(0.9, DIMENSION)
    assert head.fits(pair)
    assert not certain(0.9, DIMENSION // 2).fits(pair)
    for side in ("older", "newer"):
        own = replace(getattr(pair, side), own_vector=True)
        assert not head.fits(replace(pair, **{side: own})), "a client may have any encoder"
        assert not head.fits(replace(pair, **{side: replace(own, vector=None, own_vector=False)}))
    assert not head.fits(replace(pair, evidence=None))


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "some_head.safetensors"
    raw = save(weights(DIMENSION))
    path.write_bytes(raw)
    path.with_suffix(".json").write_text(json.dumps(card(digest=digest_of(raw)) | changes))
    return path


def test_a_head_is_read_from_its_two_files(tmp_path: Path) -> None:
    head = PairHead.load(write(tmp_path))
    assert (head.name, head.encoder, head.dimension, head.operating_points) == (NAME, "tests", DIMENSION, POINTS)
    assert head.judge(pairs()) == PairHead(card(), weights(DIMENSION)).judge(pairs())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"digest": "0"}, "damaged"),
        ({"extras": list(EXTRAS[1:])}, "other features"),
        ({"operating_points": {"balanced": 0.5}}, "lacks an operating point"),
        ({"operating_points": POINTS | {"balanced": 1.5}}, "lacks an operating point"),
        ({"calibration": {}}, "lacks the calibration"),
    ],
)
def test_a_card_that_does_not_fit_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"pair head some_head\.safetensors: .*{message}"):
        PairHead.load(write(tmp_path, **changes))


def test_damaged_weights_are_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path)
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 0x40
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"pair head some_head\.safetensors: .*damaged; reinstall"):
        PairHead.load(path)
    path.write_bytes(raw[:100])
    path.with_suffix(".json").write_text(json.dumps(card(digest=digest_of(bytes(raw[:100])))))
    with pytest.raises(ValueError, match=r"pair head some_head\.safetensors: .*reinstall"):
        PairHead.load(path)
    path.with_suffix(".json").write_text("[")
    with pytest.raises(ValueError, match=r"pair head some_head\.safetensors: .*reinstall"):
        PairHead.load(path)
    path.unlink()
    path.with_suffix(".json").unlink()
    with pytest.raises(FileNotFoundError):
        PairHead.load(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("w1", np.zeros((3, 4), "f4")),
        ("b1", np.zeros(4, "f4")),
        ("b2", np.zeros(2, "f4")),
        ("w2", np.full(3, np.nan, "f4")),
    ],
)
def test_weights_of_other_shapes_or_without_a_value_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match="its weights"):
        PairHead(card(), weights(DIMENSION) | {name: value})


def test_what_ships_is_of_the_packaged_encoder_and_small() -> None:
    head = PairHead.load()
    assert (head.name, head.encoder, head.dimension) == ("kimera-pair-head-1", "all-MiniLM-L6-v2", MINILM)
    assert shipped_head().stat().st_size <= 200_000


# -- in the cascade


async def test_the_head_decides_provisionally_where_the_verifier_is_away() -> None:
    world = World(Oracle(None), head=certain(0.7, DIMENSION))
    world.put(geoid("a", "The red door is open."))
    [[(older, judgement)]] = await world.engine.detect([geoid("b", "The red door was painted.")])
    assert older.geoid.id == "a"
    assert (judgement.model, judgement.provisional, judgement.score) == (NAME, True, pytest.approx(0.7, abs=1e-4))
    assert judgement.reported
    assert judgement.result.why[-1].startswith("meaning: by their vectors")
    assert "side by side" in judgement.result.why[-1]
    assert world.registry.get_sample_value("kimera_cascade_pairs_total", {"stage": "head"}) == 1
    assert world.registry.get_sample_value("kimera_cascade_seconds_count", {"stage": "head"}) == 1


async def test_the_head_decides_where_the_verifier_is_left_out_and_sees_what_it_would_have_read() -> None:
    oracle = Oracle(0.9)
    world = World(oracle, head=certain(0.7, DIMENSION), verify_candidates=2)
    world.put(*[geoid(f"g{n}", f"The red door {n} is open.") for n in range(9)])
    detection = await world.engine.look([geoid("b", "The red door 3 is closed.")], hurried=True)
    assert detection.unread == [True]
    assert {judgement.model for _, judgement in detection.hits[0]} == {NAME}
    assert len(detection.hits[0]) == 2
    assert oracle.asked == []
    assert world.registry.get_sample_value("kimera_cascade_pairs_total", {"stage": "head"}) == 2


async def test_the_head_is_not_asked_while_the_verifier_reads() -> None:
    world = World(Oracle(0.9), head=certain(0.1, DIMENSION))
    world.put(geoid("a", "The red door is open."))
    [[(_, judgement)]] = await world.engine.detect([geoid("b", "The red door is closed.")])
    assert (judgement.model, judgement.provisional) == ("oracle-1", False)
    assert not world.registry.get_sample_value("kimera_cascade_pairs_total", {"stage": "head"})


@pytest.mark.parametrize("point", ["precise", "balanced", "sensitive"])
async def test_the_heads_own_operating_point_decides(point: Any) -> None:
    for given, found in ((POINTS[point] - 0.01, []), (POINTS[point] + 0.01, ["a"])):
        world = World(Oracle(None), head=certain(given, DIMENSION), operating_point=point)
        older, newer = geoid("a", "The red door is open."), geoid("b", "The red door was painted.")
        world.put(older)
        assert await world.hits(newer) == [found]
        [judgement] = await world.engine.judge_pairs([(older, newer)])
        assert judgement.reported == bool(found)
    assert THRESHOLDS[point] != POINTS[point]


async def test_a_threshold_that_is_set_holds_for_the_head_too() -> None:
    for threshold, found in ((0.1, ["a"]), (0.8, [])):
        world = World(Oracle(None), head=certain(0.6, DIMENSION), threshold=threshold)
        world.put(geoid("a", "The red door is open."))
        assert await world.hits(geoid("b", "The red door was painted.")) == [found]


async def test_the_scope_holds_for_the_head_too() -> None:
    world = World(Oracle(None), head=certain(0.99, DIMENSION))
    world.put(geoid("a", "The door of the lab is open."))
    assert await world.hits(geoid("b", "Is the door of the lab closed?")) == [[]]


@pytest.mark.parametrize("why", ["dimension", "own vector"])
async def test_vectors_that_the_head_does_not_know_are_left_to_the_rules(why: str) -> None:
    world = World(Oracle(None), head=certain(0.01, DIMENSION * (2 if why == "dimension" else 1)))
    world.put(geoid("a", "The door is open."))
    fresh = replace(geoid("b", "The door is closed."), own_vector=why == "own vector")
    [[(_, judgement)]] = await world.engine.detect([fresh])
    assert (judgement.model, judgement.provisional) == ("rules-1", True)
    assert world.registry.get_sample_value("kimera_cascade_pairs_total", {"stage": "head"}) == 0


@pytest.mark.parametrize("count", [2, 9])
async def test_a_pair_over_which_the_head_meets_a_defect_is_left_to_the_rules_alone(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = certain(0.9, DIMENSION)
    judge = head.judge

    def choking(asked: Any) -> Any:
        if any("poison" in said(pair.older) for pair in asked):
            raise ZeroDivisionError("a defect")
        return judge(asked)

    monkeypatch.setattr(head, "judge", choking)
    world = World(Oracle(None), head=head)
    world.put(*[geoid(f"g{n}", "The poison door is open." if n == 1 else "The door is open.") for n in range(count)])
    [hits] = await world.engine.detect([geoid("new", "The poison door is closed.")])
    models = {older.geoid.id: judgement.model for older, judgement in hits}
    assert models == {f"g{n}": "rules-1" if n == 1 else NAME for n in range(count)}
    assert world.registry.get_sample_value("kimera_cascade_faults_total", {"stage": "head"}) == 1


async def test_a_pair_that_the_verifier_cannot_read_is_the_rules_for_good() -> None:
    world = World(Choking(0.9), head=certain(0.9, DIMENSION))
    world.put(geoid("a", "The poison door is open."))
    [[(_, judgement)]] = await world.engine.detect([geoid("b", "The poison door is closed.")])
    assert (judgement.model, judgement.provisional) == ("rules-1", False)


async def test_many_pairs_are_judged_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, expected in ((2, 0), (9, 1)):
        world = World(Oracle(None), head=certain(0.9, DIMENSION))
        handed: list[Any] = []
        run = world.engine._threads.run

        async def recorded(purpose: str, fn: Any, *args: Any, run: Any = run, handed: Any = handed) -> Any:
            handed.append((purpose, fn))
            return await run(purpose, fn, *args)

        monkeypatch.setattr(world.engine._threads, "run", recorded)
        world.put(*[geoid(f"g{n}", f"The red door {n} is open.") for n in range(count)])
        await world.hits(geoid("b", "The red door is closed."))
        assert handed.count(("score", world.engine._head.judge)) == expected  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("older", "newer", "again"),
    [
        ("The door of hall 3 is open.", "The door of hall 3 is open.", True),
        ("The door of hall 3 is open.", "the door of hall 3 is open", True),
        ("14 crates were loaded.", "14 crates were loaded.", True),
        ("14 crates were loaded.", "15 crates were loaded.", False),
        ("14 crates were loaded.", "Crates were loaded.", False),
        ("The door of hall 3 is open.", "The door of hall 3 is not open.", False),
        ("Anna hired Ben.", "Ben hired Anna.", False),
        ("Valve W7-77 is open.", "Valve W7-78 is open.", False),
        ("The rope is rated for 2 kN and breaks at 9.", "The rope is rated for 9 kN and breaks at 2.", False),
        ("Call Anna before lunch.", "Call Anna after lunch.", False),
    ],
)
async def test_what_is_said_again_is_no_contradiction(older: str, newer: str, again: bool) -> None:
    world = World(Oracle(None), head=certain(0.9, DIMENSION), stages=Stages(scope=False))
    [judgement] = await world.engine.judge_pairs([(geoid("a", older), geoid("b", newer))])
    assert (judgement.model, judgement.score) == (NAME, 0.0 if again else pytest.approx(0.9, abs=1e-4))


@pytest.fixture(scope="module")
def packaged() -> tuple[PairHead, Callable[[str], StoredGeoid]]:
    """What ships: the head, and statements with vectors of the encoder that it is fitted on."""
    encoder = load_encoder(ComputePlan("cpu", "float32", 1), batch_size=2)
    return PairHead.load(), lambda text: replace(geoid(text, text), vector=encoder.encode([text])[0])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The pump is running and nobody has complained.", "FYI: the pump is running and nobody has complained."),
        ("The invoice is due on Friday.", "The invoice is still due on Friday."),
        ("The door of hall 3 is open.", "The door of hall 3 is open now."),
        ("Order 48213 has been shipped.", "Order 48213 was shipped."),
        ("The ferry to Orvane leaves at 10:40 on Sundays.", "On Sundays, the ferry to Orvane leaves at 10:40."),
        ("Ticket 5512 has been closed by Marta.", "Ticket 5512 was closed by Marta."),
        ("Flight KL1702 is delayed by two hours.", "Flight KL1702 is delayed by 2 hours."),
    ],
)
async def test_what_is_said_again_in_nearly_the_same_words_is_not_reported(
    one: str, other: str, packaged: tuple[PairHead, Callable[[str], StoredGeoid]]
) -> None:
    """A feed is full of it, and hurried readers would be told of all of it."""
    head, stored = packaged
    world, older, newer = World(Oracle(None), head=head), stored(one), stored(other)
    judgements = await world.engine.judge_pairs([(older, newer), (newer, older)])
    assert {judgement.model for judgement in judgements} == {"kimera-pair-head-1"}
    assert [judgement.reported for judgement in judgements] == [False, False]


async def test_what_clashes_in_nearly_the_same_words_is_reported(
    packaged: tuple[PairHead, Callable[[str], StoredGeoid]],
) -> None:
    head, stored = packaged
    world = World(Oracle(None), head=head)
    older, newer = stored("The door of hall 3 is open."), stored("FYI: the door of hall 3 is still closed.")
    judgements = await world.engine.judge_pairs([(older, newer), (newer, older)])
    assert [judgement.reported for judgement in judgements] == [True, True]


async def test_an_explanation_says_who_decided() -> None:
    world = World(Oracle(None), head=certain(0.7, DIMENSION))
    judgement = await world.engine.explain(geoid("a", "The door is open."), geoid("b", "The door was painted."))
    stages = by_stage(judgement)
    assert not stages["verify"].ran
    assert stages["verify"].note == f"unavailable: {NAME} decides provisionally, 0.7000"
    assert stages["scope"].value == pytest.approx(0.7, abs=1e-4)
    assert stages["threshold"].value == POINTS["balanced"]
    assert stages["threshold"].passed
    assert (judgement.model, judgement.provisional) == (NAME, True)
