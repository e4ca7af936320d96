"""``kimera-stream serve``."""

import os
from typing import Annotated

import typer

from kimera_stream.api.cli.options import EnvFile


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on (KIMERA_API__HOST).")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port; 0 picks a free one (KIMERA_API__PORT).")
    ] = None,
    data_dir: Annotated[str | None, typer.Option(help="Where the data live (KIMERA_PATHS__DATA_DIR).")] = None,
    log_level: Annotated[
        str | None, typer.Option(help="debug, info, warning or error (KIMERA_TELEMETRY__LOG_LEVEL).")
    ] = None,
    env_file: EnvFile = ".env",
) -> None:
    """Run the server. Prints `listening on http://HOST:PORT` when it is ready; Ctrl-C or SIGTERM stops it cleanly."""
    from kimera_stream.infrastructure.settings import load_settings

    given = {
        "KIMERA_API__HOST": host,
        "KIMERA_API__PORT": None if port is None else str(port),
        "KIMERA_PATHS__DATA_DIR": data_dir,
        "KIMERA_TELEMETRY__LOG_LEVEL": log_level,
    }
    environ = {**os.environ, **{name: value for name, value in given.items() if value is not None}}
    settings = load_settings(environ, env_file or None)
    loads = "" if settings.role == "edge" else "; loading the encoder takes a few seconds"
    typer.echo(f"kimera-stream: starting{loads}", err=True)

    from kimera_stream.api.server import serve as run

    raise typer.Exit(run(settings))
