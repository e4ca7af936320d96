"""One task keeps everyone's time."""

import anyio
import pytest

from kimera_stream.streaming.deadlines import Deadlines
from kimera_stream.streaming.ratelimit import TokenBucket


def test_due_callbacks_run_in_order_and_cancelled_ones_do_not() -> None:
    now = 0.0
    deadlines = Deadlines(lambda: now)
    ran: list[str] = []
    deadlines.at(2, lambda: ran.append("b"))
    deadlines.at(1, lambda: ran.append("a"))
    dropped = deadlines.at(1.5, lambda: ran.append("x"))
    deadlines.at(5, lambda: ran.append("c"))
    dropped.cancel()
    assert deadlines.fire() == 1
    now = 3.0
    assert deadlines.fire() == 2
    assert ran == ["a", "b"]
    now = 5.0
    assert deadlines.fire() == float("inf")
    assert ran == ["a", "b", "c"]
    assert len(deadlines) == 0


def test_cancelled_ones_of_tomorrow_are_not_kept_until_tomorrow() -> None:
    now = 0.0
    deadlines = Deadlines(lambda: now)
    ran: list[int] = []
    deadlines.at(90_000, lambda: ran.append(0))
    for _ in range(10_000):
        deadlines.at(86_400, lambda: ran.append(1)).cancel()
        assert len(deadlines) <= 130
    kept = [deadlines.at(86_400, lambda: ran.append(2)) for _ in range(500)]
    for deadline in kept[::2]:
        deadline.cancel()
        deadline.cancel()
    now = 100_000.0
    assert deadlines.fire() == float("inf")
    assert ran == [2] * 250 + [0]
    assert len(deadlines) == 0


@pytest.mark.anyio
async def test_a_nearer_deadline_wakes_the_task() -> None:
    deadlines = Deadlines(anyio.current_time)
    done = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(deadlines.run)
        deadlines.at(anyio.current_time() + 3600, lambda: None)
        await anyio.wait_all_tasks_blocked()
        deadlines.at(anyio.current_time() + 0.01, done.set)
        with anyio.fail_after(5):
            await done.wait()
        group.cancel_scope.cancel()


def test_token_bucket() -> None:
    bucket = TokenBucket(rate=10, burst=2, now=0)
    assert [bucket.take(0), bucket.take(0)] == [0, 0]
    assert bucket.take(0) == pytest.approx(0.1)
    assert bucket.take(0.05) == pytest.approx(0.05)
    assert bucket.take(0.1) == 0
    assert [bucket.take(100), bucket.take(100)] == [0, 0]
    assert bucket.take(100) > 0
