"""Open replacement is recognised at the start of a statement, and only there."""

import pytest

from kimera_stream.engines.scope import supersedes


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
