"""Pair heads for tests."""

from typing import Any

import numpy as np

from kimera_stream.engines.pair_head import EXTRAS, PairHead

NAME = "head-1"
POINTS = {"precise": 0.9, "balanced": 0.5, "sensitive": 0.2}


def card(**changes: Any) -> dict[str, Any]:
    return {
        "name": NAME,
        "encoder": "tests",
        "extras": list(EXTRAS),
        "calibration": {"scale": 1.0, "shift": 0.0},
        "operating_points": POINTS,
    } | changes


def weights(dimension: int, hidden: int = 3, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"w1": (hidden, 2 * dimension + len(EXTRAS)), "b1": (hidden,), "w2": (hidden,), "b2": (1,)}
    return {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}


def certain(probability: float, dimension: int) -> PairHead:
    """One that gives every pair the same probability."""
    still = {name: np.zeros_like(value) for name, value in weights(dimension).items()}
    still["b2"][0] = np.log(probability / (1 - probability))
    return PairHead(card(), still)
