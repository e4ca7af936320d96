"""The run behind ``kimera-stream ingest``: source, sender, notes and progress side by side."""

import secrets
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from kimera_stream.api.cli import ingest_state
from kimera_stream.api.cli.console import clean, err, first_error, out, print_json
from kimera_stream.api.cli.ingest_source import Format, LineReader, Parser, feed, head_digest
from kimera_stream.api.cli.ingest_state import IngestState
from kimera_stream.api.cli.render import contradiction_text
from kimera_stream.client.backoff import Backoff
from kimera_stream.client.http import HttpClient
from kimera_stream.client.ingest import Ingest, Statement
from kimera_stream.client.ingest import Progress as SendProgress
from kimera_stream.client.wire import http_base
from kimera_stream.protocol.errors import OperationalError, UnavailableError
from kimera_stream.protocol.objects import Contradiction

SAVE_INTERVAL = 1.0
DIGEST_LINES = 1000
"""Lines at the head of a file by which it is recognised."""


@dataclass(frozen=True, slots=True)
class IngestOptions:
    """The command's options; see ``ingest``."""

    file: str
    format: Format
    field: str | None
    agent: str | None
    session: str | None
    name: str | None
    window: int
    state: Path | None
    restart: bool
    patience: float
    show: bool
    json: bool
    url: str
    token: str | None


async def run(options: IngestOptions) -> int:
    """Send the file; the exit code is 1 if any line was rejected.

    Raises:
        OperationalError: the file cannot be read, or the server refuses or stays away.
    """
    from_pipe = options.file == "-"
    epoch = await _epoch(options)
    path = None if from_pipe else options.state or ingest_state.default_path(options.file, http_base(options.url))
    before = None if path is None or options.restart else await anyio.to_thread.run_sync(ingest_state.load, path)
    if before is not None and not await _still_holds(before, options, epoch):
        err().print("what an earlier run noted does not fit any more (another file or database): starting at line 1")
        before = None
    skip = before.line if before is not None else 0
    if before is not None and skip:
        err().print(f"going on after line {skip}" + (" (an earlier run had come to the end)" if before.done else ""))
    reader = LineReader(options.file)
    # Whatever comes through a pipe is new each time; a file is the same file when it is sent again.
    name = options.name or (secrets.token_hex(8) if from_pipe else Path(options.file).name)
    parser = Parser(name, format=options.format, field=options.field, agent=options.agent, session=options.session)
    state = IngestState(http_base(options.url), epoch, _absolute(options.file), line=skip)
    try:
        with Display(options, reader, skip) as display:
            job = Ingest(
                options.url,
                token=options.token,
                window=options.window,
                patience=options.patience,
                on_progress=display.update,
                on_contradiction=display.found if options.show else None,
            )
            await _send(job, reader, parser, skip, path, state, before is not None and not before.done)
    finally:
        reader.close()
    display.summary(job.progress)
    return 1 if job.progress.rejected else 0


async def _send(
    job: Ingest, reader: LineReader, parser: Parser, skip: int, path: Path | None, state: IngestState, look_first: bool
) -> None:
    send, receive = anyio.create_memory_object_stream[list[Statement]](2)
    failure: BaseException | None = None
    if path is not None:
        await _note(job, path, state, skip)  # killed at any moment from now on, the next run looks what has been sent
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(partial(feed, reader, parser, send, skip=skip, on_error=job.progress.reject))
            if path is not None:
                group.start_soon(_keep_notes, job, path, state, skip)
            await job.run(receive, look_first=look_first)
            group.cancel_scope.cancel()
        state.done = True
    except BaseExceptionGroup as errors:
        operational, other = errors.split(OperationalError)
        if other is not None or operational is None:
            raise
        failure = first_error(operational)
    finally:
        receive.close()
        if path is not None:
            with anyio.CancelScope(shield=True):
                await _note(job, path, state, skip)
    if failure is not None:
        raise failure


async def _keep_notes(job: Ingest, path: Path, state: IngestState, skip: int) -> None:
    while True:
        await anyio.sleep(SAVE_INTERVAL)
        await _note(job, path, state, skip)


async def _note(job: Ingest, path: Path, state: IngestState, skip: int) -> None:
    state.line = max(skip, job.progress.done_line)
    wanted = min(state.line, DIGEST_LINES)
    if wanted != state.digest_lines:
        state.digest = await anyio.to_thread.run_sync(head_digest, state.file, wanted)
        state.digest_lines = wanted
    try:
        await anyio.to_thread.run_sync(ingest_state.save, path, state)
    except OSError as exc:
        raise UnavailableError(f"cannot write {path}: {exc.strerror}; name another file with --state") from exc


