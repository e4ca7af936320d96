"""Symbolic conflict, against the contract's paragraph."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimera_stream.engines.symbolic import compare_states, same_value

scalars = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.floats(-3, 3), st.text(max_size=2))
states = st.dictionaries(st.sampled_from(["status", "owner", "subject", "as_of"]), scalars, max_size=4)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [(1, 1.0, True), (True, 1, False), ("1", 1, False), ("a", "A", False), (None, None, True), (None, 0, False)],
)
def test_numbers_compare_by_value_and_strings_exactly(one: object, other: object, same: bool) -> None:
    assert same_value(one, other) is same  # type: ignore[arg-type]


def test_a_key_both_hold_with_different_values_conflicts() -> None:
    verdict = compare_states({"status": "up", "host": "a"}, {"status": "down", "port": 1})
    assert verdict.conflicts == (("status", "up", "down"),)
    assert verdict.opposition == 1.0
    assert (verdict.shared, verdict.union) == (1, 3)


@pytest.mark.parametrize(
    "extra",
    [
        ({"subject": "db-1"}, {"subject": "db-2"}),
        ({"as_of": 1}, {"as_of": 2}),
        ({"valid_to": 100}, {"valid_from": 100}),
        ({"valid_from": 5, "valid_to": 9}, {"valid_from": 20}),
    ],
)
def test_other_subjects_moments_and_periods_rule_a_conflict_out(
    extra: tuple[dict[str, object], dict[str, object]],
) -> None:
    verdict = compare_states({"status": "up", **extra[0]}, {"status": "down", **extra[1]})  # type: ignore[dict-item]
    assert verdict.conflicts == ()
    assert verdict.apart


@pytest.mark.parametrize(
    "extra",
    [
        ({"subject": "db-1"}, {}),
        ({"as_of": 1}, {"as_of": 1.0}),
        ({"valid_to": 101}, {"valid_from": 100}),
        ({"valid_from": 7, "valid_to": 7}, {"valid_from": 7}),
        ({"valid_from": 7}, {}),
    ],
)
def test_one_sided_and_overlapping_scopes_leave_it(extra: tuple[dict[str, object], dict[str, object]]) -> None:
    verdict = compare_states({"status": "up", **extra[0]}, {"status": "down", **extra[1]})  # type: ignore[dict-item]
    assert len(verdict.conflicts) == 1


def test_reserved_keys_are_no_facts() -> None:
    verdict = compare_states({"subject": "a", "valid_from": 1}, {"subject": "a", "valid_from": 2})
    assert verdict.conflicts == ()
    assert verdict.same_subject


@given(states, states)
def test_the_verdict_is_symmetric(a: dict[str, object], b: dict[str, object]) -> None:
    one, other = compare_states(a, b), compare_states(b, a)  # type: ignore[arg-type]
    assert [(key, y, x) for key, x, y in one.conflicts] == list(other.conflicts)
    assert bool(one.apart) == bool(other.apart)
    assert one.same_subject == other.same_subject


@given(states)
def test_nothing_conflicts_with_itself(state: dict[str, object]) -> None:
    assert compare_states(state, state).conflicts == ()  # type: ignore[arg-type]
