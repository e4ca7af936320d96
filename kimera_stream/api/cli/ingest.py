"""``kimera-stream ingest``."""

from pathlib import Path
from typing import Annotated

import typer

from kimera_stream.api.cli.console import usage_error
from kimera_stream.api.cli.options import DEFAULT_URL, Json, Token, Url


def ingest(
    file: Annotated[str, typer.Argument(help="JSON lines or plain lines, .gz or not; `-` reads standard input.")],
    format: Annotated[str, typer.Option(help="auto, jsonl or text.")] = "auto",
    field: Annotated[
        str | None, typer.Option(help="Field with the text, for JSON lines that are neither geoids nor sentence pairs.")
    ] = None,
    agent: Annotated[str | None, typer.Option(help="Who says it, where a line does not.")] = None,
    session: Annotated[str | None, typer.Option(help="Session, where a line names none.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the source that ids are derived from; the file's own by default.")
    ] = None,
    window: Annotated[int, typer.Option(min=1, max=4096, help="Statements sent and not answered, at most.")] = 256,
    state: Annotated[Path | None, typer.Option(help="File that remembers how far this came.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Send everything, whatever an earlier run did.")] = False,
    patience: Annotated[float, typer.Option(min=0, help="Seconds to wait for a server that is away.")] = 300.0,
    show: Annotated[bool, typer.Option("--show", help="Print contradictions as they are found.")] = False,
    json: Json = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Publish a file of statements. Stopped or killed, the next run goes on where it was and repeats nothing."""
    import anyio

    from kimera_stream.api.cli.ingest_run import IngestOptions, run

    if format not in ("auto", "jsonl", "text"):
        raise usage_error(f"--format: expected auto, jsonl or text, got {format!r}")
    options = IngestOptions(
        file=file,
        format=format,  # type: ignore[arg-type]
        field=field,
        agent=agent,
        session=session,
        name=name,
        window=window,
        state=state,
        restart=restart,
        patience=patience,
        show=show,
        json=json,
        url=url,
        token=token,
    )
    raise typer.Exit(anyio.run(run, options))
