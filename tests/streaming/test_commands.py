"""What commands answer while the log changes under them."""

import anyio
import pytest
from anyio import wait_all_tasks_blocked

from kimera_stream.protocol.errors import BadPositionError
from kimera_stream.protocol.messages import Ack, HistoryPage
from kimera_stream.protocol.objects import Position
from kimera_stream.streaming.commands import Caller
from tests.streaming.fakes import FakeVault, build, principals, settings_with

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


async def test_a_cursor_stays_where_it_was_put_last_though_the_database_dawdles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vault, _, _, _, endpoint = build(settings_with())
    for _ in range(10):
        vault.append("geoids")
    caller = Caller(principals(["ann"])[0], "session", "json")
    dawdling, save = anyio.Event(), FakeVault.save_cursor

    async def save_cursor(self: FakeVault, principal: str, name: str, channel: str, offset: int) -> None:
        if offset == 3:
            await dawdling.wait()
        await save(self, principal, name, channel, offset)

    async def ack(offset: int, name: str) -> None:
        await endpoint.commands.execute(Ack(id=offset, channel="geoids", offset=offset, name=name), caller)

    monkeypatch.setattr(FakeVault, "save_cursor", save_cursor)
    async with anyio.create_task_group() as group:
        for offset, name in ((3, "mine"), (7, "mine"), (8, "another")):
            group.start_soon(ack, offset, name)
        await wait_all_tasks_blocked()
        assert vault.cursors == {("ann", "another", "geoids"): 8}
        dawdling.set()
    assert vault.cursors["ann", "mine", "geoids"] == 7
    assert not endpoint.commands._turns
