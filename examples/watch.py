"""A standing query: tell me the moment that anybody contradicts this statement.

python examples/watch.py "The launch is on 14 May." [URL]
"""

import sys

import anyio

from kimera_stream.client import Event, connect


async def main(text: str, url: str) -> None:
    async with connect(url) as client, client.watch("example", text=text, kinds=("contradicts",)) as matches:
        print(f"waiting for whatever contradicts: {text}")
        async for item in matches:
            if isinstance(item, Event):
                print(f"{item.data['score']:.2f}  {item.data['geoid'].get('text')}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        anyio.run(main, sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "http://127.0.0.1:8765")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
