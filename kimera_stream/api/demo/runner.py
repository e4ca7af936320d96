"""Opens the feed to a server through its public doors and prints what comes back."""

import secrets
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import msgspec
from rich.console import Console
from rich.text import Text

from kimera_stream.api.cli.console import clean
from kimera_stream.api.cli.render import contradiction_text
from kimera_stream.api.demo.feed import FeedItem, Pair, load_feed
from kimera_stream.api.demo.scorecard import Scorecard, print_scorecard, score_pairs
from kimera_stream.api.demo.server import running_server
from kimera_stream.client.ingest import Ingest, Statement
from kimera_stream.client.session import Client, connect
from kimera_stream.client.subscription import Subscription
from kimera_stream.protocol.messages import Event

PLAYING_TIME = 120.0
"""Seconds that the whole feed takes at the default pace."""
SETTLE_DEADLINE = 30.0
READ_DEADLINE = 180.0
"""Seconds that the verifier may take over what it had to put off while the feed was played."""


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """The command's options.

    Attributes:
        url: A running server to use; None starts one.
        token: Bearer token for that server.
        pace: Seconds between statements; None spreads the feed over ``PLAYING_TIME``; 0 sends it as fast as it goes.
        limit: Only so many statements of the feed.
        stay: Keep the server up at the end until interrupted.
        statements: Print the statements too, not only the contradictions.
    """

    url: str | None = None
    token: str | None = None
    pace: float | None = None
    limit: int | None = None
    stay: bool = False
    statements: bool = True


@dataclass(slots=True)
class Findings:
    """What the subscription has brought so far."""

    prefix: str
    reported: dict[str, Pair] = field(default_factory=dict)
    scores: dict[Pair, float] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    delays: list[float] = field(default_factory=list)
    changed: anyio.Event = field(default_factory=anyio.Event)

    def take(self, kind: str, data: dict[str, Any]) -> None:
        """A contradiction was found, judged again, or no longer holds."""
        pair = frozenset(str(data[side]).removeprefix(self.prefix) for side in ("a", "b"))
        self.seen.add(data["id"])
        if kind == "contradiction.dissolved":
            self.reported.pop(data["id"], None)
        else:
            self.reported[data["id"]] = pair
            self.scores[pair] = float(data["score"])
        self.changed.set()
        self.changed = anyio.Event()

    async def until_seen(self, ids: set[str]) -> None:
        """Wait for the events of the contradictions ``ids``."""
        while not ids <= self.seen:
            await self.changed.wait()


async def run_demo(options: DemoOptions, console: Console | None = None) -> Scorecard:
    """Play the feed and score what was found.

    Raises:
        OperationalError: the server did not start, or cannot be used.
    """
    out = console or Console(highlight=False, markup=False, emoji=False, soft_wrap=not sys.stdout.isatty())
    feed = load_feed()[: options.limit]
    async with AsyncExitStack() as stack:
        url = options.url
        if url is None:
            data_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kimera-demo-")))
            out.print("starting a server of its own (embedded database, packaged encoder) ...", style="dim")
            url = await stack.enter_async_context(
                running_server(data_dir, on_line=lambda line: out.print(clean(line), style="dim"))
            )
        out.print(Text.assemble("dashboard: ", (f"{url}/", "bold underline")))
        card = await _play(feed, url, options, out)
        if options.stay:
            out.print(f"\nthe dashboard stays up at {url}/ until Ctrl-C", style="bold")
            await anyio.sleep_forever()
    return card


async def run_until_told(options: DemoOptions) -> bool:
    """Play the demo until it ends, or until Ctrl-C or SIGTERM; the server it started is stopped either way.

    Returns whether it came to its end.
    """
    finished = False
    # Open until the server has been stopped: a second signal must not end the demo in the middle of that and leave a server behind.
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async with anyio.create_task_group() as group:

            async def receive_signals() -> None:
                async for _ in signals:
                    group.cancel_scope.cancel()

            group.start_soon(receive_signals, name="demo:signals")
            await run_demo(options)
            finished = True
            group.cancel_scope.cancel()
    return finished


