"""A server that keeps a part of its log: who comes back to what it dropped is told so, and gets nothing of it in part."""

from typing import Any

import msgspec
import pytest

from tests.e2e.conftest import StartServer
from tests.e2e.harness import offsets, peer, web

pytestmark = pytest.mark.anyio

STATEMENTS = [
    "Rivers freeze.",
    "Bakers rise early.",
    "Paper burns.",
    "Gulls nest on cliffs.",
    "Violins need rosin.",
    "Salt dissolves.",
    "Clocks tick.",
    "Moss likes shade.",
]
"""Of as many things, so that none clashes and each makes one entry of the log."""
SAID = len(STATEMENTS)


async def first_event(lines: Any) -> dict[str, str]:
    """One event of a stream of server-sent events, with its fields."""
    event: dict[str, str] = {}
    async for line in lines:
        if not line and "data" in event:
            return event
        name, _, value = line.partition(":")
        event[name] = value.strip()
    raise AssertionError("the stream ended")


@pytest.mark.parametrize(
    ("setting", "value", "kept"),
    [("COUNT", "3", 3), ("AGE", "0.001", 0), ("BYTES", "1", 0), ("BYTES", "{three}", 3)],
)
async def test_who_comes_back_to_what_was_dropped_is_told_and_gets_none_of_it(
    start_server: StartServer, setting: str, value: str, kept: int
) -> None:
    before = start_server()
    async with web(before) as http, peer(before) as client:
        for number, text in enumerate(STATEMENTS):
            await client.publish(id=f"g{number}", text=text)
        page = (await http.get("/v1/history", params={"channel": "geoids"})).json()
    epoch = page["epoch"]
    assert offsets(page["events"]) == list(range(1, SAID + 1))
    before.stop()

    sizes = [len(msgspec.json.encode(each["data"])) for each in page["events"]]
    value = value.format(three=sum(sizes[-3:]))
    server = start_server(**{f"KIMERA_DATABASE__RETENTION_{setting}": value})
    await server.line(lambda line: "log trimmed" in line)
    gone = SAID - kept
    async with web(server) as http:
        async with peer(server) as client:
            for since in range(gone):
                reply = await client.done("subscribe", channel="geoids", since={"epoch": epoch, "offset": since})
                told = (reply["epoch"], reply["offset"], reply["was_recovering"], reply["recovered"])
                assert told == (epoch, SAID, True, False)
                await client.done("unsubscribe", channel="geoids")
            await client.done("subscribe", channel="geoids", since={"epoch": epoch, "offset": gone - 1})
            refused = await client.ask(
                "history", channel="geoids", limit=100, since={"epoch": epoch, "offset": gone - 1}
            )
            assert (refused["op"], refused["code"]) == ("error", "bad_position")
        for since in range(gone):
            params = {"channel": "geoids", "since": f"{epoch}:{since}"}
            response = await http.get("/v1/history", params=params)
            assert (response.status_code, response.json()["code"]) == (400, "bad_position"), response.text
            async with http.stream("GET", "/v1/events", params=params) as stream:
                event = await first_event(stream.aiter_lines())
            assert (event["event"], event["id"]) == ("subscribed", f"{epoch}:{SAID}")
            assert '"recovered":false' in event["data"]

        # The last position from which nothing is missing, and what is kept without naming one.
        async with peer(server) as client:
            reply = await client.done("subscribe", channel="geoids", since={"epoch": epoch, "offset": gone})
            assert (reply["was_recovering"], reply["recovered"]) == (True, True)
            await client.publish(id="after", text="A live statement.")
            heard = await client.wait_events("geoids", kept + 1)
            assert offsets(heard) == list(range(gone + 1, SAID + 2))
            assert heard[-1]["data"]["id"] == "after"
        for params in ({}, {"since": f"{epoch}:{gone}"}):
            page = (await http.get("/v1/history", params={"channel": "geoids", **params})).json()
            assert offsets(page["events"]) == list(range(gone + 1, SAID + 2))
        for number in range(SAID):
            assert (await http.get(f"/v1/geoids/g{number}")).status_code == 200, "only the log is trimmed"
