"""``kimera-stream doctor``."""

from typing import Annotated

import typer

from kimera_stream.api.cli.console import print_json
from kimera_stream.api.cli.options import EnvFile, Json


def doctor(
    env_file: EnvFile = ".env",
    json: Json = False,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out what loads torch and the encoder.")] = False,
) -> None:
    """Look for what would keep the server from starting or working well, and say what to do about it."""
    import anyio

    from kimera_stream.api.cli.checkup import examine

    findings = anyio.run(examine, env_file or None, quick)
    for finding in findings:
        if json:
            print_json(finding)
            continue
        mark = {"ok": "ok  ", "warning": "warn", "error": "FAIL"}[finding.state]
        colour = {"ok": "green", "warning": "yellow", "error": "red"}[finding.state]
        typer.secho(mark, fg=colour, nl=False)
        typer.echo(f"  {finding.name:<12} {finding.message}")
        if finding.next_step:
            typer.echo(f"{'':20}-> {finding.next_step}")
    failed = sum(finding.state == "error" for finding in findings)
    if not json:
        typer.echo(f"\n{failed} of {len(findings)} checks failed" if failed else "\neverything needed is there")
    raise typer.Exit(1 if failed else 0)