async def _play(feed: Sequence[FeedItem], url: str, options: DemoOptions, out: Console) -> Scorecard:
    run = secrets.token_hex(3)
    findings = Findings(prefix=f"{run}-")
    names = {f"{run}-{item.id}": item.source for item in feed}
    stories = list(dict.fromkeys(item.story for item in feed))
    out.print(f"{len(feed)} statements of {len(stories)} stories: {', '.join(stories)}\n", style="dim")
    started = anyio.current_time()
    async with connect(url, token=options.token, patience=10) as client:
        mine = {"field": "data.b", "op": "prefix", "value": findings.prefix}
        async with client.subscribe("contradictions", filter=mine) as events, anyio.create_task_group() as group:
            group.start_soon(_listen, events, findings, names, out)
            if options.pace == 0:
                ids = await _play_fast(feed, run, url, options, out)
            else:
                pace = PLAYING_TIME / len(feed) if options.pace is None else options.pace
                ids = await _play_paced(feed, run, client, pace, findings, options, out)
            with anyio.move_on_after(SETTLE_DEADLINE):
                await findings.until_seen(ids)
            seconds = anyio.current_time() - started
            if not await _until_read(client, out):
                out.print(
                    "the verifier has not read everything: the score counts what was said provisionally", style="yellow"
                )
            group.cancel_scope.cancel()
    card = score_pairs(feed, findings.reported.values())
    out.print()
    print_scorecard(out, card, feed, findings.scores)
    took = f"{len(feed)} statements in {seconds:.1f} s"
    if findings.delays:
        took += (
            f"; a statement was durable and scored after {statistics.median(findings.delays) * 1000:.0f} ms (median)"
        )
    out.print(took, style="dim")
    return card


async def _until_read(client: Client, out: Console) -> bool:
    """Wait until the verifier has read what it put off, as a busy machine makes it; False: not within the deadline.

    The score is of its word, not of the provisional one.
    """
    told = read = False
    with anyio.move_on_after(READ_DEADLINE):
        async with client.subscribe("stats") as events:
            # The first value is of before; and once nothing is pending, the next one comes after the last contradiction.
            number = 0
            async for item in events:
                if not isinstance(item, Event):
                    continue
                number += 1
                pending = item.data.get("verification", {}).get("pending", 0)
                if pending and not told:
                    told = True
                    out.print("the verifier reads what it had to put off ...", style="dim")
                if pending == 0 and read:
                    return True
                read = number > 1 and pending == 0
    return False


async def _listen(events: Subscription, findings: Findings, names: dict[str, str], out: Console) -> None:
    async for item in events:
        if not isinstance(item, Event):
            continue
        known = item.data["id"] in findings.seen
        findings.take(item.type, item.data)
        if item.type == "contradiction.found" and not known:
            out.print(contradiction_text(item.data, names=names))
            out.print()


async def _play_paced(
    feed: Sequence[FeedItem],
    run: str,
    client: Client,
    pace: float,
    findings: Findings,
    options: DemoOptions,
    out: Console,
) -> set[str]:
    """One statement after the other, each acknowledged before the next; returns the ids of what they contradict."""
    ids: set[str] = set()
    due = anyio.current_time()
    for item in feed:
        await anyio.sleep_until(due)
        due += pace
        if options.statements:
            out.print(_statement_text(item))
        before = anyio.current_time()
        published = await client.publish(item.body(run))
        findings.delays.append(anyio.current_time() - before)
        ids |= {found.id for found in published.contradictions}
    return ids


async def _play_fast(feed: Sequence[FeedItem], run: str, url: str, options: DemoOptions, out: Console) -> set[str]:
    """All through one streaming request, in order."""
    ids: set[str] = set()
    lines = [
        Statement(number, f"{run}-{item.id}", msgspec.json.encode(item.body(run)))
        for number, item in enumerate(feed, 1)
    ]
    send, receive = anyio.create_memory_object_stream[list[Statement]](1)
    send.send_nowait(lines)
    send.close()
    job = Ingest(url, token=options.token, on_contradiction=lambda found: ids.add(found.id))
    progress = await job.run(receive)
    receive.close()
    for line, message in progress.errors:
        out.print(f"refused: {feed[line - 1].id}: {clean(message)}", style="red")
    return ids


def _statement_text(item: FeedItem) -> Text:
    symbols = ", ".join(f"{key}={value}" for key, value in (item.symbolic_state or {}).items())
    text = Text(f"{item.source:>17}  ", style="dim cyan")
    text.append(clean(item.text or symbols), style="not dim default")
    if item.text and symbols:
        text.append(f"  {clean(symbols)}", style="dim")
    return text
