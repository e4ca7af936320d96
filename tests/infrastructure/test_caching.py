"""What is remembered is bounded in bytes, whatever it is made of."""

import threading

from hypothesis import given, settings
from hypothesis import strategies as st

from kimera_stream.infrastructure.caching import ByteCache, remembering


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
