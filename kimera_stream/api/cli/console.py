"""Writing to people: errors with a next step, JSON lines, text that cannot play tricks on a terminal."""

import sys
from typing import TYPE_CHECKING, Any

import typer

from kimera_stream.protocol.errors import ForbiddenError, KimeraError, OperationalError, UnauthorizedError

if TYPE_CHECKING:
    from rich.console import Console


def explain(error: KimeraError) -> str:
    """One line that says what went wrong and what to do next."""
    text = " ".join(str(error).split())
    step = ""
    if isinstance(error, UnauthorizedError):
        step = "give a token with --token or KIMERA_CLIENT_TOKEN"
    elif isinstance(error, ForbiddenError):
        step = "use a token that has the role for this"
    elif text.startswith("cannot reach"):
        step = "start the server with `kimera-stream serve`, or name its address with --url"
    elif isinstance(error, OperationalError) and error.temporary:
        step = "try again" + (f" in {error.retry_after:g} s" if error.retry_after else " in a moment")
    if step and step not in text:
        text = f"{text.rstrip('.')}; {step}"
    return f"kimera-stream: {text}"


def usage_error(message: str) -> typer.BadParameter:
    """What to raise for an argument that cannot be used (exit code 2)."""
    return typer.BadParameter(message)


def out() -> "Console":
    """Standard output with colour on a terminal; plain text keeps its own line breaks elsewhere."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=not sys.stdout.isatty(), markup=False, emoji=False)


def err() -> "Console":
    """Standard error, for progress and notes."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty(), markup=False, emoji=False)


def print_json(value: Any) -> None:
    """One JSON object on one line of standard output, flushed: somebody may be reading it live."""
    import msgspec

    typer.echo(msgspec.json.encode(value))
    sys.stdout.flush()


def clean(text: str) -> str:
    """``text`` without control characters, which could move the cursor or colour what follows."""
    return "".join(
        char if char.isprintable() else " " if char.isspace() else "\N{REPLACEMENT CHARACTER}" for char in text
    )


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that a task group's group of errors is about: the first one in it."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
