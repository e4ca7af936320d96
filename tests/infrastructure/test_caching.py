"""What is remembered is bounded in bytes, whatever it is made of."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimera_stream.core.embedding import hashing
from kimera_stream.core.index import records, values
from kimera_stream.engines.evidence import lexicon
from kimera_stream.infrastructure.caching import ByteCache, KeptResults, remembering


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(0, 60)), max_size=60))
def test_it_holds_the_most_recently_used_that_fit(steps: list[tuple[bool, int, int]]) -> None:
    cache: ByteCache[int, int] = ByteCache(100, lambda _, value: value)
    model: list[tuple[int, int]] = []  # least recently used first
    for asks, key, value in steps:
        held = dict(model)
        if asks:
            assert cache.get(key) == held.get(key)
            if key in held:
                model = [each for each in model if each[0] != key] + [(key, held[key])]
        else:
            cache.put(key, value)
            model = [each for each in model if each[0] != key] + [(key, value)]
            while sum(size for _, size in model) > 100:
                model.pop(0)
        assert cache.bytes == sum(size for _, size in model) <= 100
        assert len(cache) == len(model)
    cache.clear()
    assert (cache.bytes, len(cache)) == (0, 0)


def test_what_is_larger_than_all_is_not_kept_and_drops_its_former_self() -> None:
    cache: ByteCache[str, int] = ByteCache(10, lambda _, value: value)
    cache.put("a", 5)
    cache.put("b", 5)
    cache.put("a", 11)
    assert (cache.get("a"), cache.get("b"), cache.bytes) == (None, 5, 5)


def test_a_function_remembers_and_threads_may_share_it() -> None:
    calls: list[str] = []

    @remembering(max_bytes=1_000, cost=lambda key, _: len(key))
    def shout(word: str) -> str:
        """Loud."""
        calls.append(word)
        return word.upper()

    assert (shout("a"), shout("a"), shout.__doc__, calls) == ("A", "A", "Loud.", ["a"])

    def use() -> None:
        for number in range(3_000):
            assert shout(f"{number % 400:04}") == f"{number % 400:04}"

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shout.cache.bytes == 4 * len(shout.cache) <= 1_000


WORDS = ["a", "xylophones", "w" * 24, "w" * 25, "w" * 32, "w" * 33, "w" * 64, "w" * 65, "w" * 5_000]


@pytest.mark.parametrize(
    ("kept", "ask", "told", "longest", "most"),
    [
        (hashing.FEATURES, lambda word: hashing._features(word, 64), WORDS, 3, 30_000_000),
        (lexicon.STEMS, lexicon.stem, WORDS, 5, 18_000_000),
        (records.KEY_HASHES, records._key_hash, WORDS, 7, 9_000_000),
        (values.SHORT_VALUES, values._written_out, [1, 2.5, "short", 2**63, *WORDS[3:], 10**4_000], 4, 1_100_000),
    ],
)
def test_what_is_kept_in_number_is_kept_of_short_things_only(
    kept: KeptResults, ask: Callable[[Any], Any], told: list[Any], longest: int, most: int
) -> None:
    """So the number bounds the bytes, which are reported, and given back when memory is short."""
    kept.clear()
    assert kept.bytes == 0
    answers = [ask(each) for each in told]
    for each, answer in zip(told, answers, strict=True):
        assert repr(ask(each)) == repr(answer)
    assert kept.bytes == longest * kept.each
    assert kept.max_bytes <= most
    kept.clear()
    assert kept.bytes == 0
