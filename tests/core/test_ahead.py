"""Pages are fetched while one is worked on; the end, an error and who has seen enough end both."""

from collections.abc import AsyncIterator

import anyio
import pytest

from kimera_stream.core.ahead import ahead
from kimera_stream.protocol.errors import UnavailableError

pytestmark = pytest.mark.anyio


class Pages:
    def __init__(self, count: int, fails_at: int | None = None) -> None:
        self._count = count
        self._fails_at = fails_at
        self.fetched: list[int] = []
        self.more = anyio.Event()

    async def __aiter__(self) -> AsyncIterator[int]:
        for number in range(self._count):
            if number == self._fails_at:
                raise UnavailableError("no connection")
            self.fetched.append(number)
            self.more.set()
            yield number


async def test_the_next_page_is_fetched_while_one_is_worked_on() -> None:
    pages, done = Pages(4), list[int]()

    async def work(page: int) -> bool:
        while len(pages.fetched) < min(page + 2, 4):
            pages.more = anyio.Event()
            await pages.more.wait()
        done.append(page)
        return True

    with anyio.fail_after(10):
        assert await ahead(aiter(pages), work)
    assert done == [0, 1, 2, 3]


async def test_who_has_seen_enough_ends_it() -> None:
    pages, done = Pages(1_000), list[int]()

    async def work(page: int) -> bool:
        done.append(page)
        return page < 2

    assert not await ahead(aiter(pages), work)
    assert done == [0, 1, 2]
    assert len(pages.fetched) < 10


async def test_errors_of_both_sides_come_through_as_they_are() -> None:
    async def well(page: int) -> bool:
        return True

    async def badly(page: int) -> bool:
        raise UnavailableError(f"page {page}")

    with pytest.raises(UnavailableError, match="no connection"):
        await ahead(aiter(Pages(9, fails_at=3)), well)
    with pytest.raises(UnavailableError, match="page 0"):
        await ahead(aiter(Pages(9)), badly)
