"""How fast a subscriber that starts at the beginning of the log is served: a real server, a real WebSocket, a reader that only counts.

Used by ``bench.log``; ``python -m bench.replay --folder FOLDER --json`` runs it alone, on what ``bench.restart --folder FOLDER`` made
or on a log of its own.
"""

import argparse
import base64
import json
import os
import shutil
import socket
import struct
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from bench.restart import make
from bench.server import Running, server

_READ = 1 << 20
_MARK = b'{"op":"event"'
"""What every event starts with; the data of none of ours holds it."""


def _frame(message: dict[str, Any]) -> bytes:
    """A client's text frame; a mask of zeros leaves the payload as it is."""
    payload = json.dumps(message).encode()
    return b"\x81" + struct.pack("!BH", 0x80 | 126, len(payload)) + bytes(4) + payload


def _open(address: str) -> tuple[socket.socket, dict[str, Any]]:
    """A connected WebSocket, and the answer to ``connect``."""
    host, _, port = address.partition(":")
    sock = socket.create_connection((host, int(port)))
    key = base64.b64encode(os.urandom(16)).decode()
    sock.sendall(
        f"GET /v1/stream HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: kimera.v1.json\r\n\r\n".encode()
    )
    head = b""
    while b"\r\n\r\n" not in head:
        head += sock.recv(1)
    if b" 101 " not in head.partition(b"\r\n")[0]:
        raise RuntimeError(head.decode())
    sock.sendall(_frame({"op": "connect", "id": 1}))
    first = sock.recv(2, socket.MSG_WAITALL)
    size = first[1] if first[1] < 126 else int.from_bytes(sock.recv(2, socket.MSG_WAITALL), "big")
    return sock, json.loads(sock.recv(size, socket.MSG_WAITALL))


def replayed(running: Running, channel: str, expected: int) -> dict[str, Any]:
    """Subscribe from offset 0 and count until the newest entry has come."""
    sock, connected = _open(running.url.removeprefix("http://"))
    last = b'"offset":%d,' % connected["offset"]
    seen = size = 0
    tail = b""
    buffer = bytearray(_READ)
    view = memoryview(buffer)
    used, began = running.processor_seconds(), time.perf_counter()
    sock.sendall(
        _frame({"op": "subscribe", "id": 2, "channel": channel, "since": {"epoch": connected["epoch"], "offset": 0}})
    )
    while True:
        got = sock.recv_into(view)
        if not got:
            raise RuntimeError("the server closed the connection")
        size += got
        data = tail + bytes(view[:got])
        seen += data.count(_MARK)
        # What may be the start of a mark is looked at again with what follows, a whole one is not.
        tail = data[-(len(_MARK) - 1) :]
        if last in data[-4096:] and seen == expected:
            break
    seconds = time.perf_counter() - began
    used = running.processor_seconds() - used
    sock.close()
    return {
        "entries": seen,
        "megabytes": round(size / 1e6, 1),
        "seconds": round(seconds, 2),
        "per_s": round(seen / seconds),
        "server_cpu_seconds": round(used, 2),
        "per_server_cpu_s": round(seen / used) if used else None,
    }


def measure(data_dir: Path, output: Path, rounds: int, entries: int, **settings: str) -> dict[str, Any]:
    """The best round, and the median rate, over a log that has ``entries`` entries on the channel ``geoids``."""
    # The reader answers no pings.
    with server(data_dir, output, KIMERA_STREAM__PING_INTERVAL="3600", **settings) as running:
        found = [replayed(running, "geoids", entries) for _ in range(rounds)]
    best = max(found, key=lambda each: each["per_s"])
    return best | {"median_per_s": sorted(each["per_s"] for each in found)[rounds // 2], "rounds": rounds}


def served(folder: Path, *, entries: int, geoids: int, rounds: int, **settings: str) -> dict[str, Any]:
    """The log in ``folder`` made as long as asked for, and replayed."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    head = anyio.run(partial(make, folder / "data", geoids=geoids, upto=entries))
    return measure(folder / "data", folder / "output.txt", rounds, head, **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--folder", type=Path, help="where the data is, or is made, and kept; otherwise thrown away")
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--geoids", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp()) if options.folder is None else options.folder
    try:
        result = served(folder, entries=options.entries, geoids=options.geoids, rounds=options.rounds)
    finally:
        if options.folder is None:
            shutil.rmtree(folder)
    print(json.dumps(result) if options.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
