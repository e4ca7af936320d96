"""The geoid model."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimera_stream.core.geoid import built, entropy_bits, merged, new_id, normalised, same_statement, unit
from kimera_stream.core.interfaces import StoredGeoid
from kimera_stream.protocol.channels import is_id
from kimera_stream.protocol.objects import Geoid, GeoidBody

weights = st.dictionaries(st.text(min_size=1, max_size=3), st.floats(0, 1e6), max_size=8)


def make(body: GeoidBody, previous: Geoid | None = None, now: int = 1000) -> Geoid:
    return built(body, geoid_id="g", session_id="s", now=now, offset=7, previous=previous)


def test_ids_are_url_safe_distinct_and_sort_by_time() -> None:
    ids = [new_id(1000 + i) for i in range(100)]
    assert ids == sorted(ids)
    assert all(is_id(each) for each in ids)
    assert len({new_id(5) for _ in range(1000)}) == 1000


@pytest.mark.parametrize(
    ("state", "bits"),
    [({}, 0), ({"a": 5}, 0), ({"a": 1, "b": 1}, 1), (dict.fromkeys("abcdefgh", 0.1), 3), ({"a": 1, "b": 0}, 0)],
)
def test_entropy_is_shannons_in_bits(state: dict[str, float], bits: float) -> None:
    assert entropy_bits(state) == pytest.approx(bits)


@given(weights)
def test_entropy_lies_between_zero_and_the_logarithm_of_the_keys(state: dict[str, float]) -> None:
    assert 0 <= entropy_bits(state) <= math.log2(max(1, len(state))) + 1e-9


@given(weights)
def test_a_state_is_normalised_once_and_for_all(state: dict[str, float]) -> None:
    once = normalised(state)
    assert not once or math.fsum(once.values()) == pytest.approx(1)
    assert all(value > 0 for value in once.values())
    assert normalised(once) == once


@given(st.lists(st.floats(-1e30, 1e30), min_size=3, max_size=3).filter(lambda v: max(map(abs, v)) > 1e-30))
def test_vectors_become_unit_rows_of_any_magnitude(vector: list[float]) -> None:
    row = unit(vector)
    assert row.dtype == np.float32
    assert np.linalg.norm(row.astype(np.float64)) == pytest.approx(1, abs=1e-6)


def test_an_update_keeps_when_it_was_created_and_counts_versions() -> None:
    first = make(GeoidBody(text="a", semantic_state={"x": 2, "y": 2}))
    second = make(GeoidBody(text="b"), first, now=2000)
    assert (first.version, first.entropy, first.session_id) == (1, 1.0, "s")
    assert (second.version, second.created_at, second.updated_at) == (2, 1000, 2000)
    assert second.semantic_state == {}


def test_a_patch_keeps_what_it_leaves_out() -> None:
    first = make(GeoidBody(text="a", symbolic_state={"k": 1}, metadata={"m": 1}, purpose="p", session_id="own"))
    body = merged(GeoidBody(metadata={"m": 2}, symbolic_state={}), first)
    assert (body.text, body.symbolic_state, body.metadata, body.purpose) == ("a", {}, {"m": 2}, "p")
    assert (body.id, body.session_id) == ("g", "own")


def test_only_labels_changed_means_the_same_statement() -> None:
    vector = unit([1.0, 2.0, 3.0])

    def stored(**body: object) -> StoredGeoid:
        return StoredGeoid(make(GeoidBody(**{"text": "a", "symbolic_state": {"k": 1}, **body})), vector, "p")  # type: ignore[arg-type]

    base = stored()
    assert same_statement(stored(metadata={"x": 1}, purpose="other"), base)
    assert not same_statement(stored(text="b"), base)
    assert not same_statement(stored(symbolic_state={"k": 2}), base)
    assert not same_statement(stored(semantic_state={"k": 2.0}), base)
    assert not same_statement(StoredGeoid(base.geoid, unit([3.0, 2.0, 1.0]), "p"), base)
    assert not same_statement(StoredGeoid(base.geoid, None, "p"), base)
