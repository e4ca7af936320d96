"""Filters over events: a tree of comparisons, compiled once and shared by equal subscribers.

The tree is that of the public contract: leaves ``{"field", "op", "value"}``, inner nodes ``{"all": [...]}``,
``{"any": [...]}`` and ``{"not": ...}``. A compiled filter never raises on an event: a missing field makes every operator
but ``exists``, ``ne`` and ``nin`` false, and so does a comparison between values of different kinds.
"""

import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Final

from kimera_stream.protocol.errors import BadFilterError

Test = Callable[[Mapping[str, Any]], bool]
Compare = Callable[[Any], bool]

OPERATORS: Final = ("eq", "ne", "in", "nin", "exists", "gt", "gte", "lt", "lte", "prefix", "suffix", "contains")
_MISSING: Final = object()
_MAX_FIELD_CHARS: Final = 255


class Guard:
    """A condition that every event must meet to pass a filter: one field has one of these values.

    Filters with guards can be found by the value instead of being tried one after the other.

    Attributes:
        field: Dotted path.
        values: Keys as ``read_key`` returns them.
        decides: Whether an event that meets the guard passes the whole filter.
    """

    __slots__ = ("decides", "field", "values")

    def __init__(self, field: str, values: frozenset[Hashable], *, decides: bool) -> None:
        self.field = field
        self.values = values
        self.decides = decides


class Filter:
    """A compiled filter.

    Attributes:
        key: Canonical and hashable. Filters with equal keys accept the same events, whatever the order of their parts.
        guard: What an event must meet at the least, if that can be said by one field's value.
    """

    __slots__ = ("_test", "guard", "key")

    def __init__(self, test: Test, key: Hashable, guard: Guard | None = None) -> None:
        self._test = test
        self.key = key
        self.guard = guard

    def matches(self, event: Mapping[str, Any]) -> bool:
        """Whether the event object (``{"op", "channel", ..., "data"}``) passes. Never raises."""
        return self._test(event)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Filter) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return f"Filter({self.key!r})"


def compile_filter(tree: Any, *, max_nodes: int = 64, max_depth: int = 8) -> Filter:
    """Check a filter tree and turn it into a predicate.

    Args:
        tree: As decoded from JSON or MessagePack.
        max_nodes: Nodes of the tree at most, leaves and inner nodes alike.
        max_depth: Levels at most; a single comparison is one level.

    Raises:
        BadFilterError: Names the path of the offending node and what is expected there.
    """
    compiler = _Compiler(max_nodes, max_depth)
    test, key = compiler.node(tree, "filter", 1)
    return Filter(test, key, _guard(key))


def read_key(field: str) -> Callable[[Mapping[str, Any]], Hashable | None]:
    """A function that reads the field of an event as a guard's key; None where it is missing or not a scalar."""
    get = _getter(field)

    def read(event: Mapping[str, Any]) -> Hashable | None:
        value = get(event)
        kind = _kind(value)
        return None if kind is None else (kind, value)

    return read


def _guard(key: Any) -> Guard | None:
    match key:
        case ("eq", str() as field, value):
            return Guard(field, frozenset([value]), decides=True)
        case ("in", str() as field, frozenset() as values):
            return Guard(field, values, decides=True)
        case ("all", frozenset() as parts):
            guards = [guard for guard in map(_guard, parts) if guard is not None]
            if guards:
                best = min(guards, key=lambda guard: (len(guard.values), guard.field))
                return Guard(best.field, best.values, decides=False)
    return None


def _bad(path: str, expected: str) -> BadFilterError:
    return BadFilterError(f"{path}: {expected}", field=path)


