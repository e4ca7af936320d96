"""Which words of two statements clash: what is marked for the reader. The dashboard's clash.js follows the same rule."""

import re

WORD = re.compile(r"[^\W_]+(?:['’.,:\-/][^\W_]+)*")
PLAIN = frozenset(
    [
        "a",
        "an",
        "the",
        "of",
        "to",
        "in",
        "on",
        "at",
        "by",
        "for",
        "from",
        "with",
        "as",
        "and",
        "or",
        "but",
        "so",
        "that",
        "this",
        "these",
        "those",
        "it",
        "its",
        "is",
        "are",
        "was",
        "were",
        "be",
        "been",
        "being",
        "am",
        "has",
        "have",
        "had",
        "do",
        "does",
        "did",
        "will",
        "would",
        "can",
        "could",
        "may",
        "might",
        "shall",
        "should",
        "must",
        "i",
        "me",
        "my",
        "we",
        "us",
        "our",
        "you",
        "your",
        "he",
        "him",
        "his",
        "she",
        "her",
        "they",
        "them",
        "their",
        "there",
        "here",
        "who",
        "which",
        "what",
        "s",
        "t",
        "up",
        "out",
        "than",
        "then",
        "just",
        "also",
        "still",
        "very",
    ]
)
NEGATION = re.compile(r"no|not|never|none|nobody|nothing|neither|nor|without|cannot|.*n['’]t")
SUFFIX = re.compile(r"(?:ing|ed|es|s)$")

Span = tuple[int, int]


def clash(a: str, b: str) -> tuple[list[Span], list[Span]]:
    """Spans (start, end) of what ``a`` says and ``b`` does not, and the other way round.

    Small words do not count unless they negate; words right behind each other make one span.
    """
    left, right = list(WORD.finditer(a)), list(WORD.finditer(b))
    return _joined(_own(left, right), a), _joined(_own(right, left), b)


def _own(words: list[re.Match[str]], others: list[re.Match[str]]) -> list[Span]:
    there = {_stem(word.group()) for word in others}
    return [
        word.span()
        for word in words
        if _stem(word.group()) not in there
        and (word.group().lower() not in PLAIN or NEGATION.fullmatch(word.group().lower()))
    ]


def _stem(word: str) -> str:
    key = word.lower()
    if len(key) < 5 or any(char.isdigit() for char in key):
        return key
    return SUFFIX.sub("", key)


def _joined(spans: list[Span], text: str) -> list[Span]:
    merged: list[Span] = []
    for start, end in spans:
        if merged and not text[merged[-1][1] : start].strip():
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged
