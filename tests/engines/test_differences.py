"""The words in which two statements part."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimera_stream.engines.differences import differences


@pytest.mark.parametrize(
    ("older", "newer", "parts"),
    [
        ("The door is open.", "The door is closed.", ["'open' vs 'closed'"]),
        ("The backup takes two hours.", "The backup takes 120 min.", []),
        ("Refunds take 5 days.", "Refunds take 7 days.", ["'5' vs '7'"]),
        (
            "Anna leads the audit team.",
            "Ben leads the audit team now.",
            ["'Anna' vs 'Ben'", "only in the newer: 'now'"],
        ),
        ("The gate is open to visitors.", "The gate is not open to visitors.", ["only in the newer: 'not'"]),
        (
            "The corner bakery is open.",
            "By noon the shutters of the bakery were down, and its staff had gone home.",
            [
                "only in the older: 'corner', 'open'",
                "only in the newer: 'noon the shutters', 'down', 'staff had gone home'",
            ],
        ),
        (
            "We never ship on Fridays.",
            "Deployments went out late last Friday evening, as the release could not wait.",
            [
                "only in the older: 'never ship'",
                "only in the newer: 'Deployments went out late last', 'evening', 'release could not wait'",
            ],
        ),
        (
            "It lasts two hours.",
            "Expect queues, all in all, for 120 min at least!",
            ["only in the older: 'lasts'", "only in the newer: 'Expect queues', 'all in all', 'least'"],
        ),
        (
            "It rained.",
            "Here is quite a lot of what we have.",
            ["only in the older: 'rained'", "only in the newer: 'lot'"],
        ),
    ],
)
def test_they_are_named_in_the_order_of_what_they_say(older: str, newer: str, parts: list[str]) -> None:
    assert differences(older, newer) == parts


def test_what_a_long_statement_says_late_is_not_told_as_the_others_alone() -> None:
    long = " ".join(f"w{n}x" for n in range(80)) + " and the shutters are down."
    assert differences("The shutters rattle.", long)[0] == "only in the older: 'rattle'"


@given(st.text(max_size=300), st.text(max_size=300))
def test_any_two_texts_give_a_few_short_parts(older: str, newer: str) -> None:
    assert len(differences(older, newer)) <= 2
    assert differences(older, older) == []
