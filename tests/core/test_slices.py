"""Which slice a name belongs to, and who should own which."""

from hypothesis import given
from hypothesis import strategies as st

from kimera_stream.core.slices import lane_slice, shares, slice_of


def test_a_name_has_one_slice_for_ever():
    assert [slice_of(name, 16) for name in ("a", "b", "geoid-1")] == [15, 5, 9]
    assert lane_slice("ann", None, 16) == lane_slice("ann", "", 16)


@given(st.sets(st.text(min_size=1), max_size=6), st.integers(1, 40))
def test_every_slice_has_one_owner_and_the_shares_are_even(names, slices):
    given_out = shares(names, slices)
    owned = [number for numbers in given_out.values() for number in numbers]
    assert sorted(owned) == (list(range(slices)) if names else [])
    assert all(len(numbers) <= -(-slices // len(names)) for numbers in given_out.values())
    assert shares(sorted(names, reverse=True), slices) == given_out


def test_a_node_that_goes_leaves_most_slices_where_they_were():
    before, after = shares(["a", "b", "c", "d"], 64), shares(["a", "b", "c"], 64)
    moved = sum(len(before[name] - after[name]) for name in after)
    assert moved <= 8
