"""``kimera-stream dead-letters``: list, retry, drop. They work on the database, with or without a server on it."""

from typing import TYPE_CHECKING, Annotated

import typer

from kimera_stream.api.cli.console import clean, print_json
from kimera_stream.api.cli.db import DatabaseUrl, open_database, run_job
from kimera_stream.api.cli.options import EnvFile, Json

if TYPE_CHECKING:
    from kimera_stream.core.kept import DeadLetter
    from kimera_stream.infrastructure.settings import DatabaseSettings

app = typer.Typer(
    help="Look after accepted work that could not be done and was set aside. A server may be running meanwhile.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Ids = Annotated[list[int] | None, typer.Argument(help="Numbers of dead letters, as `list` shows them.")]
All = Annotated[bool, typer.Option("--all", help="All of them.")]
MOST = 1_000_000


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option(min=1, help="Show at most so many, the oldest first.")] = 100,
    database: DatabaseUrl = None,
    env_file: EnvFile = ".env",
    json: Json = False,
) -> None:
    """Show what was set aside, when and why. With --json also what was to be published."""
    from kimera_stream.core.vault import tools

    url, settings = open_database(database, env_file)
    found = run_job(lambda _: tools.dead_letters(url, limit=limit, settings=settings))
    if json:
        print_json([_shown(each) for each in found])
        return
    for each in found:
        tried = "1 attempt" if each.request.attempts == 1 else f"{each.request.attempts} attempts"
        typer.echo(
            f"{each.id:>6}  {_time(each.failed_at)}  {each.code}  {tried}  {clean(each.request.principal)}  "
            f"key {clean(each.request.key or '-')}  {clean(each.message)}"
        )
    if not found:
        typer.echo("there are no dead letters")


@app.command("retry")
def retry(
    ids: Ids = None,
    all_: All = False,
    database: DatabaseUrl = None,
    env_file: EnvFile = ".env",
) -> None:
    """Have dead letters tried again, from their first attempt on.

    They go back to the accepted work that is kept: a running server takes it up within seconds (KIMERA_PERFORMANCE__RETRY_POLL),
    else the next start does. What was published under the same key meanwhile is not published twice.
    """
    from kimera_stream.core.vault import tools

    url, settings = open_database(database, env_file)
    chosen = _chosen(ids, all_, url, settings)
    done = run_job(lambda _: tools.retry_dead_letters(url, chosen, settings=settings))
    _tell(chosen, done, "to be tried again")


@app.command("drop")
def drop(
    ids: Ids = None,
    all_: All = False,
    database: DatabaseUrl = None,
    env_file: EnvFile = ".env",
) -> None:
    """Forget dead letters for good."""
    from kimera_stream.core.vault import tools

    url, settings = open_database(database, env_file)
    chosen = _chosen(ids, all_, url, settings)
    done = run_job(lambda _: tools.drop_dead_letters(url, chosen, settings=settings))
    _tell(chosen, done, "dropped")


def _chosen(ids: list[int] | None, all_: bool, url: str, settings: "DatabaseSettings") -> list[int]:
    from kimera_stream.core.vault import tools

    if bool(ids) == all_:
        raise typer.BadParameter("name dead letters by their numbers, or give --all")
    if ids:
        return ids
    return [each.id for each in run_job(lambda _: tools.dead_letters(url, limit=MOST, settings=settings))]


def _tell(chosen: list[int], done: list[int], what: str) -> None:
    """Say what was done; exit code 1 if some were not there."""
    missing = sorted(set(chosen) - set(done))
    typer.echo(f"{len(done)} dead letter{'' if len(done) == 1 else 's'} {what}")
    if missing:
        typer.echo(f"there is no dead letter {', '.join(map(str, missing))}", err=True)
        raise typer.Exit(1)


def _shown(letter: "DeadLetter") -> dict[str, object]:
    import msgspec

    request = letter.request
    try:
        body = msgspec.json.decode(request.body)
    except msgspec.DecodeError:
        body = None
    return {
        "id": letter.id,
        "principal": request.principal,
        "session_id": request.session_id,
        "key": request.key,
        "priority": request.priority,
        "merge": request.merge,
        "must_exist": request.must_exist,
        "attempts": request.attempts,
        "accepted_at": request.accepted_at,
        "failed_at": letter.failed_at,
        "code": letter.code,
        "message": letter.message,
        "geoid": body,
    }


def _time(ms: int) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
