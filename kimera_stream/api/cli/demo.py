"""``kimera-stream demo``."""

import sys
from typing import Annotated

import typer

from kimera_stream.api.cli.console import first_error
from kimera_stream.api.cli.options import Token


def demo(
    pace: Annotated[
        float | None, typer.Option(min=0, help="Seconds between statements; by default the feed takes two minutes.")
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Send the feed as fast as the server takes it.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many statements.")] = None,
    exit: Annotated[
        bool, typer.Option("--exit", help="End after the score instead of keeping the dashboard up.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print contradictions only, not every statement.")] = False,
    url: Annotated[str | None, typer.Option("--url", help="Use this running server instead of starting one.")] = None,
    token: Token = None,
) -> None:
    """Open a labelled feed to a real server, watch the contradictions come out, see the score at the end."""
    import anyio

    from kimera_stream.api.demo.runner import DemoOptions, run_until_told

    options = DemoOptions(
        url=url,
        token=token,
        pace=0 if fast else pace,
        limit=limit,
        stay=not exit and url is None and sys.stdout.isatty(),
        statements=not quiet,
    )
    try:
        finished = anyio.run(run_until_told, options)
    except BaseExceptionGroup as errors:
        raise first_error(errors) from None
    if not finished:
        typer.echo("stopped", err=True)
