"""``kimera-stream config``: check, show, new-key, docs."""

import os
from pathlib import Path
from typing import Annotated

import typer

from kimera_stream.api.cli.console import print_json, usage_error
from kimera_stream.api.cli.options import EnvFile, Json

app = typer.Typer(help="Check and show the settings, make API keys.", no_args_is_help=True, rich_markup_mode=None)


@app.command("check")
def check(env_file: EnvFile = ".env", json: Json = False) -> None:
    """Check the settings of this environment; exit code 1 if the server would refuse to start."""
    from kimera_stream.infrastructure.settings import config_check

    problems = config_check(env_file=env_file or None)
    fatal = sum(problem.fatal for problem in problems)
    for problem in problems:
        if json:
            print_json(
                {
                    "variable": problem.variable,
                    "message": problem.message,
                    "next_step": problem.next_step,
                    "fatal": problem.fatal,
                }
            )
        else:
            typer.echo(f"{'error' if problem.fatal else 'advice'}: {problem.line}")
    if not problems and not json:
        typer.echo("the settings are fit to start with")
    raise typer.Exit(1 if fatal else 0)


@app.command("show")
def show(env_file: EnvFile = ".env") -> None:
    """Print every setting with its value and where it comes from; secrets are masked."""
    from kimera_stream.infrastructure.settings import config_show

    for line in config_show(env_file=env_file or None):
        typer.echo(line)


@app.command("docs")
def docs() -> None:
    """Print the reference of all settings (Markdown)."""
    from kimera_stream.infrastructure.settings_docs import render

    typer.echo(render(), nl=False)


@app.command("new-key")
def new_key(
    principal: Annotated[str, typer.Argument(help="Whom the key is for.")],
    role: Annotated[
        list[str], typer.Option("--role", "-r", help="publish, subscribe, resolve or admin; repeatable.")
    ] = [],  # noqa: B006 - typer copies it
    days: Annotated[int | None, typer.Option("--days", min=1, help="Days until it expires.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", help="Keys file to add it to (KIMERA_SECURITY__API_KEYS_FILE).")
    ] = None,
) -> None:
    """Make an API key. It is shown once; the file keeps only its hash."""
    from kimera_stream.api.cli.keys import make_key
    from kimera_stream.core.access import ALL_ROLES, Role

    unknown = sorted(set(role) - ALL_ROLES)
    if unknown:
        raise usage_error(f"--role: expected publish, subscribe, resolve or admin, got {unknown[0]!r}")
    roles: list[Role] = [known for known in ALL_ROLES if known in role] or ["publish", "subscribe"]
    key, where = make_key(principal, roles, days=days, file=file)
    typer.echo(key)
    typer.echo(f"added to {where}; this is the only time the key is shown", err=True)
    if "KIMERA_SECURITY__API_KEYS_FILE" not in os.environ:
        typer.echo(f"have the server read it: KIMERA_SECURITY__API_KEYS_FILE={where}", err=True)
