"""``kimera-stream tail``."""

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kimera_stream.api.cli.console import err, out, print_json
from kimera_stream.api.cli.options import DEFAULT_URL, Json, Token, Url

if TYPE_CHECKING:
    from kimera_stream.client.session import Client
    from kimera_stream.client.subscription import Item


def tail(
    channels: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CHANNEL...",
            help="contradictions (the default), geoids, scars, field, stats, geoid:ID, session:ID, agent:ID, watch:ID.",
        ),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            help="Start after a position (EPOCH:OFFSET or OFFSET), at `start`, or at a durable cursor's name."
        ),
    ] = None,
    last: Annotated[int | None, typer.Option("--last", "-n", min=0, help="Start with the last so many events.")] = None,
    filter: Annotated[
        str | None, typer.Option(help="JSON filter tree, or `data.score>=0.8 and data.state=open`.")
    ] = None,
    count: Annotated[int | None, typer.Option("--count", min=1, help="End after so many events.")] = None,
    json: Json = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Follow channels as things happen. Reconnects and goes on where it was; Ctrl-C ends it."""
    import anyio

    from kimera_stream.api.cli.filters import parse_filter

    tree = None if filter is None else parse_filter(filter)
    follower = Follower(json=json, count=count)
    anyio.run(follower.follow, url, token, channels or ["contradictions"], since, last, tree)


class Follower:
    """Prints what comes in on several channels until there is enough of it."""

    def __init__(self, *, json: bool, count: int | None) -> None:
        self._json = json
        self._left = math.inf if count is None else count
        self._out = out()
        self._err = err()
        self._was_lost = False

    async def follow(
        self,
        url: str,
        token: str | None,
        channels: list[str],
        since: str | None,
        last: int | None,
        tree: dict[str, Any] | None,
    ) -> None:
        """Connect and print; returns when the count is reached."""
        import anyio

        from kimera_stream.client.session import connect
        from kimera_stream.protocol.errors import KimeraError

        failures: list[KimeraError] = []
        async with connect(url, token=token, on_state=self._state) as client, anyio.create_task_group() as group:

            async def one(channel: str) -> None:
                try:
                    await self._channel(client, channel, since, last, tree)
                except KimeraError as exc:
                    failures.append(exc)
                group.cancel_scope.cancel()

            for channel in dict.fromkeys(channels):
                group.start_soon(one, channel)
        if failures:
            raise failures[0]

    async def _channel(
        self, client: "Client", channel: str, since: str | None, last: int | None, tree: dict[str, Any] | None
    ) -> None:
        from kimera_stream.api.cli.filters import parse_since
        from kimera_stream.protocol.channels import channel_kind

        start = None if since is None else parse_since(since, client.server.epoch)
        if channel_kind(channel) == "latest":
            start = last = None
        async with client.subscribe(channel, since=start, rewind=last, filter=tree) as items:
            if not self._json:
                self._err.print(f"following {channel} from offset {client.server.offset}", style="dim")
            async for item in items:
                if self._show(item):
                    self._left -= 1
                if self._left <= 0:
                    return

    def _show(self, item: "Item") -> bool:
        from kimera_stream.client.subscription import Gap
        from kimera_stream.protocol.messages import Event

        if isinstance(item, Event):
            if self._json:
                print_json(item)
            else:
                from kimera_stream.api.cli.render import event_text

                self._out.print(
                    event_text({"type": item.type, "ts": item.ts, "data": item.data, "channel": item.channel})
                )
            return True
        if isinstance(item, Gap):
            if self._json:
                print_json(
                    {"op": "gap", "channel": item.channel, "epoch": item.start.epoch, "offset": item.start.offset}
                )
            else:
                asked = f" {item.asked}" if item.asked else ""
                self._err.print(
                    f"{item.channel}: what happened since{asked} is not kept any more; going on at {item.start}",
                    style="yellow",
                )
        elif not self._json:
            self._err.print(f"{item.channel}: {item.dropped} values were passed over", style="dim")
        return False

    def _state(self, state: str, text: str) -> None:
        if state == "waiting":
            self._was_lost = True
            self._err.print(text, style="yellow")
        elif state == "connected" and self._was_lost:
            self._was_lost = False
            self._err.print("connected again", style="green")