class _Compiler:
    def __init__(self, max_nodes: int, max_depth: int) -> None:
        self._max_nodes = max_nodes
        self._max_depth = max_depth
        self._nodes = 0

    def node(self, tree: Any, path: str, depth: int) -> tuple[Test, Hashable]:
        self._nodes += 1
        if self._nodes > self._max_nodes:
            raise _bad(path, f"a filter has at most {self._max_nodes} nodes")
        if depth > self._max_depth:
            raise _bad(path, f"a filter is at most {self._max_depth} levels deep")
        if not isinstance(tree, dict):
            raise _bad(path, f"expected an object, got {_kind_name(tree)}")
        if "field" in tree or "op" in tree:
            return self._leaf(tree, path)
        if len(tree) == 1:
            (name, body), *_ = tree.items()
            if name in ("all", "any"):
                return self._group(name, body, path, depth)
            if name == "not":
                test, key = self.node(body, f"{path}.not", depth + 1)
                return (lambda event: not test(event)), ("not", key)
        raise _bad(path, 'expected {"field", "op", "value"}, {"all": [...]}, {"any": [...]} or {"not": ...}')

    def _group(self, name: str, body: Any, path: str, depth: int) -> tuple[Test, Hashable]:
        if not isinstance(body, list) or not body:
            raise _bad(f"{path}.{name}", "expected a list of at least one filter")
        parts = [self.node(child, f"{path}.{name}[{i}]", depth + 1) for i, child in enumerate(body)]
        # Order and repetition change nothing, so they do not tell two filters apart either.
        key = (name, frozenset(key for _, key in parts))
        tests = tuple({key: test for test, key in parts}.values())
        if len(tests) == 1:
            return tests[0], parts[0][1]
        if name == "all":
            return (lambda event: all(test(event) for test in tests)), key
        return (lambda event: any(test(event) for test in tests)), key

    def _leaf(self, tree: dict[Any, Any], path: str) -> tuple[Test, Hashable]:
        unknown = [name for name in tree if name not in ("field", "op", "value")]
        if unknown:
            raise _bad(path, f"unknown key {unknown[0]!r}; a comparison has field, op and value")
        field, op = tree.get("field"), tree.get("op")
        if not isinstance(field, str) or not field or len(field) > _MAX_FIELD_CHARS or "" in field.split("."):
            raise _bad(f"{path}.field", "expected the dotted path of a field, such as data.score")
        if not isinstance(op, str) or op not in OPERATORS:
            raise _bad(f"{path}.op", f"expected one of {', '.join(OPERATORS)}")
        get = _getter(field)
        if op == "exists":
            wanted = tree.get("value", True)
            if not isinstance(wanted, bool):
                raise _bad(f"{path}.value", "exists takes true or false")
            return (lambda event: (get(event) is not _MISSING) is wanted), (op, field, wanted)
        if "value" not in tree:
            raise _bad(f"{path}.value", f"{op} needs a value")
        compare, value_key = _comparison(op, tree["value"], f"{path}.value")
        if op in ("ne", "nin"):
            return (lambda event: not compare(get(event))), (op, field, value_key)
        return (lambda event: compare(get(event))), (op, field, value_key)


def _getter(field: str) -> Callable[[Mapping[str, Any]], Any]:
    """Reads a dotted path. A key that itself holds dots is found when no shorter key leads on from where it is."""
    parts = field.split(".")
    steps = tuple((part, ".".join(parts[i:])) for i, part in enumerate(parts))

    def get(event: Mapping[str, Any]) -> Any:
        here: Any = event
        for part, rest in steps:
            if type(here) is dict or isinstance(here, Mapping):
                there = here.get(part, _MISSING)
                if there is _MISSING:
                    return here.get(rest, _MISSING)
                here = there
            elif isinstance(here, list) and part.isdecimal() and part.isascii() and len(part) < 10:
                index = int(part)
                if index >= len(here):
                    return _MISSING
                here = here[index]
            else:
                return _MISSING
        return here

    return get


def _kind(value: Any) -> str | None:
    """The JSON kind of a scalar: values of different kinds are never equal and never ordered."""
    if type(value) is str:
        return "string"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return "string"
    return None


def _kind_name(value: Any) -> str:
    return _kind(value) or ("list" if isinstance(value, list) else "object")


def _scalar(value: Any, path: str) -> tuple[str, Any]:
    kind = _kind(value)
    if kind is None:
        raise _bad(path, "expected a string, number, boolean or null")
    if isinstance(value, float) and not math.isfinite(value):
        raise _bad(path, "expected a finite number")
    return kind, value


def _comparison(op: str, value: Any, path: str) -> tuple[Compare, Hashable]:
    """The test of a field's value, and the canonical form of what it is compared with.

    ``ne`` and ``nin`` share the test of ``eq`` and ``in``; the caller negates.
    """
    if op in ("in", "nin"):
        if not isinstance(value, list):
            raise _bad(path, f"{op} takes a list of values")
        members = frozenset(_scalar(item, f"{path}[{i}]") for i, item in enumerate(value))
        return (lambda seen: (_kind(seen), seen) in members if _kind(seen) else False), members
    if op in ("prefix", "suffix"):
        if not isinstance(value, str):
            raise _bad(path, f"{op} takes a string")
        if op == "prefix":
            return (lambda seen: isinstance(seen, str) and seen.startswith(value)), value
        return (lambda seen: isinstance(seen, str) and seen.endswith(value)), value
    kind, value = _scalar(value, path)
    if op in ("gt", "gte", "lt", "lte"):
        if kind not in ("number", "string"):
            raise _bad(path, f"{op} takes a number or a string")
        order = _ORDERS[op]
        return (lambda seen: _kind(seen) == kind and order(seen, value)), (kind, value)
    if op == "contains":
        return _contains(kind, value), (kind, value)
    return (lambda seen: _kind(seen) == kind and bool(seen == value)), (kind, value)


def _contains(kind: str, value: Any) -> Compare:
    def compare(seen: Any) -> bool:
        if isinstance(seen, str):
            return kind == "string" and value in seen
        if isinstance(seen, list):
            return any(_kind(item) == kind and item == value for item in seen)
        if isinstance(seen, Mapping):
            return kind == "string" and value in seen
        return False

    return compare


_ORDERS: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "gt": lambda a, b: bool(a > b),
    "gte": lambda a, b: bool(a >= b),
    "lt": lambda a, b: bool(a < b),
    "lte": lambda a, b: bool(a <= b),
}
