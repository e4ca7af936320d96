"""What an engine of several meets a defect over goes alone."""

from collections.abc import Iterator
from typing import Any

import anyio
import pytest

from kimera_stream.core.interfaces import PublishResult
from kimera_stream.engines.retrying import DefectError
from kimera_stream.engines.work import RequestId
from kimera_stream.protocol.objects import GeoidBody
from tests.engines.nodes import SLICES, Engine, Heard, migrated_database, until
from tests.engines.world import ANNA, together

pytestmark = [pytest.mark.anyio, pytest.mark.postgres]


@pytest.fixture
def url() -> Iterator[str]:
    yield from migrated_database()


async def test_a_statement_that_breaks_the_preparation_goes_alone(url: str) -> None:
    async with Engine(url, "one", Heard()).running() as engine:
        await until(lambda: len(engine.keeper.owned) == SLICES)
        matches = engine.watches.matches

        async def broken(stored: Any, found: Any) -> Any:
            if stored.geoid.text == "poison":
                raise ZeroDivisionError("a defect")
            return await matches(stored, found)

        engine.watches.matches = broken  # type: ignore[method-assign]
        texts = [f"statement {n}" if n != 5 else "poison" for n in range(12)]
        with anyio.fail_after(20):
            results = await together(
                *[
                    engine.pipeline.publish(
                        GeoidBody(text=text), principal=ANNA, key=text, request=RequestId(f"r-{text}", 0)
                    )
                    for text in texts
                ]
            )
            while await engine.vault.count_dead_letters() == 0:  # noqa: ASYNC110 - in a database
                await anyio.sleep(0.02)
    assert [n for n, each in enumerate(results) if isinstance(each, DefectError)] == [5]
    assert sum(isinstance(each, PublishResult) for each in results) == 11
