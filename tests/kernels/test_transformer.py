"""The transformer in C beside the same network written down in numpy, float64."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimera_stream.kernels.transformer import LayerWeights, Transformer, variants

pytestmark = pytest.mark.skipif(not variants(), reason="no transformer in C here, or not for this processor")

WIDTH, HEADS, INNER, WORDS, PLACES = 64, 2, 96, 50, 300


def network(seed: int, scale: float = 0.2, layers: int = 2) -> dict[str, Any]:
    make = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return (make.standard_normal(shape) * scale).astype(np.float32)

    def norm() -> tuple[np.ndarray, np.ndarray]:
        return 1 + draw(WIDTH), draw(WIDTH)

    return {
        "tables": [draw(WORDS, WIDTH), draw(PLACES, WIDTH)],
        "norm": norm(),
        "layers": [
            LayerWeights(
                attend=(draw(3 * WIDTH, WIDTH), draw(3 * WIDTH)),
                output=(draw(WIDTH, WIDTH), draw(WIDTH)),
                attention_norm=norm(),
                widen=(draw(INNER, WIDTH), draw(INNER)),
                narrow=(draw(WIDTH, INNER), draw(WIDTH)),
                output_norm=norm(),
            )
            for _ in range(layers)
        ],
    }


def oracle(parts: dict[str, Any], words: np.ndarray) -> np.ndarray:
    """States of one sequence after all layers, float64."""
    from math import erf

    def normed(rows: np.ndarray, norm: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        centred = rows - rows.mean(axis=1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-12) * norm[0] + norm[1]

    def linear(rows: np.ndarray, projection: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        return rows @ projection[0].T.astype(np.float64) + projection[1]

    state = normed(parts["tables"][0][words].astype(np.float64) + parts["tables"][1][: len(words)], parts["norm"])
    for layer in parts["layers"]:
        query, key, value = (
            part.reshape(len(words), HEADS, -1).transpose(1, 0, 2)
            for part in np.split(linear(state, layer.attend), 3, axis=1)
        )
        scores = query @ key.transpose(0, 2, 1) / np.sqrt(WIDTH // HEADS)
        powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
        context = (powers / powers.sum(axis=-1, keepdims=True) @ value).transpose(1, 0, 2).reshape(len(words), WIDTH)
        state = normed(state + linear(context, layer.output), layer.attention_norm)
        wide = linear(state, layer.widen)
        inner = wide * 0.5 * (1 + np.vectorize(erf)(wide / np.sqrt(2)))
        state = normed(state + linear(inner, layer.narrow), layer.output_norm)
    return state


def run(made: Transformer, sequences: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    lengths = [len(each) for each in sequences]
    mean, first = made.forward(
        [np.concatenate(sequences), np.concatenate([np.arange(length) for length in lengths])], lengths, first=True
    )
    assert first is not None
    return mean, first


@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("threads", [1, 3])
@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=9),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0.02, 0.1, 0.2]),  # beyond, softmax picks one token and rounding picks which,
)
def test_it_computes_what_the_network_says(
    variant: str, threads: int, lengths: list[int], seed: int, scale: float
) -> None:
    parts = network(seed, scale)
    made = Transformer(**parts, heads=HEADS, threads=threads, variant=variant)
    words = [np.random.default_rng(seed + length).integers(0, WORDS, length) for length in lengths]
    mean, first = run(made, words)
    for row, head, each in zip(mean, first, words, strict=True):
        expected = oracle(parts, each)
        size = np.abs(expected).max()
        assert np.abs(row - expected.mean(axis=0)).max() < 0.02 * size
        assert np.abs(head - expected[0]).max() < 0.05 * size
        assert np.linalg.norm(head - expected[0]) < 0.02 * np.linalg.norm(expected[0])


@pytest.mark.parametrize("variant", variants())
def test_company_and_threads_do_not_change_a_bit(variant: str) -> None:
    parts = network(1)
    sequences = [np.random.default_rng(n).integers(0, WORDS, n) for n in (1, 5, 40, 7, 130, 12, 40)]
    one = run(Transformer(**parts, heads=HEADS, threads=1, variant=variant), sequences)
    made = Transformer(**parts, heads=HEADS, threads=4, variant=variant)
    for got in (run(made, sequences), tuple(part[::-1] for part in run(made, sequences[::-1]))):
        np.testing.assert_array_equal(got[0], one[0])
        np.testing.assert_array_equal(got[1], one[1])


@pytest.mark.parametrize("variant", variants())
def test_weights_and_rows_at_their_largest_do_not_overflow(variant: str) -> None:
    parts = network(2, layers=1)
    layer = parts["layers"][0]
    layer.attend[0][:] = 1.0  # every weight at the largest step, every element of a row too
    layer.widen[0][:] = 1.0
    layer.narrow[0][:] = -1.0
    parts["norm"][0][:] = 0.0
    parts["norm"][1][:] = 3.0
    layer.attention_norm[0][:] = 0.0
    layer.attention_norm[1][:] = 5.0
    words = np.arange(9)
    _, first = run(Transformer(**parts, heads=HEADS, variant=variant), [words])
    expected = oracle(parts, words)[0]
    assert np.linalg.norm(first[0] - expected) < 0.01 * np.linalg.norm(expected)


def test_what_does_not_fit_is_refused() -> None:
    parts = network(3)
    made = Transformer(**parts, heads=HEADS)
    for ids, lengths in (
        ([[1, 2], [0, 1]], [3]),
        ([[1, WORDS], [0, 1]], [2]),
        ([[1, -1], [0, 1]], [2]),
        ([[1, 2], [0, 1]], [2, 0]),
        ([[1, 2]], [2]),
    ):
        with pytest.raises(ValueError, match="ids"):
            made.forward([np.array(each) for each in ids], lengths)
    mean, first = made.forward([np.array([], dtype=np.int32)] * 2, [])
    assert mean.shape == (0, WIDTH)
    assert first is None
    with pytest.raises(ValueError, match="heads"):
        Transformer(**parts, heads=5)
    parts["layers"][1].widen[0][3, 3] = np.nan
    with pytest.raises(ValueError, match="weight"):
        Transformer(**parts, heads=HEADS)
