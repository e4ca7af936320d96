"""The bus through TLS and a socket in the file system, as a user with the least rights; and its secret in no log."""

import asyncio
import contextlib
import logging
import re
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest
from structlog.testing import capture_logs

from kimera_stream.infrastructure.bus import working
from kimera_stream.infrastructure.bus.interface import LOG, Message, replies
from kimera_stream.infrastructure.bus.redis import RedisBus
from kimera_stream.infrastructure.bus.unix import UnixStream
from kimera_stream.infrastructure.settings_model import BusSettings
from kimera_stream.infrastructure.tasks import Service, ServiceSpec
from tests.certificates import certify
from tests.infrastructure.redis_servers import HAS_SERVER, SecuredRedis

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.redis,
    pytest.mark.skipif(not HAS_SERVER, reason="needs the redis-server binary"),
]
SECRET = "tulip/and%rose@7"
QUOTED = "tulip%2Fand%25rose%407"


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": request.param}


def rights() -> str:
    """The ACL rule of the manual."""
    manual = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()
    found = re.search(r"^user kimera (on [^`]*?)\n```", manual, re.MULTILINE | re.DOTALL)
    assert found is not None
    return " ".join(found[1].replace("\\\n", " ").split())


@contextlib.asynccontextmanager
async def secured(directory: Path, *, host: str = "127.0.0.1") -> AsyncIterator[SecuredRedis]:
    certificate = directory / "redis.pem"
    await anyio.to_thread.run_sync(lambda: certify(certificate, host))
    rule = await anyio.to_thread.run_sync(rights)
    filled = rule.replace(">SECRET", f">{SECRET}")
    server = await anyio.to_thread.run_sync(SecuredRedis, directory, certificate, filled)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@contextlib.asynccontextmanager
async def serving(url: str, node: str, *, contact: bool = True) -> AsyncIterator[RedisBus]:
    bus = RedisBus(BusSettings(url=url, timeout=2.0, claim_after=0.2), node)  # type: ignore[arg-type]
    async with anyio.create_task_group() as group:
        service = Service(ServiceSpec("bus", bus.serve))
        group.start_soon(bus.serve, service, name="serve")
        try:
            with anyio.fail_after(30):
                await service.became_ready.wait()
                while contact and not bus.connected:  # noqa: ASYNC110 - sets no event
                    await anyio.sleep(0.005)
            yield bus
        finally:
            group.cancel_scope.cancel()


async def round_trip(url: str) -> None:
    """Everything that edges and engines do with each other."""
    async with serving(url, "edge") as edge, serving(url, "engine") as engine:

        async def echo(question: bytes) -> bytes:
            return question[::-1]

        engine.answer_with("echo", echo)
        assert await edge.ask("engine", "echo", b"abc", within=10) == b"cba"
        async with edge.follow(LOG, replies("edge")) as follower:
            engine.publish(LOG, b"entry")
            engine.publish(replies("edge"), b"answer")
            heard: list[bytes] = []
            while len(heard) < 2:
                heard += [each.payload for each in await follower.receive() if isinstance(each, Message)]
            assert sorted(heard) == [b"answer", b"entry"]
        await edge.add(3, "r1", b"work")
        async with engine.worker() as worker:
            worker.take(3)
            (work,) = await worker.receive()
            assert work.payload == b"work"
            worker.take(4)  # wakes the read that is under way
            await edge.add(4, "r2", b"more")
            works = [work]
            while len(works) < 2:
                works += await worker.receive()
        async with edge.worker() as heir:  # what the other had in hand
            heir.take(3)
            heir.take(4)
            again = []
            while len(again) < 2:
                again += await heir.receive()
            assert {each.request for each in again} == {"r1", "r2"}
            await heir.done(again)
            assert [await edge.depth(number) for number in (3, 4)] == [0, 0]
        engine.share("numbers", "all", b"7")
        while (await edge.gather("numbers", "all")).get("engine") != b"7":  # noqa: ASYNC110 - another node's
            await anyio.sleep(0.01)
        engine.share("numbers", "all", None)


@pytest.mark.parametrize("way", ["rediss", "unix"])
async def test_a_user_with_the_rights_of_the_manual_can_do_everything_and_nothing_else(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(working, "TIDY_AFTER", 0.0)  # consumers that are gone are forgotten at once
    with capture_logs() as logs, caplog.at_level(logging.DEBUG):
        async with secured(tmp_path) as redis:
            url = redis.url(way, f"kimera:{QUOTED}")
            with anyio.fail_after(60):
                await round_trip(url)
            refused = await redis.refusals()
            assert [line for line in refused if "setinfo" not in line] == [], "nothing that the bus does is refused"
            for words in (["GET", "other:key"], ["FLUSHALL"], ["KEYS", "*"], ["CONFIG", "GET", "*"], ["ACL", "LIST"]):
                assert "NOPERM" in await redis.as_user("kimera", SECRET, *words), words
    assert [entry for entry in logs if entry["log_level"] in ("warning", "error")] == []
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == [], (
        "closing leaves nothing behind"
    )
    written = repr(logs) + caplog.text
    assert SECRET not in written
    assert QUOTED not in written


async def test_a_wrong_secret_is_told_without_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with capture_logs() as logs, caplog.at_level(logging.DEBUG):
        async with (
            secured(tmp_path) as redis,
            serving(redis.url("rediss", "kimera:violet9"), "a", contact=False) as bus,
        ):
            with anyio.fail_after(30):
                while not any("no contact" in entry["event"] for entry in logs):  # noqa: ASYNC110 - a line in a list
                    await anyio.sleep(0.01)
            assert not bus.connected
    assert any("invalid username-password" in str(entry.get("error")) for entry in logs), logs
    assert "violet9" not in repr(logs) + caplog.text


async def test_a_certificate_of_another_host_is_refused_unless_asked_otherwise(tmp_path: Path) -> None:
    async with secured(tmp_path, host="127.0.0.9") as redis:
        url = redis.url("rediss", f"kimera:{QUOTED}")
        with capture_logs() as logs:
            async with serving(url, "a", contact=False) as bus:
                with anyio.fail_after(30):
                    while not any("no contact" in entry["event"] for entry in logs):  # noqa: ASYNC110 - a line in a list
                        await anyio.sleep(0.01)
                assert not bus.connected
        async with serving(f"{url}&ssl_check_hostname=false", "a"):
            pass


async def test_what_comes_in_the_moment_a_read_is_given_up_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        stream = UnixStream(*await asyncio.open_unix_connection(sock=ours))
        async with anyio.create_task_group() as group:
            group.start_soon(stream.receive)
            await anyio.wait_all_tasks_blocked()
            theirs.send(b"late")
            # Both are seen in the loop's next turn, the end first.
            asyncio.get_running_loop().call_soon(group.cancel_scope.cancel)
        await anyio.wait_all_tasks_blocked()
        await stream.aclose()
    assert caplog.text == ""
