"""What commands answer while the log changes under them."""

import anyio
import pytest
from anyio import wait_all_tasks_blocked

from kimera_stream.protocol.errors import BadPositionError
from kimera_stream.protocol.messages import HistoryPage
from kimera_stream.protocol.objects import Position
from tests.streaming.fakes import build, principals, settings_with

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("reverse", [False, True])
async def test_a_page_that_retention_passed_by_while_it_was_read_is_not_given_in_part(reverse: bool) -> None:
    vault, _, _, hub, endpoint = build(settings_with())
    for _ in range(10):
        vault.append("geoids")
    (ann,) = principals(["ann"])
    answers: list[HistoryPage | BadPositionError] = []

    async def ask(since: Position | None) -> None:
        try:
            page = await endpoint.commands.history(
                "geoids", since=since, limit=100, reverse=reverse, principal=ann, encoding="json"
            )
        except BadPositionError as error:
            answers.append(error)
        else:
            answers.append(page)

    vault.gate = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(ask, Position(hub.epoch, 2))
        await wait_all_tasks_blocked()
        vault.trim(5)
        vault.gate.set()
    await ask(None)
    await ask(Position(hub.epoch, 5))
    refused, *pages = answers
    assert isinstance(refused, BadPositionError), "3 to 5 would have been missing without a word"
    assert refused.field == "since"
    assert [len(page.events) for page in pages if isinstance(page, HistoryPage)] == [5, 5]
