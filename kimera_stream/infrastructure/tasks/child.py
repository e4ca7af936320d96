"""Children of a group that is cancelled as a matter of course: the tasks of a connection, which comes and goes."""

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.abc


def begin_child(group: anyio.abc.TaskGroup, run: Callable[..., Awaitable[object]], /, *args: object, name: str) -> None:
    """Start ``run(*args)`` as a child of ``group``, one that ends without an error where the group is cancelled.

    A task that ends by an error leaves a cycle behind: the group looks at the error in a frame that the error's traceback names.
    All that the task had in hand would stay until the collector of garbage comes by, hours later on a quiet server.
    """
    group.start_soon(_run, group.cancel_scope, run, args, name=name)


async def _run(scope: anyio.CancelScope, run: Callable[..., Awaitable[object]], args: tuple[Any, ...]) -> None:
    try:
        await run(*args)
    except anyio.get_cancelled_exc_class():
        if not scope.cancel_called:
            raise
