"""The pair head and the standing queries, against their definitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimera_stream import kernels

VARIANTS = kernels.variants() or ("numpy",)


def load(variant: str) -> kernels.Kernel:
    return kernels.load("reference") if variant == "numpy" else kernels.load("compiled", variant=variant)


@pytest.mark.parametrize("variant", [*VARIANTS, "numpy"])
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32), n=st.integers(0, 20), dim=st.integers(1, 70), extras=st.integers(0, 5),
    hidden=st.integers(1, 9),
)  # fmt: skip
def test_the_pair_head_is_two_layers_over_the_features(
    variant: str, seed: int, n: int, dim: int, extras: int, hidden: int
) -> None:
    rng = np.random.default_rng(seed)
    query, rows = rng.standard_normal(dim).astype("f4"), rng.standard_normal((n, dim)).astype("f4")
    extra = rng.standard_normal((n, extras)).astype("f4")
    w1, b1 = rng.standard_normal((hidden, 2 * dim + extras)).astype("f4"), rng.standard_normal(hidden).astype("f4")
    w2 = rng.standard_normal(hidden).astype("f4")
    expected = []
    for row, more in zip(rows, extra, strict=True):
        features = np.concatenate([np.abs(query - row), query * row, more])
        expected.append(w2 @ np.maximum(w1 @ features + b1, 0) + 0.25)
    found = load(variant).pair_head(query, rows, extra, w1, b1, w2, 0.25)
    np.testing.assert_allclose(found, np.array(expected, "f4"), rtol=1e-3, atol=1e-3)


def test_the_pair_head_refuses_shapes_that_do_not_fit() -> None:
    kernel = kernels.load()
    one = np.ones(3, np.float32)
    rows = np.ones((2, 3), np.float32)
    extra = np.ones((2, 1), np.float32)
    w1, b1, w2 = np.ones((4, 7), np.float32), np.ones(4, np.float32), np.ones(4, np.float32)
    kernel.pair_head(one, rows, extra, w1, b1, w2, 0.0)
    with pytest.raises(ValueError, match="w1: expected shape"):
        kernel.pair_head(one, rows, extra, w1[:, :6].copy(), b1, w2, 0.0)
    with pytest.raises(ValueError, match="extra: expected shape"):
        kernel.pair_head(one, rows, extra[:1], w1, b1, w2, 0.0)
    with pytest.raises(ValueError, match="query: expected finite"):
        kernel.pair_head(one * np.float32("nan"), rows, extra, w1, b1, w2, 0.0)


@pytest.mark.parametrize("variant", [*VARIANTS, "numpy"])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(0, 200), dim=st.integers(1, 100))
def test_a_statement_finds_the_watches_that_want_it(variant: str, seed: int, n: int, dim: int) -> None:
    rng = np.random.default_rng(seed)
    vector, rows = rng.standard_normal(dim).astype("f4"), rng.standard_normal((n, dim)).astype("f4")
    thresholds = rng.standard_normal(n).astype("f4")
    indices, cosines = load(variant).match(vector, rows, thresholds)
    exact = rows @ vector
    sure = np.abs(exact - thresholds) > 1e-4
    assert set(indices.tolist()) - set(np.flatnonzero(~sure).tolist()) == set(
        np.flatnonzero((exact >= thresholds) & sure).tolist()
    )
    assert (np.diff(indices) > 0).all()
    np.testing.assert_allclose(cosines, exact[indices], atol=1e-4)


def test_watches_refuse_what_is_not_a_number() -> None:
    rows = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match="thresholds: expected numbers"):
        kernels.load().match(rows[0].copy(), rows, np.array([0, np.nan], np.float32))
    with pytest.raises(ValueError, match="vector: expected finite"):
        kernels.load().match(np.full(3, np.inf, np.float32), rows, np.zeros(2, np.float32))
