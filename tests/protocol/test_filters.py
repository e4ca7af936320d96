"""Filters: the contract's semantics, compared with a plain interpreter over random trees and events."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimera_stream.protocol.errors import BadFilterError
from kimera_stream.protocol.filters import compile_filter, read_key

EVENT = {
    "op": "event",
    "channel": "contradictions",
    "offset": 7,
    "type": "contradiction.found",
    "data": {
        "score": 0.8,
        "state": "open",
        "why": ["negation", "symbolic: status"],
        "components": {"relatedness": 1, "a.b": True},
        "a_text": None,
        "provisional": False,
    },
}


def leaf(field: str, op: str, *value: Any) -> dict[str, Any]:
    return {"field": field, "op": op, **({"value": value[0]} if value else {})}


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        (leaf("data.score", "gte", 0.8), True),
        (leaf("data.score", "gt", 0.8), False),
        (leaf("data.score", "lt", "0.9"), False),
        (leaf("data.state", "gt", "a"), True),
        (leaf("data.components.relatedness", "eq", 1.0), True),
        (leaf("data.components.relatedness", "eq", True), False),
        (leaf("data.provisional", "eq", 0), False),
        (leaf("data.provisional", "eq", False), True),
        (leaf("data.components.a.b", "eq", True), True),
        (leaf("data.a_text", "exists"), True),
        (leaf("data.a_text", "eq", None), True),
        (leaf("data.b_text", "exists"), False),
        (leaf("data.b_text", "exists", False), True),
        (leaf("data.b_text", "eq", None), False),
        (leaf("data.b_text", "ne", "x"), True),
        (leaf("data.b_text", "nin", ["x"]), True),
        (leaf("data.b_text", "in", ["x"]), False),
        (leaf("data.b_text", "lt", 1), False),
        (leaf("data.b_text", "prefix", ""), False),
        (leaf("data.state", "ne", 3), True),
        (leaf("data.state", "in", ["open", "resolved"]), True),
        (leaf("data.components.relatedness", "in", [1.0]), True),
        (leaf("data.components.relatedness", "in", [True]), False),
        (leaf("data.components", "in", ["x"]), False),
        (leaf("data.state", "prefix", "op"), True),
        (leaf("data.state", "suffix", "en"), True),
        (leaf("data.score", "prefix", "0"), False),
        (leaf("data.why", "contains", "negation"), True),
        (leaf("data.why", "contains", "neg"), False),
        (leaf("data.state", "contains", "pe"), True),
        (leaf("data.components", "contains", "relatedness"), True),
        (leaf("data.score", "contains", 0.8), False),
        (leaf("data.why.0", "eq", "negation"), True),
        (leaf("data.why.9", "exists"), False),
        (leaf("data.score.deeper", "exists"), False),
        (leaf("type", "eq", "contradiction.found"), True),
        ({"not": leaf("data.b_text", "eq", 1)}, True),
        ({"all": [leaf("offset", "gt", 6), leaf("offset", "lt", 8)]}, True),
        ({"any": [leaf("offset", "gt", 7), leaf("offset", "lt", 7)]}, False),
    ],
)
def test_semantics(tree: dict[str, Any], expected: bool) -> None:
    assert compile_filter(tree).matches(EVENT) is expected


@pytest.mark.parametrize(
    ("tree", "path"),
    [
        ([], "filter"),
        ("x", "filter"),
        ({}, "filter"),
        ({"all": []}, "filter.all"),
        ({"any": {"field": "a", "op": "exists"}}, "filter.any"),
        ({"all": [leaf("a", "exists")], "any": [leaf("a", "exists")]}, "filter"),
        ({"not": [leaf("a", "exists")]}, "filter.not"),
        ({"all": [leaf("a", "exists"), leaf("b", "like", "x")]}, "filter.all[1].op"),
        (leaf("", "eq", 1), "filter.field"),
        (leaf("a..b", "eq", 1), "filter.field"),
        ({"field": 3, "op": "eq", "value": 1}, "filter.field"),
        ({"field": "a", "op": ["eq"], "value": 1}, "filter.op"),
        (leaf("a", "eq"), "filter.value"),
        (leaf("a", "eq", [1]), "filter.value"),
        (leaf("a", "in", "x"), "filter.value"),
        (leaf("a", "in", [[1]]), "filter.value[0]"),
        (leaf("a", "gt", True), "filter.value"),
        (leaf("a", "gt", float("nan")), "filter.value"),
        (leaf("a", "prefix", 1), "filter.value"),
        (leaf("a", "exists", 1), "filter.value"),
        ({"field": "a", "op": "eq", "value": 1, "flags": "i"}, "filter"),
    ],
)
def test_a_bad_tree_is_refused_naming_the_node(tree: Any, path: str) -> None:
    with pytest.raises(BadFilterError) as caught:
        compile_filter(tree)
    assert caught.value.field == path
    assert str(caught.value).startswith(path + ":")


def nested(levels: int) -> dict[str, Any]:
    tree = leaf("a", "exists")
    for _ in range(levels - 1):
        tree = {"not": tree}
    return tree


def test_limits_of_nodes_and_levels() -> None:
    compile_filter(nested(8))
    with pytest.raises(BadFilterError, match="8 levels"):
        compile_filter(nested(9))
    compile_filter({"all": [leaf("a", "eq", i) for i in range(63)]})
    with pytest.raises(BadFilterError, match="64 nodes"):
        compile_filter({"all": [leaf("a", "eq", i) for i in range(64)]})


def test_equal_filters_share_a_key_whatever_their_order() -> None:
    a, b = leaf("a", "eq", 1), leaf("b", "in", ["x", "y"])
    one = compile_filter({"all": [a, b]})
    assert one == compile_filter({"all": [leaf("b", "in", ["y", "x", "y"]), a, a]})
    assert hash(one) == hash(compile_filter({"all": [b, a]}))
    assert one != compile_filter({"any": [a, b]})
    assert compile_filter({"all": [a]}) == compile_filter(a)
    assert compile_filter(leaf("a", "eq", 1)) == compile_filter(leaf("a", "eq", 1.0))
    assert compile_filter(leaf("a", "eq", 1)) != compile_filter(leaf("a", "eq", True))


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([0.0, 0.5, 1.0, -2.0]),
    st.sampled_from(["", "a", "ab"]),
)
fields = st.sampled_from(["a", "b", "a.b", "a.b.c", "b.0", "c"])
leaves = st.one_of(
    st.builds(lambda f, o, v: leaf(f, o, v), fields, st.sampled_from(["eq", "ne", "contains"]), scalars),
    st.builds(lambda f, o, v: leaf(f, o, v), fields, st.sampled_from(["in", "nin"]), st.lists(scalars, max_size=3)),
    st.builds(
        lambda f, o, v: leaf(f, o, v),
        fields,
        st.sampled_from(["gt", "gte", "lt", "lte"]),
        st.one_of(st.integers(-3, 3), st.sampled_from(["", "a", "ab"])),
    ),
    st.builds(lambda f, o, v: leaf(f, o, v), fields, st.sampled_from(["prefix", "suffix"]), st.sampled_from(["", "a"])),
    st.builds(lambda f, v: leaf(f, "exists", v), fields, st.booleans()),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(lambda t: {"not": t}, inner),
        st.builds(lambda n, ts: {n: ts}, st.sampled_from(["all", "any"]), st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=8,
)
values = st.recursive(
    scalars,
    lambda v: st.one_of(st.lists(v, max_size=2), st.dictionaries(st.sampled_from("abc"), v, max_size=3)),
    max_leaves=6,
)
events = st.dictionaries(st.sampled_from("abc"), values, max_size=3)

ABSENT = object()


def look(event: Any, path: str) -> Any:
    for part in path.split("."):
        if isinstance(event, dict) and part in event:
            event = event[part]
        elif isinstance(event, list) and part.isdigit() and int(part) < len(event):
            event = event[int(part)]
        else:
            return ABSENT
    return event


def kind(value: Any) -> str:
    return "bool" if isinstance(value, bool) else "num" if isinstance(value, int | float) else type(value).__name__


def same(a: Any, b: Any) -> bool:
    return kind(a) == kind(b) and kind(a) not in ("dict", "list") and a == b


def interpret(tree: dict[str, Any], event: dict[str, Any]) -> bool:
    if "all" in tree:
        return all(interpret(t, event) for t in tree["all"])
    if "any" in tree:
        return any(interpret(t, event) for t in tree["any"])
    if "not" in tree:
        return not interpret(tree["not"], event)
    seen, op, value = look(event, tree["field"]), tree["op"], tree.get("value")
    if op == "exists":
        return (seen is not ABSENT) == value
    if op == "ne":
        return not same(seen, value)
    if op == "nin":
        return not any(same(seen, v) for v in value)
    if seen is ABSENT:
        return False
    if op == "eq":
        return same(seen, value)
    if op == "in":
        return any(same(seen, v) for v in value)
    if op == "contains":
        if isinstance(seen, list):
            return any(same(v, value) for v in seen)
        return isinstance(value, str) and isinstance(seen, str | dict) and value in seen
    if kind(seen) != kind(value):
        return False
    if op == "prefix":
        return seen.startswith(value)
    if op == "suffix":
        return seen.endswith(value)
    return {"gt": seen > value, "gte": seen >= value, "lt": seen < value, "lte": seen <= value}[op]


@given(trees, events)
def test_agrees_with_an_interpreter(tree: dict[str, Any], event: dict[str, Any]) -> None:
    compiled = compile_filter(tree, max_nodes=10_000, max_depth=100)
    assert compiled.matches(event) is interpret(tree, event)


@given(trees, trees, events)
def test_equal_keys_mean_equal_answers(one: dict[str, Any], other: dict[str, Any], event: dict[str, Any]) -> None:
    a = compile_filter({"any": [one, other]}, max_nodes=10_000, max_depth=100)
    b = compile_filter({"any": [other, one, other]}, max_nodes=10_000, max_depth=100)
    assert a == b
    assert a.matches(event) is b.matches(event)


@given(trees, events)
def test_a_guard_never_turns_away_what_the_filter_lets_in(tree: dict[str, Any], event: dict[str, Any]) -> None:
    filter = compile_filter(tree, max_nodes=10_000, max_depth=100)
    if filter.guard is None:
        return
    met = read_key(filter.guard.field)(event) in filter.guard.values
    if filter.guard.decides:
        assert met is filter.matches(event)
    else:
        assert met or not filter.matches(event)


def test_which_filters_have_a_guard() -> None:
    one = compile_filter({"all": [leaf("a", "gt", 1), leaf("b", "in", ["x", "y"]), leaf("c", "eq", True)]})
    assert one.guard is not None
    assert (one.guard.field, one.guard.decides) == ("c", False)
    assert compile_filter({"any": [leaf("a", "eq", 1), leaf("b", "eq", 1)]}).guard is None
    assert compile_filter(leaf("a", "ne", 1)).guard is None
