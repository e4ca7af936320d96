"""Rows in 8 bits: how they are rounded and how much they lose."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kimera_stream import kernels
from kimera_stream.kernels import reference

ELEMENTS = st.floats(-1, 1, width=32, allow_nan=False)


@settings(max_examples=150, deadline=None)
@given(arrays.arrays(np.float32, st.tuples(st.integers(0, 5), st.integers(1, 130)), elements=ELEMENTS))
def test_compiled_and_reference_agree(vectors: np.ndarray) -> None:
    codes, grades, lost = kernels.quantize(vectors)
    expected_codes, expected_grades, expected_lost = reference.quantize(vectors)
    assert grades.tolist() == expected_grades.tolist()
    assert np.abs(codes.astype(int) - expected_codes.astype(int)).max(initial=0) <= 1, "a tie may round either way"
    assert (codes != expected_codes).sum() <= 0.02 * codes.size + 1
    np.testing.assert_allclose(lost, expected_lost, atol=1e-5)


@settings(max_examples=150, deadline=None)
@given(arrays.arrays(np.float32, st.integers(1, 130), elements=ELEMENTS))
def test_what_is_lost_is_what_is_said_and_bounded(vector: np.ndarray) -> None:
    codes, grades, lost = kernels.quantize(vector[None])
    step = np.exp2(-int(grades[0]) / 32.0) / 127.0
    restored = (codes[0, : len(vector)].astype(np.float64) - 128) * step
    assert np.linalg.norm(vector - restored) == pytest.approx(float(lost[0]), abs=1e-5)
    assert np.abs(vector - restored).max() <= 0.51 * step
    assert (codes[0, len(vector) :] == 128).all(), "padding stands for zero"


def test_elements_beyond_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        kernels.quantize(np.array([[1.5, 0.0]], np.float32))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("coded", [True, False])
def test_a_written_row_is_the_quantised_row(exact: bool, coded: bool) -> None:
    rng = np.random.default_rng(0)
    vector = rng.standard_normal(50).astype(np.float32)
    vector /= np.linalg.norm(vector)
    codes = np.zeros((4, 64), np.uint8) if coded else None
    grades = np.zeros(4, np.uint8) if coded else None
    rows = np.zeros((4, 50), np.float32) if exact else None
    lost = kernels.write_row(vector, codes, grades, rows, 2)
    expected, grade, expected_lost = kernels.quantize(vector[None])
    if codes is not None and grades is not None:
        assert codes[2].tolist() == expected[0].tolist()
        assert grades[2] == grade[0]
        assert lost == pytest.approx(float(expected_lost[0]))
        assert not codes[[0, 1, 3]].any()
    if rows is not None:
        assert rows[2].tolist() == vector.tolist()
        assert not rows[[0, 1, 3]].any()


def test_a_row_that_is_not_finite_is_not_written() -> None:
    codes, grades = np.zeros((1, 64), np.uint8), np.zeros(1, np.uint8)
    rows = np.zeros((1, 3), np.float32)
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match="finite"):
            kernels.write_row(np.array([0, value, 0], np.float32), codes, grades, rows, 0)
    assert not rows.any()
    assert not codes.any()


@settings(max_examples=100, deadline=None)
@given(
    arrays.arrays(np.float32, st.tuples(st.integers(0, 5), st.integers(1, 130)), elements=ELEMENTS),
    st.integers(0, 3), st.booleans(), st.booleans(),
)  # fmt: skip
def test_rows_written_together_are_those_written_one_by_one(
    vectors: np.ndarray, start: int, exact: bool, coded: bool
) -> None:
    n, dim = vectors.shape
    stride = kernels.stride_of(dim)

    def columns() -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
        return (
            np.zeros((n + 4, stride), np.uint8) if coded else None,
            np.zeros(n + 4, np.uint8) if coded else None,
            np.zeros((n + 4, dim), np.float32) if exact else None,
        )

    together, apart = columns(), columns()
    lost = kernels.write_rows(vectors, *together, start)
    each = [kernels.write_row(vector, *apart, start + i) for i, vector in enumerate(vectors)]
    assert lost == max(each, default=0.0)
    for mine, theirs in zip(together, apart, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_rows_of_which_one_is_not_finite_are_not_written() -> None:
    codes, grades, rows = np.zeros((3, 64), np.uint8), np.zeros(3, np.uint8), np.zeros((3, 2), np.float32)
    for value in (np.nan, -np.inf):
        with pytest.raises(ValueError, match="finite"):
            kernels.write_rows(np.array([[1, 0], [0, value], [1, 0]], np.float32), codes, grades, rows, 0)
    assert not rows.any()
    assert not codes.any()
