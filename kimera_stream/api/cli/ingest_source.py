"""Files of statements: JSON lines of geoids or of premise and hypothesis, or plain lines; gzipped or not; or a pipe.

Reading happens in worker threads (a pipe may stay silent for hours), parsing on the event loop in small batches.
"""

import gzip
import hashlib
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import anyio
import anyio.to_thread
import msgspec
from anyio.streams.memory import MemoryObjectSendStream

from kimera_stream.client.ingest import Statement
from kimera_stream.protocol.errors import BadRequestError
from kimera_stream.protocol.objects import GeoidBody

CHUNK = 64 * 1024
"""Bytes read at a time."""
MAX_LINE = 1024 * 1024
"""Bytes of a line at most: the contract's limit of an NDJSON line."""

BODY_FIELDS = frozenset(GeoidBody.__struct_fields__)
Format = Literal["auto", "jsonl", "text"]


class LineError(ValueError):
    """A line that is no statement; the message says what was expected."""


@dataclass(slots=True)
class ReadProgress:
    """How far reading has come: of the bytes on disk (compressed ones in a .gz), and in lines."""

    bytes_total: int | None
    bytes_read: int = 0
    line: int = 0
    statements: int = 0


class LineReader:
    """Lines of a file or of standard input (``-``), as they become available.

    Raises:
        BadRequestError: the file cannot be read.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._raw: BinaryIO
        try:
            if path == "-":
                self._raw = sys.stdin.buffer
                total = None
            else:
                self._raw = Path(path).open("rb")  # noqa: SIM115 - closed by close()
                total = os.fstat(self._raw.fileno()).st_size or None
        except OSError as exc:
            raise BadRequestError(f"cannot read {path}: {exc.strerror}") from exc
        self.progress = ReadProgress(total)
        self._data: Any = self._raw
        if path.endswith(".gz"):
            self._data = gzip.GzipFile(fileobj=self._raw)
        self._rest = b""
        self._ended = False

    def read_lines(self) -> list[bytes] | None:
        """Some further lines, without their newlines; None at the end. Blocks until there is one.

        Raises:
            BadRequestError: the file is damaged or has a line that is too long.
        """
        while not self._ended:
            try:
                chunk: bytes = self._data.read1(CHUNK)
            except (OSError, EOFError, zlib.error) as exc:
                raise BadRequestError(f"cannot read on in {self.path}: {exc}") from exc
            if not chunk:
                self._ended = True
                last, self._rest = self._rest, b""
                return [last] if last else None
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            if len(self._rest) > MAX_LINE:
                raise BadRequestError(f"{self.path}: a line is longer than {MAX_LINE} bytes; is this a text file?")
            if self.progress.bytes_total is not None:
                self.progress.bytes_read = self._raw.tell()
            if lines:
                return lines
        return None

    def close(self) -> None:
        """Close the file, but not standard input."""
        if self._raw is not sys.stdin.buffer:
            self._raw.close()


class Parser:
    """Turns lines into statements whose ids depend on the source's name, the line and the content alone.

    Args:
        name: Name of the source: the same file sent again gives the same ids.
        format: ``jsonl``, ``text``, or ``auto`` (JSON lines if the first line is a JSON object).
        field: Field that holds the text, for JSON lines that are not geoids.
        agent: Originator of statements that name none.
        session: Session of statements that name none.
    """

    def __init__(
        self,
        name: str,
        *,
        format: Format = "auto",
        field: str | None = None,
        agent: str | None = None,
        session: str | None = None,
    ) -> None:
        self._name = name
        self._format = format
        self._field = field
        self._agent = agent
        self._session = session

    def parse(self, number: int, line: bytes) -> list[Statement]:
        """The statements of one line; none for an empty one.

        Raises:
            LineError: it cannot be read.
        """
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            text = line.decode().strip()
        except UnicodeDecodeError as exc:
            raise LineError(f"invalid UTF-8 at byte {exc.start}") from None
        if not text:
            return []
        if self._format == "auto":
            self._format = "jsonl" if text.startswith("{") else "text"
        if self._format == "text":
            return [self._statement(number, 0, GeoidBody(text=text))]
        return [self._statement(number, part, body) for part, body in enumerate(self._bodies(text))]

    def _bodies(self, text: str) -> Iterator[GeoidBody]:
        try:
            row = msgspec.json.decode(text, type=dict[str, Any])
        except (msgspec.DecodeError, RecursionError) as exc:
            raise LineError(f"expected a JSON object ({exc})") from None
        if self._field is not None:
            value = row.get(self._field)
            if not isinstance(value, str):
                raise LineError(f"{self._field}: expected a string, got {type(value).__name__}")
            yield GeoidBody(text=value)
        elif "premise" in row and "hypothesis" in row:
            for name in ("premise", "hypothesis"):
                if not isinstance(row[name], str):
                    raise LineError(f"{name}: expected a string, got {type(row[name]).__name__}")
                yield GeoidBody(text=row[name])
        elif not row.keys() & {"text", "vector", "semantic_state", "symbolic_state"}:
            fields = ", ".join(list(row)[:6]) or "none"
            raise LineError(
                f"no text, vector, semantic_state or symbolic_state (fields: {fields}); name one with --field"
            )
        else:
            extra = sorted(row.keys() - BODY_FIELDS)
            if extra:
                raise LineError(f"unknown field {extra[0]!r}; choose the text with --field, or remove it")
            try:
                yield msgspec.convert(row, GeoidBody)
            except msgspec.ValidationError as exc:
                raise LineError(str(exc)) from None

    def _statement(self, number: int, part: int, body: GeoidBody) -> Statement:
        changes: dict[str, Any] = {}
        if body.originator_agent_id is None and self._agent:
            changes["originator_agent_id"] = self._agent
        if body.session_id is None and self._session:
            changes["session_id"] = self._session
        geoid_id = body.id
        if geoid_id is None:
            content = msgspec.json.encode(body)
            seed = f"{self._name}\0{number}\0{part}\0".encode() + content
            geoid_id = "i-" + hashlib.blake2b(seed, digest_size=12).hexdigest()
            changes["id"] = geoid_id
        encoded = msgspec.json.encode(msgspec.structs.replace(body, **changes) if changes else body)
        return Statement(number, geoid_id, encoded)


async def feed(
    reader: LineReader,
    parser: Parser,
    into: MemoryObjectSendStream[list[Statement]],
    *,
    skip: int,
    on_error: Callable[[int, str], None],
) -> None:
    """Read, parse and hand on until the source ends; the first ``skip`` lines are passed over."""
    number = 0
    progress = reader.progress
    async with into:
        while True:
            lines = await anyio.to_thread.run_sync(reader.read_lines, abandon_on_cancel=True)
            if lines is None:
                return
            batch: list[Statement] = []
            for line in lines:
                number += 1
                if number <= skip:
                    if number == 1:
                        _peek(parser, line)
                    continue
                try:
                    batch += parser.parse(number, line)
                except LineError as exc:
                    on_error(number, str(exc))
            progress.line = number
            progress.statements += len(batch)
            if batch:
                await into.send(batch)


def _peek(parser: Parser, line: bytes) -> None:
    """Let the parser see the first line although it is passed over: the format is known by it."""
    try:
        parser.parse(1, line)
    except LineError:
        return


def head_digest(path: str, lines: int) -> str:
    """Digest of the first ``lines`` lines: whether a file is still the one that was begun. Blocking.

    Raises:
        BadRequestError: the file cannot be read.
    """
    reader = LineReader(path)
    digest = hashlib.blake2b(digest_size=16)
    left = lines
    try:
        while left > 0:
            found = reader.read_lines()
            if found is None:
                break
            for line in found[:left]:
                digest.update(line + b"\n")
            left -= len(found[:left])
    finally:
        reader.close()
    return digest.hexdigest()
