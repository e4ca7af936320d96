"""Reading a whole log, and the lists beside it, over HTTP: the one word of the server that subscribers are compared with."""

from collections import Counter
from typing import Any

import anyio

from tests.oracle.chronicle import Chronicle, check_kept
from tests.oracle.model import MAIN_CHANNELS, Entry, Log, digest, entry_of
from tests.oracle.wire import PATIENCE, Gone, Web

TRIES = 120
PAGE = 1_000
SAMPLED = 12
"""Geoids whose own channels are read."""


async def steady(web: Web, path: str, **params: Any) -> dict[str, Any]:
    """A body that has to come, if not at the first try.

    Raises:
        Gone: it does not.
    """
    last = "nothing"
    for _ in range(TRIES):
        try:
            status, body = await web.ask(
                "GET", path, params={name: each for name, each in params.items() if each is not None}
            )
        except Gone as gone:
            last = str(gone)
        else:
            if status == 200:
                return body
            last = f"{status} {body.get('code')} {body.get('detail')}"
        await anyio.sleep(0.25)
    raise Gone(1006, f"{path}: {last}")


async def read_log(
    url: str,
    extra: tuple[str, ...] = (),
    *,
    slow: float = 1.0,
    chronicle: Chronicle | None = None,
    keep: int | None = None,
) -> Log:
    """The log and its lists, once nothing is added to it any more; nobody may be publishing.

    Args:
        extra: Channels besides the main ones.
        slow: How many times longer an answer may take.
        chronicle: Where what is not kept any more was written down; what is wrong with the rest is added there.
        keep: How many of the last entries are kept at least.
    """
    async with Web(url, patience=PATIENCE * slow) as web:
        while True:
            log = await _read(web, extra, whole=chronicle is None)
            health = await steady(web, "/health")
            if (health["epoch"], health["offset"]) == (log.epoch, log.head):
                break
        if chronicle is not None:
            assert keep is not None
            await chronicle.reach(log.head)
            for channel, told in chronicle.channels.items():
                chronicle.broken += check_kept(channel, log.channels[channel], told, head=log.head, keep=keep)
                log.channels[channel] = list(told)
            log.keep = keep
        return log


async def _read(web: Web, extra: tuple[str, ...], *, whole: bool) -> Log:
    health = await steady(web, "/health")
    log = Log(health["epoch"], health["offset"])
    for channel in (*MAIN_CHANNELS, *extra):
        log.channels[channel] = await _history(web, channel)
    for geoid_id in _much_discussed(log.channels["contradictions"]) if whole else ():
        log.channels[f"geoid:{geoid_id}"] = await _history(web, f"geoid:{geoid_id}")
    log.listed = {each["id"]: digest(each) for each in await _listed(web, "/v1/geoids")}
    log.open = {each["id"]: digest(each) for each in await _listed(web, "/v1/contradictions", state="open")}
    for state in ("resolved", "dissolved"):
        log.closed |= {each["id"]: digest(each) for each in await _listed(web, "/v1/contradictions", state=state)}
    log.scars = {each["id"]: digest(each) for each in await _listed(web, "/v1/scars")}
    return log


async def _history(web: Web, channel: str) -> list[Entry]:
    entries: list[Entry] = []
    since: str | None = None
    more = True
    while more:
        page = await steady(web, "/v1/history", channel=channel, since=since, limit=PAGE)
        entries += [entry_of(event) for event in page["events"]]
        more, since = page["more"], f"{page['epoch']}:{page['offset']}"
    return entries


def _much_discussed(contradictions: list[Entry]) -> list[str]:
    """The geoids that take part in the most."""
    pairs = (entry.data for entry in contradictions)
    counts = Counter(geoid_id for pair in pairs for geoid_id in (pair["a"], pair["b"]))
    return [geoid_id for geoid_id, _ in counts.most_common(SAMPLED)]


async def _listed(web: Web, path: str, **params: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    after: int | None = 0
    while after is not None:
        page = await steady(web, path, after=after, limit=PAGE, **params)
        found += page["items"]
        after = page["next"]
    return found
