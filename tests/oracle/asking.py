"""What every node has to answer once nothing is said any more: who listens, what is stored, what relates to it."""

from collections.abc import Sequence
from random import Random

import anyio

from tests.oracle.model import Log, digest
from tests.oracle.wire import Gone, Web, connected

SAMPLED = 6
"""Statements asked about."""
RESULTS = 50
"""Of a search: more than there are statements with one text."""
SETTLED = 30.0
"""Seconds after which connections that are gone must not be counted any more."""


async def ask_around(urls: Sequence[str], log: Log, listening: int, rng: Random, *, slow: float) -> list[str]:
    """Ask each node the same.

    Args:
        urls: Base addresses.
        listening: How many subscribe to ``geoids``.
        slow: How many times longer it may take.
    """
    living = [entry for entry in log.channels["geoids"] if log.listed.get(entry.data["id"]) == digest(entry.data)]
    plain = [data for entry in living if "probe" not in (data := entry.data)["metadata"]]
    sampled = rng.sample(plain, min(SAMPLED, len(plain)))
    wrong: list[str] = []
    for url in urls:
        try:
            async with Web(url, patience=SETTLED * slow) as web:
                for geoid in sampled:
                    status, found = await web.ask("GET", f"/v1/geoids/{geoid['id']}")
                    if status != 200 or digest(found) != digest(geoid):
                        wrong.append(f"{url}: {geoid['id']} is asked for and answered with {status} {found}")
                for geoid in sampled:
                    if geoid.get("text"):
                        wrong += await _search(web, geoid["text"], geoid["id"], url)
            wrong += await _presence(url, listening, SETTLED * slow)
        except Gone as gone:
            wrong.append(f"{url}: no answer ({gone})")
    return wrong


async def _search(web: Web, text: str, geoid_id: str, url: str) -> list[str]:
    body = {"text": text, "relation": "related", "k": RESULTS}
    status, found = await web.ask("POST", "/v1/search", json=body)
    ids = [each["geoid"]["id"] for each in found["items"]] if status == 200 else []
    return [] if geoid_id in ids else [f"{url}: a search for the text of {geoid_id} has {status} {ids[:5]}"]


async def _presence(url: str, listening: int, within: float) -> list[str]:
    said = None
    with anyio.move_on_after(within):
        while said != listening:
            try:
                async with connected(f"{url.replace('http', 'ws', 1)}/v1/stream", "json") as wire:
                    reply = await wire.answer(await wire.send("presence", channel="geoids"))
                    said = reply.get("subscribers")
            except Gone:
                said = None
            await anyio.sleep(0.2)
    return [] if said == listening else [f"{url}: {listening} listen to geoids, presence says {said}"]
