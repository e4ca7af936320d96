"""Options that several commands share."""

from typing import Annotated

import typer

DEFAULT_URL = "http://127.0.0.1:8765"

Url = Annotated[str, typer.Option("--url", envvar="KIMERA_CLIENT_URL", help="Address of the server.")]
Token = Annotated[
    str | None,
    typer.Option("--token", envvar="KIMERA_CLIENT_TOKEN", show_envvar=True, help="Bearer token, where one is needed."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")]
EnvFile = Annotated[str, typer.Option("--env-file", help="File of settings read besides the environment.")]
