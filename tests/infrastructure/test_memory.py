"""Memory under a limit: alert, caches let go, refusal, recovery, with hysteresis."""

import mmap

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from kimera_stream.infrastructure.memory import ALERT, EASE, LEVELS, SHED, MemoryGuard, memory_in_use
from kimera_stream.protocol.errors import OverloadedError

LIMIT = 1_000_000


def test_states_follow_memory_and_do_not_flutter() -> None:
    registry = CollectorRegistry()
    guard = MemoryGuard(LIMIT, registry)
    seen = []
    for share in (0.1, 0.84, 0.85, 0.81, 0.79, 0.94, 0.95, 0.91, 0.89, 0.81, 0.79):
        guard.observe(int(share * LIMIT))
        seen.append(guard.state)
    assert seen == [
        "ok", "ok", "alert", "alert", "ok", "alert", "shedding", "shedding", "alert", "alert", "ok",
    ]  # fmt: skip
    assert registry.get_sample_value("kimera_memory_limit_bytes") == LIMIT
    assert registry.get_sample_value("kimera_memory_pressure") == 0


def test_only_shedding_refuses_and_says_when_to_come_again() -> None:
    registry = CollectorRegistry()
    guard = MemoryGuard(LIMIT, registry)
    guard.observe(int(0.94 * LIMIT))
    guard.admit()
    assert "94%" in guard.trouble
    assert "refused" not in guard.trouble
    guard.observe(int(0.96 * LIMIT))
    with pytest.raises(OverloadedError, match="960000 bytes in use") as refusal:
        guard.admit()
    assert refusal.value.retry_after is not None
    assert "refused" in guard.trouble
    assert registry.get_sample_value("kimera_memory_refusals_total") == 1
    guard.observe(0)
    guard.admit()
    assert guard.trouble == ""


@given(st.lists(st.floats(0, 1.5), max_size=40))
def test_above_a_threshold_its_state_is_never_missed(shares: list[float]) -> None:
    guard = MemoryGuard(LIMIT, CollectorRegistry())
    for share in shares:
        guard.observe(int(share * LIMIT))
        level = LEVELS.index(guard.state)
        counted = int(share * LIMIT) / LIMIT
        assert level == 2 if counted >= SHED else level < 2 or counted >= SHED - EASE
        assert level >= 1 if counted >= ALERT else level < 1 or counted >= ALERT - EASE


def test_without_a_limit_nothing_is_refused() -> None:
    guard = MemoryGuard(0, CollectorRegistry())
    assert guard.observe(1 << 50) is False
    guard.admit()
    assert (guard.state, guard.trouble) == ("ok", "")


def test_caches_that_can_be_emptied_are() -> None:
    registry = CollectorRegistry()
    guard = MemoryGuard(LIMIT, registry)
    held = {"a": 100, "b": 50}
    guard.watch_cache("a", lambda: held["a"], lambda: held.update(a=0))
    guard.watch_cache("b", lambda: held["b"])
    assert guard.caches == {"a": 100, "b": 50}
    assert registry.get_sample_value("kimera_cache_bytes", {"cache": "a"}) == 100
    assert guard.empty_caches() == 100
    assert guard.caches == {"a": 0, "b": 50}


def test_pages_of_files_do_not_count(tmp_path: object) -> None:
    path = f"{tmp_path}/file"
    size = 64 << 20
    with open(path, "wb") as file:  # noqa: PTH123
        file.truncate(size)
    resident, own = memory_in_use()
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), size) as mapped:  # noqa: PTH123
        for at in range(0, size, 4096):
            mapped[at] = 1
        resident_then, own_then = memory_in_use()
    assert resident_then - resident > size * 0.9
    assert own_then - own < size * 0.1
    block = bytearray(size)
    assert memory_in_use()[1] - own > size * 0.9
    assert len(block) == size
