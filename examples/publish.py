"""Publish statements, each from its own source, and see at once what they contradict.

    python examples/publish.py [URL]

Start a server first: kimera-stream serve
"""

import sys

import anyio

from kimera_stream.client import GeoidBody, connect

STATEMENTS = [
    ("plan", "The maintenance window starts on Saturday at 22:00."),
    ("mail", "The window is announced to customers two days before."),
    ("chat", "The maintenance window does not start on Saturday."),
]


async def main(url: str) -> None:
    async with connect(url) as client:
        for source, text in STATEMENTS:
            published = await client.publish(GeoidBody(text=text, originator_agent_id=source))
            print(f"{published.offset:>6}  {text}")
            for found in published.contradictions:
                print(f"        {found.score:.2f} against: {found.a_text}  ({'; '.join(found.why)})")


if __name__ == "__main__":
    anyio.run(main, sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8765")
