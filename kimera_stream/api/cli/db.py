"""``kimera-stream db``: migrate, check, usage, export, import, backup, new-epoch."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from kimera_stream.api.cli.console import err, print_json
from kimera_stream.api.cli.options import EnvFile, Json

if TYPE_CHECKING:
    from kimera_stream.core.vault.tools import Progress
    from kimera_stream.infrastructure.settings import DatabaseSettings

T = TypeVar("T")
app = typer.Typer(
    help="Look after the database. A server may be running meanwhile, except for new-epoch.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
DatabaseUrl = Annotated[
    str | None, typer.Option("--database", help="Database URL; by default the one of the settings.")
]


@app.command("migrate")
def migrate(
    revision: Annotated[str, typer.Argument(help="Revision to go to, up or down.")] = "head",
    database: DatabaseUrl = None,
    env_file: EnvFile = ".env",
) -> None:
    """Bring the database to a revision of the schema, creating it where there is none."""
    from kimera_stream.core.vault import tools

    url, settings = open_database(database, env_file)
    now = run_job(lambda _: tools.migrate(url, revision, settings=settings))
    typer.echo(f"the database is at revision {now}")


@app.command("check")
def check(database: DatabaseUrl = None, env_file: EnvFile = ".env", json: Json = False) -> None:
    """Verify checksums, offsets, indexes and the agreement of entities and log; exit code 1 if anything is wrong."""
    from kimera_stream.core.vault import tools

    url, settings = open_database(database, env_file)
    report = run_job(lambda progress: tools.check(url, progress, settings=settings))
    if json:
        print_json(report)
    else:
        counts = ", ".join(f"{count:,} {name}" for name, count in report.counts.items() if count)
        typer.echo(f"epoch {report.epoch}, head {report.head:,}, {report.entries:,} log entries verified ({counts})")
        typer.echo(f"{report.first_results:,} first results of keyed requests verified")
        for problem in report.problems:
            typer.echo(f"problem: {problem}")
        if report.total_problems > len(report.problems):
            typer.echo(f"... and {report.total_problems - len(report.problems):,} more problems")
        typer.echo(
            "nothing is wrong" if report.ok else "restore a backup, or `db export` what is left and `db import` it"
        )
    raise typer.Exit(0 if report.ok else 1)


@app.command("usage")
def usage(
    days: Annotated[int, typer.Option(min=1, help="Days to show, today (UTC) included.")] = 30,
    database: DatabaseUrl = None,
    env_file: EnvFile = ".env",
    json: Json = False,
) -> None:
    """Statements, bytes of text and tokens that each principal published per day.

    Tokens are those that the encoder read: word pieces of MiniLM, words of the hashing encoder; for a service behind HTTP they
    are approximated as a quarter of the bytes. A statement that came with its own vector has none.
    """
    import time
    from datetime import date, timedelta

    from kimera_stream.core.vault import tools

    url, settings = open_database(database, env_file)
    first = int(time.time() // 86_400) - days + 1
    rows = [
        {
            "principal": row.principal,
            "day": (date(1970, 1, 1) + timedelta(days=row.day)).isoformat(),
            "statements": row.statements,
            "text_bytes": row.text_bytes,
            "tokens": row.tokens,
            "bytes": row.bytes,
        }
        for row in run_job(lambda _: tools.usage(url, since_day=first, settings=settings))
    ]
    if json:
        print_json(rows)
        return
    for row in rows:
        typer.echo(
            f"{row['day']}  {row['statements']:>12,} statements  {row['bytes']:>14,} bytes  {row['text_bytes']:>14,} of text  "
            f"{row['tokens']:>14,} tokens  {row['principal']}"
        )
    if not rows:
        typer.echo("nothing was published in that time")


@app.command("export")
def export(
    file: Annotated[Path, typer.Argument(help="File to write (gzipped JSON lines).")],
    database: DatabaseUrl = None,
    env_file: EnvFile = ".env",
) -> None:
    """Write everything to a file that `db import` reads, on this database or another kind."""
    from kimera_stream.core.vault import tools

    url, settings = open_database(database, env_file)
    rows = run_job(lambda progress: tools.export(url, file, progress, settings=settings))
    typer.echo(f"{rows:,} rows written to {file}")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="File that `db export` wrote.")],
    database: DatabaseUrl = None,
    env_file: EnvFile = ".env",
) -> None:
    """Read an export into an empty database; its log gets a new epoch."""
    from kimera_stream.core.vault import tools

    url, settings = open_database(database, env_file)
    rows = run_job(lambda progress: tools.import_(file, url, progress, settings=settings))
    typer.echo(f"{rows:,} rows read from {file}")


@app.command("backup")
def backup(
    file: Annotated[Path, typer.Argument(help="Database file to write.")],
    database: DatabaseUrl = None,
    env_file: EnvFile = ".env",
) -> None:
    """Copy a SQLite database while it is in use; the copy has a new epoch. For PostgreSQL: pg_dump, then `db new-epoch`."""
    from kimera_stream.core.vault import tools

    url, settings = open_database(database, env_file)
    run_job(lambda progress: tools.backup(url, file, progress, settings=settings))
    typer.echo(f"copied to {file}; serve it with KIMERA_DATABASE__URL=sqlite+aiosqlite:///{file.absolute()}")


@app.command("new-epoch")
def new_epoch(database: DatabaseUrl = None, env_file: EnvFile = ".env") -> None:
    """Give a database that was restored from pg_dump, or copied as files, an epoch of its own. No server may have it open.

    Its log and the one that it was copied from part ways from here. With a new epoch clients that come back are told that their
    positions mean nothing here, and load anew; with the old one they would miss events without a word.
    """
    from kimera_stream.core.vault import tools

    url, settings = open_database(database, env_file)
    before, now = run_job(lambda _: tools.new_epoch(url, settings=settings))
    typer.echo(f"the epoch of the log is now {now}; it was {before}")


def open_database(given: str | None, env_file: str) -> "tuple[str, DatabaseSettings]":
    """URL and settings of the database that a command is to work on."""
    from kimera_stream.infrastructure.settings import database_url, load_settings

    settings = load_settings(env_file=env_file or None, check=False)
    return given or database_url(settings), settings.database


def run_job(job: "Callable[[Progress], Awaitable[T]]") -> T:
    """Run ``job`` with a progress bar on a terminal."""
    import anyio
    from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    console = err()
    tasks: dict[str, TaskID] = {}
    with Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bar:

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage)
            bar.update(tasks[stage], completed=done, total=total)

        async def call() -> T:
            return await job(progress)

        return anyio.run(call)
