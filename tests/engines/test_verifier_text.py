"""Values are compared, not spellings: what means the same must read the same to the model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimera_stream.engines.verifier_text import normal_form

SAME = [
    ("It takes 2 h.", "It takes 120 min."),
    ("It takes two hours.", "It takes 120 minutes."),
    ("It takes an hour and a half.", "It takes 90 minutes."),
    ("It takes half an hour.", "It takes 30 minutes."),
    ("two weeks", "fourteen days"),
    ("a fortnight", "14 days"),
    ("36 months", "three years"),
    ("0.8 kg", "800 grams"),
    ("500 ml", "0.5 litres"),
    ("1,500 m", "1.5 km"),
    ("2 TB", "2,000 GB"),
    ("at 9 pm", "at 21:00"),
    ("at 9:05 am", "at 09:05"),
    ("at half past eight in the evening", "at 20:30"),
    ("at twenty to six", "at 05:40"),
    ("at noon", "12:00"),
    ("March 3rd", "3 March"),
    ("the 3rd of March", "the 3 Mar"),
    ("2026-03-03", "3 March 2026"),
    ("on Tue", "on Tuesday"),
    ("25 per cent", "twenty-five percent"),
    ("one hundred and five", "105"),
    ("two thousand three hundred", "2,300"),
    ("4.2 million", "4,200,000"),
    ("minus eighty degrees Celsius", "-80 °C"),
]
DIFFERENT = [
    ("2 hours", "2 minutes"),
    ("90 minutes", "19 minutes"),
    ("9 am", "9 pm"),
    ("3 March", "3 May"),
    ("at twenty to six", "at twenty past six"),
    ("25 kg", "2.5 kg"),
    ("thirteen", "thirty"),
    ("one hundred and five", "one hundred and fifty"),
]
UNTOUCHED = [
    "release 4.12.0 is out",
    "no one is here",
    "db-2 and s3 are fine",
    "ticket MSKU-2281",
    "room 214",
    "a 5G phone",
    "the 4x4 in bay C",
    "",
    "   ",
    "ünïcödé ☃ stays",
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_one_value_has_one_spelling(one: str, other: str) -> None:
    assert normal_form(one).lower() == normal_form(other).lower()


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_values_stay_different(one: str, other: str) -> None:
    assert normal_form(one).lower() != normal_form(other).lower()


@pytest.mark.parametrize("text", UNTOUCHED)
def test_what_is_no_value_is_left_alone(text: str) -> None:
    assert normal_form(text) == text


@given(st.integers(1, 23), st.integers(0, 59))
def test_clock_times_of_both_clocks_agree(hour: int, minute: int) -> None:
    half = "am" if hour < 12 else "pm"
    told = f"at {(hour - 1) % 12 + 1}:{minute:02d} {half}"
    assert normal_form(told) == f"at {hour:02d}:{minute:02d}"


@given(st.integers(1, 5_000))
def test_seconds_and_minutes_agree(minutes: int) -> None:
    assert normal_form(f"{minutes} minutes") == normal_form(f"{minutes * 60} seconds")


@given(st.text(max_size=200))
def test_any_text_is_taken(text: str) -> None:
    assert isinstance(normal_form(text), str)


@given(
    st.lists(st.sampled_from(["nine", "hundred", "and", "two", "million", "forty", "-", "o'clock", "past", "3", "h"]))
)
def test_any_pile_of_number_words_is_taken(words: list[str]) -> None:
    assert isinstance(normal_form(" ".join(words)), str)
