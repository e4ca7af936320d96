"""A WebSocket client that can do everything wrong: frames byte by byte over a plain socket."""

import os
import socket
import ssl
import struct
from dataclasses import dataclass
from typing import Any

import anyio
import msgspec
from anyio.streams.tls import TLSStream

CONT, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10


def build(
    opcode: int,
    payload: bytes = b"",
    *,
    fin: bool = True,
    rsv: int = 0,
    masked: bool = True,
    length: int | None = None,
    wide: int = 0,
) -> bytes:
    """A client frame. `length` lies about the payload's; `wide` (2 or 8) forces that many length bytes."""
    first = (0x80 if fin else 0) | rsv << 4 | opcode
    size = len(payload) if length is None else length
    flag = 0x80 if masked else 0
    if wide == 8 or (not wide and size > 0xFFFF):
        head = struct.pack("!BBQ", first, flag | 127, size)
    elif wide == 2 or size > 125:
        head = struct.pack("!BBH", first, flag | 126, size)
    else:
        head = struct.pack("!BB", first, flag | size)
    if not masked:
        return head + payload
    key = os.urandom(4)
    return head + key + bytes(b ^ key[i % 4] for i, b in enumerate(payload))


@dataclass
class Frame:
    opcode: int
    payload: bytes
    fin: bool
    rsv: int

    @property
    def code(self) -> int:
        return struct.unpack("!H", self.payload[:2])[0] if len(self.payload) >= 2 else 1005


class RawPeer:
    """Sends what it is told to and parses what comes."""

    def __init__(self, stream: anyio.abc.ByteStream) -> None:
        self.stream = stream
        self.data = b""
        self.response = b""

    @classmethod
    async def open(
        cls,
        port: int,
        *,
        headers: dict[str, str] | None = None,
        receive_buffer: int | None = None,
        path: str = "/v1/stream",
        tls: ssl.SSLContext | None = None,
    ) -> "RawPeer":
        sock = socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        sock.connect_ex(("127.0.0.1", port))
        stream: anyio.abc.ByteStream = await anyio.abc.SocketStream.from_socket(sock)
        if tls is not None:
            stream = await TLSStream.wrap(stream, ssl_context=tls, hostname="localhost", standard_compatible=False)
        peer = cls(stream)
        lines = {
            "Host": f"127.0.0.1:{port}",
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
            "Sec-WebSocket-Version": "13",
            **(headers or {}),
        }
        request = f"GET {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items()) + "\r\n"
        await peer.stream.send(request.encode())
        while b"\r\n\r\n" not in peer.data:
            await peer.fill()
        peer.response, _, peer.data = peer.data.partition(b"\r\n\r\n")
        return peer

    async def fill(self) -> None:
        with anyio.fail_after(10):
            self.data += await self.stream.receive()

    async def send(self, *parts: bytes) -> None:
        for part in parts:
            await self.stream.send(part)

    async def say(self, op: str, id: int = 1, **fields: Any) -> None:
        await self.send(build(TEXT, msgspec.json.encode({"op": op, "id": id, **fields})))

    async def frame(self) -> Frame:
        while True:
            if len(self.data) >= 2:
                size = self.data[1] & 0x7F
                start = 2 if size < 126 else 4 if size == 126 else 10
                if len(self.data) >= start:
                    if size >= 126:
                        size = int.from_bytes(self.data[2:start], "big")
                    if len(self.data) >= start + size:
                        head, payload = self.data[0], self.data[start : start + size]
                        assert not self.data[1] & 0x80, "a server does not mask"
                        self.data = self.data[start + size :]
                        return Frame(head & 15, payload, bool(head & 128), head >> 4 & 7)
            await self.fill()

    async def message(self) -> Any:
        frame = await self.frame()
        assert frame.opcode in (TEXT, BINARY), frame
        return msgspec.json.decode(frame.payload) if frame.opcode == TEXT else msgspec.msgpack.decode(frame.payload)

    async def hello(self) -> None:
        await self.say("connect", 1)
        assert (await self.message())["op"] == "connected"

    async def close_code(self) -> int:
        """The code of the close frame, whatever data comes before it; 1006 if the connection just ends."""
        try:
            while True:
                frame = await self.frame()
                if frame.opcode == CLOSE:
                    return frame.code
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            return 1006

    async def ended(self) -> bool:
        """Whether the server ends the TCP connection."""
        try:
            while True:
                await self.fill()
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            return True

    async def aclose(self) -> None:
        await self.stream.aclose()

    async def __aenter__(self) -> "RawPeer":
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()
