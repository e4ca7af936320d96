"""What the programs that measure quality take for their pairs, and how they tell it."""

import gzip
import json
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from bench import reliability
from bench.quality import MEASURED, UNSEEN, public_pairs
from training.verifier.clusters import Cluster, Item
from training.verifier.examples import CONTRADICTION, NEUTRAL, split_of
from training.verifier.public import MEASURING, TRAINING


def test_quality_is_measured_on_unseen_premises_of_a_set_that_trains(tmp_path: Path) -> None:
    assert set(UNSEEN) <= {source.file for source in TRAINING}, "others are measured whole"
    assert set(MEASURED) == set(MEASURING)
    for name in ("snli_dev", "cad_dev"):
        rows = [{"premise": f"Door {n} is open.", "hypothesis": "It is shut.", "label": "neutral"} for n in range(200)]
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)
    unseen = public_pairs(tmp_path, "snli_dev", 100)
    assert 5 < len(unseen) < 40
    assert {split_of(premise) for premise, *_ in unseen} == {"test"}
    assert len(public_pairs(tmp_path, "snli_dev", 5)) == 5
    assert len(public_pairs(tmp_path, "cad_dev", 1000)) == 200


@pytest.mark.anyio
async def test_reliability_is_told_of_what_the_cascade_says_of_texts_and_symbols() -> None:
    cluster = Cluster(
        "The door was open yesterday.",
        (
            Item("Yesterday the door was closed.", CONTRADICTION, "antonym"),
            Item("The door is red.", NEUTRAL, "additive"),
        ),
        "here",
    )
    alike = np.eye(1, 384, dtype=np.float32)[0]
    found = await reliability.measure(None, [cluster], [], defaultdict(lambda: alike))
    assert {name: part["pairs"] for name, part in found.items() if not name.startswith("states")} == {
        "clusters": 2,
        "stories": 0,
        "the same day word, two days apart": 1,
    }
    [(pairs, mean, share)] = found["the same day word, two days apart"]["bins"]
    assert (pairs, share) == (1, 0.0)
    assert mean <= 0.2
    exact = found["states with a subject"]
    assert exact["bins"][-1] == (exact["contradictions"], 0.99, 1.0)
    loose = found["states without a subject"]
    assert loose["bins"][-1][1] == pytest.approx(0.9, abs=0.05)
    assert loose["bins"][-1][0] > loose["contradictions"] == exact["contradictions"]


def test_a_reliability_diagram_shows_each_bin_where_it_belongs() -> None:
    truth = np.array([True, False, False, False, True, True])
    part = reliability.figures(truth, np.array([0.2, 0.2, 0.2, 0.2, 0.9, 0.9]))
    assert part["bins"] == [(4, 0.2, 0.25), (2, 0.9, 1.0)]
    assert part["ece"] == pytest.approx((4 * 0.05 + 2 * 0.1) / 6, abs=1e-3)
    drawn = ElementTree.fromstring(reliability.diagram({"clusters": part}))
    dots = [(dot.get("cx"), dot.get("cy")) for dot in drawn.iter("{http://www.w3.org/2000/svg}circle")]
    assert dots == [("40.0", "150.0"), ("180.0", "0.0")]
