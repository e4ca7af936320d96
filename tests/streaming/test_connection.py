"""A connection carries out a session's effects in order, whatever comes of each."""

from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from kimera_stream.infrastructure.settings import Settings
from kimera_stream.protocol.close_codes import CloseCode
from kimera_stream.protocol.codec import CODECS
from kimera_stream.protocol.messages import ServerInfo
from kimera_stream.streaming.commands import Commands
from kimera_stream.streaming.connection import Connection
from kimera_stream.streaming.hub import Hub
from kimera_stream.streaming.session import SessionLimits
from tests.streaming.fakes import FakeEgress, build, settings_with

pytestmark = pytest.mark.anyio


def connected(settings: Settings) -> tuple[Connection, FakeEgress, list[Coroutine[Any, Any, Any]], Hub]:
    """A connection whose tasks, the third, run when they are awaited."""
    vault, knowledge, authenticator, hub, _ = build(settings)
    started: list[Coroutine[Any, Any, Any]] = []

    def spawn(func: Callable[..., Coroutine[Any, Any, Any]], /, *args: Any, name: object = None) -> None:
        started.append(func(*args))

    egress = FakeEgress()
    connection = Connection(
        hub, Commands(hub, knowledge, vault), authenticator, egress, CODECS["json"], spawn=spawn, limits=SessionLimits(),  # type: ignore[arg-type]
        server=ServerInfo("kimera-stream", "0", "test"), welcome={},
    )  # fmt: skip
    return connection, egress, started, hub


@pytest.mark.parametrize(
    "first", ['{"op":"unsubscribe","id":2,"channel":"geoids"}', '{"op":"subscribe","id":2,"channel":"scars"}']
)
async def test_a_close_does_not_overtake_the_replies_before_it(first: str) -> None:
    connection, egress, started, _ = connected(settings_with())
    connection.receive('{"op":"connect","id":1,"subs":[{"channel":"geoids"}]}')
    connection.receive(first)
    connection.receive('{"op":"unsubscribe","id":3,"channel":"thermodynamics"}')
    connection.outlet_draining(CloseCode.SHUTDOWN)
    (authenticating,) = started
    await authenticating
    assert sorted(message["id"] for message in egress.messages()) == [1, 2, 3], "each command has its reply"
    assert egress.closed == (CloseCode.SHUTDOWN, "shutdown")


async def test_one_that_is_closed_as_slow_between_two_effects_ends_without_a_defect() -> None:
    """The reply to the first command is one too many; leaving the channel comes after it."""
    settings = settings_with(stream={"outbox_bytes": 65_536})
    connection, egress, started, hub = connected(settings)
    connection.receive('{"op":"connect","id":1}')
    await started.pop()
    connection.receive('{"op":"subscribe","id":2,"channel":"geoids","since":{"epoch":"E1","offset":0}}')
    connection.receive('{"op":"subscribe","id":3,"channel":"geoids"}')
    connection.receive('{"op":"unsubscribe","id":4,"channel":"geoids"}')
    egress.stuck = True
    egress.window = egress.buffered = 65_300  # room for the reply to the first and not for the refusal of the second
    await started.pop()
    assert [message.get("id") for message in egress.messages()] == [1, 2, 3]
    assert egress.closed == (CloseCode.SLOW_CONSUMER, "slow_consumer")
    assert hub.presence("geoids") == (0, {})
