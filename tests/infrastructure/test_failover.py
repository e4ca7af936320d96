"""Ways that fail, are left alone, and come back."""

import anyio
import pytest

from kimera_stream.infrastructure.failover import Failover
from kimera_stream.protocol.errors import BadRequestError, UnavailableError

pytestmark = pytest.mark.anyio


class Way:
    """Fails while ``broken`` holds an error; counts its calls."""

    def __init__(self, name: str, broken: BaseException | None = None) -> None:
        self.name = name
        self.broken = broken
        self.calls = 0

    async def __call__(self) -> str:
        await anyio.lowlevel.checkpoint()
        self.calls += 1
        if self.broken is not None:
            raise self.broken
        return self.name


AWAY = UnavailableError("out of order")


async def test_the_first_that_works_is_used_and_a_failing_one_left_alone_until_it_is_back() -> None:
    failover = Failover("test", ["cuda", "cpu"], threshold=2, seconds=0.05)
    cuda, cpu = Way("cuda", AWAY), Way("cpu")
    assert [await failover.run(cuda, cpu) for _ in range(6)] == ["cpu"] * 6
    assert cuda.calls == 2, "left alone after two failures"
    assert failover.numbers["cuda"].state == "opened"
    assert (failover.numbers["cuda"].failed, failover.numbers["cpu"].used) == (2, 6)
    cuda.broken = None
    with anyio.fail_after(10):
        while await failover.run(cuda, cpu) == "cpu":
            await anyio.lowlevel.checkpoint()
    assert failover.numbers["cuda"].state == "closed"
    assert await failover.run(cuda, cpu) == "cuda"


async def test_where_nothing_works_the_last_error_is_told_and_then_that_it_is_left_alone() -> None:
    failover = Failover("test", ["one"], threshold=1, seconds=60)
    with pytest.raises(UnavailableError, match="out of order"):
        await failover.run(Way("one", AWAY))
    with pytest.raises(UnavailableError, match="left alone"):
        await failover.run(Way("one"))


@pytest.mark.parametrize("error", [BadRequestError("no"), KeyError("a defect")])
async def test_what_is_not_the_ways_fault_is_not_tried_elsewhere(error: Exception) -> None:
    failover = Failover("test", ["one", "two"], threshold=1)
    other = Way("two")
    for _ in range(3):
        with pytest.raises(type(error)):
            await failover.run(Way("one", error), other)
    assert other.calls == 0
    assert failover.numbers["one"].state == "closed"


def test_names_must_tell_the_ways_apart() -> None:
    for names in ([], ["a", "a"]):
        with pytest.raises(ValueError, match="names"):
            Failover("test", names)
