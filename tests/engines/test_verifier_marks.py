"""What a word of one statement is to the words of the other."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimera_stream.engines import verifier_marks as marks
from kimera_stream.engines.verifier_marks import (
    ALTERNATIVE,
    FORM,
    GREATER,
    LESS,
    MARKS,
    MATCHED,
    NONE,
    OPPOSITE,
    SYNONYM,
    UNMATCHED,
)
from kimera_stream.engines.verifier_pairs import PairTokenizer
from kimera_stream.engines.verifier_text import normal_form


@cache
def _shared() -> PairTokenizer:
    return PairTokenizer(64)


@pytest.fixture
def tokenizer() -> PairTokenizer:
    return _shared()


def _marked(tokenizer: PairTokenizer, first: str, second: str) -> tuple[dict[str, int], dict[str, int]]:
    """Mark by token as text, of each side."""
    one, other = tokenizer.statements([first, second])
    pair = tokenizer.pair(one, other)
    words = [tokenizer._tokenizer.id_to_token(token) for token in pair.tokens]
    end = words.index("[SEP]")
    return dict(zip(words[1:end], pair.flags[1:end], strict=True)), dict(
        zip(words[end + 1 : -1], pair.flags[end + 1 : -1], strict=True)
    )


@pytest.mark.parametrize(
    ("first", "second", "word", "mark", "other_word", "other_mark"),
    [
        ("The door is open.", "The door is shut.", "open", OPPOSITE, "shut", OPPOSITE),
        ("He accepted it.", "He rejected it.", "accepted", OPPOSITE, "rejected", OPPOSITE),
        ("It is taller than ours.", "It is shorter than ours.", "taller", OPPOSITE, "shorter", OPPOSITE),
        ("The pump stopped.", "The pump stops.", "stopped", FORM, "stops", FORM),
        ("The roof was fixed.", "The roof was repaired.", "fixed", SYNONYM, "repaired", SYNONYM),
        ("The car is red.", "The car is blue.", "red", ALTERNATIVE, "blue", ALTERNATIVE),
        ("The car is red.", "The car is fast.", "red", UNMATCHED, "fast", UNMATCHED),
        ("It holds 40 people.", "It holds 35 people.", "40", GREATER, "35", LESS),
        ("It holds 40 people.", "It has 35 wheels.", "40", UNMATCHED, "35", UNMATCHED),
        ("It took 100 minutes.", "It took 2 hours.", "100", LESS, "2", GREATER),
        ("It starts at 9am.", "It starts at half past nine in the morning.", "00", LESS, "30", GREATER),
        ("It is due on March 3rd.", "It is due on 5 March.", "3", LESS, "5", GREATER),
        ("It took two hours.", "It took 2 hours.", "2", MATCHED, "2", MATCHED),
    ],
)
def test_a_word_is_marked_by_what_the_other_statement_says(
    tokenizer: PairTokenizer, first: str, second: str, word: str, mark: int, other_word: str, other_mark: int
) -> None:
    one, other = _marked(tokenizer, first, second)
    assert (one[word], other[other_word]) == (mark, other_mark)


def test_a_range_of_numbers_is_compared_with_the_one_that_is_near_in_kind(tokenizer: PairTokenizer) -> None:
    one, _ = _marked(tokenizer, "Room 7 seats 40 people.", "It has 3 doors and seats 45 people.")
    assert one["40"] == LESS
    assert one["7"] == UNMATCHED


WORDS = st.sampled_from(
    [
        "the",
        "a",
        "pump",
        "door",
        "open",
        "closed",
        "shut",
        "stopped",
        "running",
        "40",
        "35",
        "2.5",
        "12:30",
        "march",
        "red",
        "blue",
        "not",
        "more",
        "less",
        "km",
        "hours",
        "Tällberg",
        "#",
    ]
)
TEXTS = st.lists(WORDS, min_size=1, max_size=14).map(" ".join)


@given(TEXTS, TEXTS)
def test_marks_answer_each_other(first: str, second: str) -> None:
    tokenizer = _shared()
    one, other = tokenizer.statements([first, second])
    pair, turned = tokenizer.pair(one, other), tokenizer.pair(other, one)
    size = len(one.tokens)
    assert pair.flags[1 : size + 1] == turned.flags[len(turned.flags) - 1 - size : -1]
    inner = [flag for flag in pair.flags if flag != NONE]
    assert len(inner) == len(pair.tokens) - 3
    assert all(0 < flag < MARKS for flag in inner)
    left, right = set(pair.flags[1 : size + 1]), set(pair.flags[size + 2 : -1])
    assert (OPPOSITE in left) <= bool(right & {OPPOSITE, FORM, MATCHED})  # what it opposes may be in both
    same = tokenizer.pair(one, one)
    assert set(same.flags) <= {NONE, MATCHED}


@given(st.text(max_size=60))
def test_any_text_has_numbers_within_it_in_order(text: str) -> None:
    form = normal_form(text)
    at = 0
    for number in marks.numbers_of(form):
        assert at <= number.start < number.end <= len(form)
        at = number.end
