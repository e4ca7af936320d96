"""Open replacement is recognised at the start of a statement, and only there."""

import pytest

from kimera_stream.engines.scope import DAY_MS, other_day, supersedes


@pytest.mark.parametrize(
    "text",
    [
        "Update: the gate is shut again.",
        "UPDATE (14:20): four cases, not three",
        "Correction, the meeting is on Friday.",
        "Correction to my last message: it was Oslo.",
        "[Edit] the limit is 40",
        "Status update - checkout is back",
        "Erratum: page 4 should read 12 mg.",
        "Scratch that, we leave at nine.",
    ],
)
def test_an_open_replacement(text: str) -> None:
    assert supersedes(text)


@pytest.mark.parametrize(
    "text",
    [
        "The update was rolled out to all nodes.",
        "Update all laptops before Friday.",
        "Edit mode is disabled.",
        "The gate is no longer shut.",
        "There is no correction: the figure stands.",
        "Revised estimates are due in May.",
    ],
)
def test_no_replacement(text: str) -> None:
    assert not supersedes(text)


SHUT, OPEN = "The gate was shut yesterday.", "Yesterday the gate was open."


@pytest.mark.parametrize(
    ("older", "newer", "apart", "word"),
    [
        (SHUT, OPEN, DAY_MS, "yesterday"),
        (SHUT, OPEN, -3 * DAY_MS, "yesterday"),
        (SHUT, OPEN, DAY_MS - 1, ""),
        (SHUT, OPEN, 0, ""),
        ("It opens this morning", "It stays shut this morning", 2 * DAY_MS, "this morning"),
        ("It was delivered today", "It was delivered yesterday", 2 * DAY_MS, ""),
        ("It is shut today and tomorrow", "It is open today", 2 * DAY_MS, ""),
        ("The gate is shut", "The gate is open today", 2 * DAY_MS, ""),
        ("It is shut on Friday", "It is open on Friday", 9 * DAY_MS, ""),
    ],
)
def test_a_day_named_from_where_the_speaker_stands(older: str, newer: str, apart: int, word: str) -> None:
    said = 100 * DAY_MS
    assert other_day(older, said, newer, said + apart) == word
