"""Scope: when two statements that clash are nevertheless not a contradiction.

A newer statement that opens by saying that it replaces what was said (``Update: the gate is shut again``) is how people take an
older one back. Both may stand in the log; nobody has to be told. Words inside a sentence (``now``, ``no longer``) do not count:
they tell of a change, and whether the older statement still stands is then what the reader wants to know.
"""

import re

SUPERSEDED = 0.2
"""Most that a pair can score whose newer statement openly replaces the older."""

_OPENS_BY_REPLACING = re.compile(
    r"^\W*(?:(?:status\s+)?update|correction|corrected|corrigendum|erratum|errata|edit|amendment|amended|revision|revised|"
    r"supersedes|replaces|scratch\s+that)\b\s*(?:\(|\[|\]|:|,|;|\.|-|\u2013|\u2014|#|\bto\b|\bof\b|\bon\b)",
    re.IGNORECASE,
)


def supersedes(newer: str) -> bool:
    """Whether ``newer`` opens by saying that it replaces what was said before."""
    return _OPENS_BY_REPLACING.search(newer) is not None