async def _still_holds(before: IngestState, options: IngestOptions, epoch: str) -> bool:
    if before.epoch != epoch or before.file != _absolute(options.file):
        return False
    if not before.digest_lines:
        return True  # nothing had been answered: there is nothing to compare, but something may have been sent
    return before.digest == await anyio.to_thread.run_sync(head_digest, options.file, before.digest_lines)


async def _epoch(options: IngestOptions) -> str:
    """Identity of the server's log; waits for a server that is not there yet."""
    backoff = Backoff()
    give_up = anyio.current_time() + options.patience
    attempt = 0
    with HttpClient(options.url, token=options.token) as client:
        while True:
            try:
                return (await anyio.to_thread.run_sync(client.position)).epoch
            except OperationalError as exc:
                delay = backoff.delay(attempt)
                if not exc.temporary or anyio.current_time() + delay > give_up:
                    raise
                if attempt == 0:
                    err().print(f"{exc.message}; waiting for it (Ctrl-C to stop)", style="yellow")
                attempt += 1
                await anyio.sleep(delay)


def _absolute(file: str) -> str:
    return file if file == "-" else str(Path(file).absolute())


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Statements per second over the last while."""
        speed = task.fields.get("rate")
        return Text(f"{speed:,.0f}/s" if speed else "-/s", style="progress.data.speed")


class _Eta(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Time left, from how fast the bytes of the file go."""
        if task.total is None or not task.completed or task.elapsed is None or task.finished:
            return Text("--:--", style="progress.remaining")
        left = int(task.elapsed * (task.total - task.completed) / task.completed)
        hours, rest = divmod(left, 3600)
        text = f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60:02d}:{rest % 60:02d}"
        return Text(text, style="progress.remaining")


class Display:
    """Progress on standard error, contradictions and the summary on standard output."""

    def __init__(self, options: IngestOptions, reader: LineReader, skip: int) -> None:
        self._options = options
        self._reader = reader
        self._skip = skip
        self._console = err()
        self._started = 0.0
        self._marks: list[tuple[float, int]] = []
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            _Rate(),
            TimeElapsedColumn(),
            _Eta(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(clean(Path(options.file).name), total=reader.progress.bytes_total, note="")

    def __enter__(self) -> "Display":
        self._started = anyio.current_time()
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def update(self, progress: SendProgress) -> None:
        """Show where it is."""
        now = anyio.current_time()
        self._marks = [mark for mark in self._marks if now - mark[0] <= 5.0][-100:]
        self._marks.append((now, progress.committed))
        (then, count), (_, newest) = self._marks[0], self._marks[-1]
        note = f"{progress.committed + progress.known:,} statements, {progress.contradictions:,} contradictions"
        if progress.rejected:
            note += f", {progress.rejected:,} rejected"
        read = self._reader.progress
        if progress.state:
            note = clean(progress.state)
        # What was read runs ahead of what was answered by the window; show the part that was answered.
        answered = progress.committed + progress.known + progress.rejected
        share = min(1.0, answered / read.statements) if read.statements else 0.0
        self._bar.update(
            self._task,
            completed=int(read.bytes_read * share) if read.bytes_total is not None else 0,
            note=note,
            rate=(newest - count) / (now - then) if now > then else None,
        )

    def found(self, contradiction: Contradiction) -> None:
        """Print a contradiction."""
        if self._options.json:
            print_json({"contradiction": contradiction})
        else:
            self._bar.stop()
            out().print(contradiction_text(msgspec.to_builtins(contradiction)))
            self._bar.start()

    def summary(self, progress: SendProgress) -> None:
        """What became of it all."""
        seconds = max(1e-9, anyio.current_time() - self._started)
        rate = progress.committed / seconds
        if self._options.json:
            print_json(
                {
                    "statements": progress.committed,
                    "known": progress.known,
                    "contradictions": progress.contradictions,
                    "rejected": progress.rejected,
                    "reconnects": progress.reconnects,
                    "lines": self._reader.progress.line,
                    "seconds": round(seconds, 3),
                    "rate": round(rate, 1),
                    "errors": [{"line": line, "message": message} for line, message in progress.errors],
                }
            )
            return
        console = out()
        console.print(
            f"{progress.committed:,} statements, {progress.contradictions:,} contradictions "
            f"in {seconds:.1f} s ({rate:,.0f}/s)"
        )
        if progress.known:
            console.print(f"{progress.known:,} were there already")
        if progress.reconnects:
            console.print(f"{progress.reconnects} reconnects")
        for line, message in progress.errors:
            console.print(f"line {line}: {clean(message)}", style="red")
        if progress.rejected > len(progress.errors):
            console.print(f"... and {progress.rejected - len(progress.errors)} more rejected", style="red")
