"""Entry point of ``kimera-stream``: the commands by name, and the one place where their errors become a line."""

import os
import sys

import typer

from kimera_stream.api.cli import config, db, dead_letters, demo, doctor, ingest, publish, query, serve, tail

app = typer.Typer(
    name="kimera-stream",
    help="A live contradiction detector for streams of statements.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("serve")(serve.serve)
app.command("publish")(publish.publish)
app.command("ingest")(ingest.ingest)
app.command("tail")(tail.tail)
app.command("resolve")(publish.resolve)
app.command("search")(query.search)
app.command("score")(query.score)
app.command("demo")(demo.demo)
app.add_typer(config.app, name="config")
app.add_typer(db.app, name="db")
app.add_typer(dead_letters.app, name="dead-letters")
app.command("doctor")(doctor.doctor)


@app.command("version")
def version() -> None:
    """Print the version."""
    from kimera_stream import __version__

    typer.echo(f"kimera-stream {__version__}")


def main() -> None:
    """Run the command line; ends the process with 0, 1 (it failed), 2 (wrong usage) or 130 (interrupted)."""
    from kimera_stream.protocol.errors import KimeraError

    try:
        app()
    except KimeraError as exc:
        from kimera_stream.api.cli.console import explain

        typer.echo(explain(exc), err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output (`| head`) has gone. Nothing more can be written, not even at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


if __name__ == "__main__":
    main()
