"""What the rules see in two texts."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimera_stream.engines.evidence import Evidence, Rules, packaged_rules
from kimera_stream.engines.evidence.lexicon import ANTONYMS, stem
from kimera_stream.engines.evidence.quantities import quantities, words_of
from kimera_stream.engines.evidence.reading import CUES, read

BALANCED = 0.65
TIMES, THINGS = "'{}' and '{}' are different times", "{} and {} are different things"


def evidence(a: str, b: str, cosine: float = 0.8) -> Evidence:
    return packaged_rules().judge([(a, b, cosine)])[0]


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        ("The door is open.", "The door is closed.", "opposites: 'open' vs 'closed'"),
        ("db-1 is up", "db-1 is not up", "negation: 'up' vs 'not up'"),
        ("db-1 is up", "db-1 is down", "opposites: 'up' vs 'down'"),
        ("The meeting is at 3pm", "The meeting is at 16:00", "time: '3pm' vs '16:00'"),
        ("The meeting is on Monday.", "The meeting is on Tuesday.", "weekday: 'Monday' vs 'Tuesday'"),
        ("The launch is on 14 May.", "The launch is on May 16th.", "date: '14 May' vs 'May 16th'"),
        ("The server has 16 GB of memory.", "The server has 32 GB of memory.", "number: '16 GB' vs '32 GB'"),
        ("All tests passed.", "No tests passed.", "quantifier: 'all' vs 'none'"),
        ("Pump 3 failed to start.", "Pump 3 started.", "negation: 'not start' vs 'start'"),
        ("Alice approved the budget.", "Alice rejected the budget.", "opposites: 'approved' vs 'rejected'"),
    ],
)
def test_plain_clashes_are_found_and_named(a: str, b: str, reason: str) -> None:
    for one, other in ((a, b), (b, a)):
        assert evidence(one, other).probability >= BALANCED
    assert reason in evidence(a, b).why


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("The backup takes 2 h.", "The backup takes 120 min."),
        ("The service is not down.", "The service is up."),
        ("db-1 is up", "db-2 is down"),
        ("Checkout API is down in eu-west-1.", "Checkout API is up in us-east-2."),
        ("The door is open.", "The window is closed."),
        ("Is the door open?", "The door is closed."),
        ("Revenue increased in 2023.", "Revenue decreased in 2021."),
        ("Some users can log in.", "All users can log in."),
        ("The cat sleeps on the mat.", "Paris is the capital of France."),
        ("At least five nodes are needed.", "Seven nodes are needed."),
        ("The invoice is due.", "The invoice is due."),
    ],
)
def test_near_misses_are_not_reported(a: str, b: str) -> None:
    for one, other in ((a, b), (b, a)):
        assert evidence(one, other).probability < BALANCED


@pytest.mark.parametrize(
    ("a", "b", "named"),
    [
        ("On 3 March the valve was open.", "On 5 March the valve was closed.", ("3 March", "5 March", TIMES)),
        ("At noon the valve was open.", "At 3pm the valve was closed.", ("noon", "3pm", TIMES)),
        ("The valve wasn't open in 2019.", "The valve was open in 2021.", ("2019", "2021", TIMES)),
        ("Valve W7-77 is open.", "Valve W7-78 is closed.", ("w7-77", "w7-78", THINGS)),
        ("Flight 612 is on time.", "Flight 613 is not on time.", ("flight 612", "flight 613", THINGS)),
        (
            "The office in Recife is open.",
            "The office in Natal is closed.",
            ("Recife", "Natal", "one speaks of {}, the other of {}"),
        ),
    ],
)
def test_what_names_another_thing_time_or_place_and_is_the_same_otherwise(
    a: str, b: str, named: tuple[str, str, str]
) -> None:
    one, other, told = named
    assert evidence(a, b).elsewhere == told.format(one, other)
    assert evidence(b, a).elsewhere == told.format(other, one)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("The launch is on 3 March.", "The launch is on 5 March."),
        ("The launch is at noon.", "The launch is at 3pm."),
        ("The office is in Recife.", "The office is in Natal."),
        ("Omar drives line 14.", "Omar drives line 41."),
        ("The valve is closed until 3 March.", "The valve is open on 1 March."),
        ("The valve is open since 3 March.", "The valve is closed on 5 March."),
        ("The valve opened on 3 March, not on 5 March.", "The valve was closed on 5 March."),
        ("Every batch from L200 is recalled.", "L228 is not recalled."),
        ("The library runs on 1.8.2 and is stable.", "The library runs on 1.9.0 and is not stable."),
        ("Valve W7-77 is open.", "Valve W7-77 is closed."),
        ("On 3 March the valve was open.", "On March 3rd the valve was closed."),
        ("In 2019 the valve was open.", "On 5 March the valve was closed."),
        ("On 3 March the red valve was open.", "On 5 March the pump in the hall was closed."),
        ("On 3 March the valve was open.", "The valve was closed."),
    ],
)
def test_what_may_well_speak_of_the_same(a: str, b: str) -> None:
    assert not evidence(a, b).elsewhere
    assert not evidence(b, a).elsewhere


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("it took 2 h", ("time", 7200, 7200)),
        ("it took 120 minutes", ("time", 7200, 7200)),
        ("at least five users", ("count", 5, float("inf"))),
        ("no more than 5 GB", ("data", float("-inf"), 5e9)),
        ("costs $2.5m", ("dollar", 2.5e6, 2.5e6)),
        ("two hundred and six bones", ("count", 206, 206)),
        ("at 3pm", ("clock", 900, 900)),
        ("on the 16th of May", ("date", 516, 516)),
        ("in 2019", ("year", 2019, 2019)),
    ],
)
def test_quantities_are_brought_to_comparable_values(text: str, expected: tuple[str, float, float]) -> None:
    found, _, _ = quantities(text)
    assert [(each.dimension, each.low, each.high) for each in found] == [expected]


def test_numbers_that_name_things_are_names() -> None:
    found, names, _ = quantities("flight 612 left")
    assert not found
    assert names == ["flight 612"]
    assert "db-1" in read("restart db-1 now").ids


def test_inflections_share_a_stem() -> None:
    assert len({stem(word) for word in ("stop", "stops", "stopped", "stopping")}) == 1
    assert stem("approve") == stem("approved")


def test_the_lexicon_has_hundreds_of_pairs_and_is_symmetric() -> None:
    table = ANTONYMS
    assert sum(len(others) for others in table.values()) >= 1000
    assert all(word in table[other] for word, others in table.items() for other in others)


@given(st.text(max_size=200), st.text(max_size=200))
def test_any_text_is_read_without_failing(a: str, b: str) -> None:
    found = evidence(a, b)
    assert 0 <= found.probability <= 1
    assert len(found.why) <= 4


def test_rules_fitted_for_other_features_are_refused() -> None:
    with pytest.raises(ValueError, match="other features"):
        Rules({"features": ["cosine"]})


def forms(cue: str) -> set[str]:
    """Words that its pattern speaks of: "hopes?" gives hope and hopes, "reported(?:ly)?" reportedly as well."""
    words = re.findall("[a-z]{2,}", CUES[cue].pattern.pattern)
    return {form for word in words for form in (word, word[:-1], word + "s", word + "ed", word + "ly")}


CUE_WORDS = sorted({form for cue in CUES for form in forms(cue)})
SAID = st.lists(
    st.one_of(
        st.sampled_from(CUE_WORDS),
        st.sampled_from(
            ["only", "doubt", "to", "of", "the", "of the end", "this", "week", "Monday", "3 May", "May", "is broken", "then", "that"]
        ),
        st.sampled_from(["'t", "not", "Not only", "in case", "ex-wife", "update:", "Actually,", "?", "ſure", "İf", "years ago", ", "]),
    ),
    max_size=8,
).map(" ".join)  # fmt: skip


@pytest.mark.parametrize("cue", CUES)
@pytest.mark.parametrize(
    "around",
    ["{}", "it is broken {}", "{} to the end", "in {} of it", "not {} than", "no {}", "{} week", "{} now", "{} that"],
)
def test_each_word_of_a_cue_is_known_to_it(cue: str, around: str) -> None:
    for form in forms(cue):
        text = around.format(form)
        assert CUES[cue].heard(text, words_of(text)) == CUES[cue].heard(text, None), text


@given(SAID)
def test_a_cue_is_looked_for_wherever_it_may_be(text: str) -> None:
    words = words_of(text)
    for name, cue in CUES.items():
        assert cue.heard(text, words) == cue.heard(text, None), name


@given(
    st.lists(
        st.sampled_from([*CUE_WORDS, "ten", "tenant", "noon", "Monday", "one", "May", "third", "x1", "7"]), max_size=6
    )
)
def test_no_quantity_is_passed_over(words: list[str]) -> None:
    text = " ".join(words)
    unread = quantities(text + " é")  # whose words are not known, so that it is read in full
    assert quantities(text + " .") == (*unread[:2], unread[2].removesuffix("é") + ".")
