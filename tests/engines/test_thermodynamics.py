"""Entropies of pairs and scars, and the advice drawn from them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimera_stream.engines.thermodynamics import advice, mixture, pulse_strength, scar

STATES = st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 10), max_size=6)


def test_mixture_is_even_and_falls_back_to_the_other() -> None:
    assert mixture({"a": 2.0}, {"b": 8.0}) == {"a": 0.5, "b": 0.5}
    assert mixture({}, {"b": 3.0}) == {"b": 1.0}
    assert mixture({}, {}) == {}


@pytest.mark.parametrize(
    ("decision", "pre", "post"),
    # the mixture of {a} and {b} has 1 bit; not knowing which holds adds the score
    [("collapse", 1.8, 0.0), ("surge", 1.8, 2.0), ("buffer", 1.8, 1.4)],
)
def test_scar_entropies(decision: str, pre: float, post: float) -> None:
    result = scar({"a": 1.0}, {"b": 1.0}, 0.8, decision)  # type: ignore[arg-type]
    assert result.pre_entropy == pytest.approx(pre)
    assert result.post_entropy == pytest.approx(post)
    assert result.delta_entropy == pytest.approx(post - pre)
    assert result.weight == pytest.approx(0.8 + abs(post - pre))


@given(STATES, STATES, st.floats(0, 1))
def test_collapse_never_leaves_more_than_surge(a: dict[str, float], b: dict[str, float], score: float) -> None:
    collapse, surge = scar(a, b, score, "collapse"), scar(a, b, score, "surge")
    buffer = scar(a, b, score, "buffer")
    assert buffer.post_entropy <= buffer.pre_entropy + 1e-9
    assert collapse.pre_entropy == surge.pre_entropy == buffer.pre_entropy
    assert surge.post_entropy >= buffer.post_entropy
    assert min(collapse.weight, surge.weight, buffer.weight) >= score


@given(st.floats(0, 1), st.floats(-1, 1))
def test_pulse_stays_in_its_range(score: float, relatedness: float) -> None:
    assert 0 <= pulse_strength(score, relatedness) <= score


def test_advice() -> None:
    even, sharp = {"a": 1.0, "b": 1.0}, {"a": 1.0}
    assert advice(even, even, 0.6, sure=0.8) == "buffer"
    assert advice(even, even, 0.9, sure=0.8) == "collapse"
    assert advice(sharp, even, 0.9, sure=0.8) == "surge"
