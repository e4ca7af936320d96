"""Filters and positions as people type them."""

import re
from typing import Any

from kimera_stream.api.cli.console import usage_error

SHORTHAND = re.compile(r"\s*([\w.]+)\s*(>=|<=|!=|=|>|<|\^=|~=)\s*(.*?)\s*", re.DOTALL)
OPERATORS = {
    "=": "eq",
    "!=": "ne",
    ">": "gt",
    ">=": "gte",
    "<": "lt",
    "<=": "lte",
    "^=": "prefix",
    "~=": "contains",
}


def parse_filter(text: str) -> dict[str, Any]:
    """A filter tree from JSON, or from the short form ``data.score>=0.8 and type=contradiction.found``.

    Operators: = != > >= < <= ^= (starts with) ~= (contains).
    """
    import msgspec

    if text.lstrip().startswith("{"):
        try:
            return msgspec.json.decode(text, type=dict[str, Any])
        except msgspec.DecodeError as exc:
            raise usage_error(f"--filter: this is not JSON ({exc})") from None
    terms = [_term(part) for part in re.split(r"\s+and\s+", text)]
    return terms[0] if len(terms) == 1 else {"all": terms}


def _term(text: str) -> dict[str, Any]:
    import msgspec

    match = SHORTHAND.fullmatch(text)
    if match is None:
        raise usage_error(
            f"--filter: cannot read {text!r}; expected FIELD OP VALUE (data.score>=0.8), or a JSON filter tree"
        )
    field, operator, raw = match.groups()
    try:
        value = msgspec.json.decode(raw)
    except msgspec.DecodeError:
        value = raw
    return {"field": field, "op": OPERATORS[operator], "value": value}


def parse_since(text: str, epoch: str) -> Any:
    """A position (``EPOCH:OFFSET``, an offset of the current epoch, ``start``) or the name of a durable cursor."""
    from kimera_stream.protocol.objects import Position

    if text == "start":
        return Position(epoch, 0)
    if text.isascii() and text.isdigit():
        return Position(epoch, int(text))
    name, colon, offset = text.rpartition(":")
    if colon and offset.isascii() and offset.isdigit():
        return Position(name, int(offset))
    return text
