"""Follow contradictions and remember where you were, across restarts of this program and of the server.

    python examples/subscribe.py [URL]

The position is kept by the server under the name of a durable cursor. Started for the first time, it begins now.
"""

import sys

import anyio

from kimera_stream.client import Event, Gap, connect
from kimera_stream.protocol.errors import NotFoundError

CURSOR = "example-subscriber"


async def main(url: str) -> None:
    async with connect(url, on_state=lambda state, text: print(f"[{state}] {text}", file=sys.stderr)) as client:
        since: str | None = CURSOR
        try:
            await client.history("contradictions", since=CURSOR, limit=1)
        except NotFoundError:
            since = None
        async with client.subscribe("contradictions", since=since) as events:
            async for item in events:
                if isinstance(item, Gap):
                    # The log no longer has what happened since: reload over GET /v1/contradictions, then go on.
                    print(f"missed events before {item.start}", file=sys.stderr)
                elif isinstance(item, Event):
                    show(item)
                    # What is acknowledged is not sent again: acknowledge after handling, not before.
                    await client.ack("contradictions", item.offset, CURSOR)


def show(event: Event) -> None:
    data = event.data
    print(f"{event.type} {data['score']:.2f}")
    print(f"  {data.get('a_text', data['a'])}")
    print(f"  {data.get('b_text', data['b'])}")
    print(f"  because {'; '.join(data['why'])}")


if __name__ == "__main__":
    try:
        anyio.run(main, sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8765")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
