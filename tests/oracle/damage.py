"""Damage to the file of a database that is down: what reads it afterwards has to notice, and never tells it as the truth."""

from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.oracle.model import MAIN_CHANNELS, Log, digest, entry_of
from tests.oracle.wire import Gone, Web

PAGE = 50
SQLITE_PAGE = 4096


def flip_bit(file: Path, rng: Random) -> str:
    """Flip one bit, mostly within what a publisher said; returns where."""
    content = bytearray(file.read_bytes())
    marks: list[int] = []
    place = content.find(b'"mark":"')
    while place >= 0:
        marks.append(place)
        place = content.find(b'"mark":"', place + 1)
    if marks and rng.random() < 0.7:
        at = rng.choice(marks) + 8 + rng.randrange(4)
        where = "in a statement's metadata"
    else:
        at, where = rng.randrange(SQLITE_PAGE, len(content)), "anywhere"
    content[at] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return f"bit flip at byte {at} ({where})"


def flip_log_bit(file: Path, rng: Random) -> str:
    """Flip one bit of the write-ahead log that a kill left, in any but the last transaction: that one could be told from a write
    that was interrupted by nobody."""
    path = file.with_name(file.name + "-wal")
    content = bytearray(path.read_bytes()) if path.exists() else bytearray()
    size = 24 + SQLITE_PAGE
    starts = list(range(32, len(content) - size + 1, size))
    ours = [start for start in starts if content[start + 8 : start + 16] == content[16:24]]
    commits = [start for start in ours if any(content[start + 4 : start + 8])]
    if len(commits) < 2:
        return flip_bit(file, rng)
    at = rng.randrange(32, commits[-2] + size)
    content[at] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"bit flip at byte {at} of the write-ahead log"


def tear_page(file: Path, rng: Random) -> str:
    """Let the last page be as after a write that was interrupted: its second half is old, empty or rubbish."""
    content = bytearray(file.read_bytes())
    at = len(content) - SQLITE_PAGE // 2
    content[at:] = rng.choice([b"\0" * (SQLITE_PAGE // 2), rng.randbytes(SQLITE_PAGE // 2)])
    file.write_bytes(content)
    return f"torn page at byte {at}"


@dataclass
class Reading:
    """What reading a damaged log brought.

    Attributes:
        refused: Clear errors.
        altered: Events told otherwise than they had been.
        missing: Events left out of pages that claim to be whole.
        unlisted: Differences in the list of geoids.
    """

    pages: int = 0
    refused: list[str] = field(default_factory=list)
    altered: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)


async def read_damaged(url: str, truth: Log) -> Reading:
    """Read everything that a server on a damaged file lets us read, and compare it with the truth."""
    reading = Reading()
    async with Web(url) as web:
        for channel in MAIN_CHANNELS:
            await _read_channel(web, channel, truth, reading)
        await _read_list(web, truth, reading)
    return reading


async def _read_channel(web: Web, channel: str, truth: Log, reading: Reading) -> None:
    position = 0
    while position < truth.head:
        params = {"channel": channel, "limit": PAGE, "since": f"{truth.epoch}:{position}"}
        try:
            status, page = await web.ask("GET", "/v1/history", params=params)
        except Gone as gone:
            status, page = 0, {"detail": str(gone)}
        reading.pages += 1
        if status != 200:
            reading.refused.append(f"{channel} after {position}: {status} {page.get('code')} {page.get('detail')}")
            position += PAGE
            continue
        got = [entry_of(event) for event in page["events"]]
        for entry in got:
            there = truth.at(channel, entry.offset)
            if there is None or there.digest != entry.digest:
                reading.altered.append(f"{channel}: event {entry.offset} is told otherwise than it was")
        upto = page["offset"] if page["more"] else truth.head
        missing = {each.offset for each in truth.select(channel, position, upto)} - {each.offset for each in got}
        reading.missing += [f"{channel}: event {offset} is left out" for offset in sorted(missing)]
        if upto <= position:
            return
        position = upto


async def _read_list(web: Web, truth: Log, reading: Reading) -> None:
    listed: dict[str, int] = {}
    after: int | None = 0
    while after is not None:
        try:
            status, page = await web.ask("GET", "/v1/geoids", params={"after": after, "limit": 1000})
        except Gone as gone:
            status, page = 0, {"detail": str(gone)}
        if status != 200:
            reading.refused.append(f"the list of geoids: {status} {page.get('code')} {page.get('detail')}")
            return
        listed |= {each["id"]: digest(each) for each in page["items"]}
        after = page["next"]
    reading.unlisted += [
        f"{geoid_id} differs in the list of geoids"
        for geoid_id in sorted(listed.keys() | truth.listed.keys())
        if listed.get(geoid_id) != truth.listed.get(geoid_id)
    ]
