"""Fixtures that every test shares, and three detectors that watch every test.

* Blocking calls: a call that blocks (sleep, file, socket, sqlite, lock) made on the event loop from our package raises at once.
* Long callbacks: one callback that keeps the loop busy for ``MAX_CALLBACK_CPU`` seconds of processor time fails the test.
* Orphan tasks: a task that is still alive when an async test has ended fails the test.

``tests/test_detectors.py`` shows each of them fail.
"""

import asyncio
import gc
import inspect
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import structlog
from blockbuster import BlockBuster

MAX_CALLBACK_CPU = 1.0
"""Seconds of processor time, not of wall time: a busy machine does not fail a test."""

MAY_BLOCK = [
    ("structlog/_base.py", {"_process_event", "_proxy_to_logger"}),  # a traceback reads source lines
    ("logging/__init__.py", {"handle"}),
    ("asyncpg/connect_utils.py", {"_parse_connect_dsn_and_args"}),  # looks for password and certificate files
    ("<frozen importlib._bootstrap>", {"_find_and_load"}),  # an import reads files once
]

# The default for terminals draws tracebacks with their source and locals: a second of processor time for one of them.
structlog.configure(
    processors=[
        structlog.stdlib.add_log_level,
        structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
    ]
)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module", autouse=True)
def _set_aside_what_is_there() -> None:
    """What earlier modules have left is not looked through again: a full collection of all that the suite has made takes a
    second of processor time, and where it falls into a callback of a test's event loop, that test would fail for it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def blocking_calls(request: pytest.FixtureRequest) -> Iterator[None]:
    """Blocking calls on the event loop raise ``BlockingError``, unless the test is marked ``allow_blocking``."""
    if request.node.get_closest_marker("anyio") is None or request.node.get_closest_marker("allow_blocking"):
        yield
        return
    detector = BlockBuster(scanned_modules=["kimera_stream"])
    for function in detector.functions.values():
        for file, functions in MAY_BLOCK:
            function.can_block_in(file, functions)
    detector.activate()
    try:
        yield
    finally:
        detector.deactivate()


@pytest.fixture(autouse=True)
def long_callbacks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A callback that holds the event loop for long fails the test."""
    if request.node.get_closest_marker("anyio") is None or request.node.get_closest_marker("allow_blocking"):
        yield
        return
    original = asyncio.Handle._run
    long: list[str] = []

    def timed(handle: asyncio.Handle) -> Any:
        began = time.thread_time()
        try:
            return original(handle)
        finally:
            spent = time.thread_time() - began
            if spent > MAX_CALLBACK_CPU:
                long.append(f"{spent:.2f} s in {handle!r}")

    monkeypatch.setattr(asyncio.Handle, "_run", timed)
    yield
    assert not long, f"callbacks that held the event loop: {long}"


@pytest.fixture(autouse=True)
def _watch_tasks(request: pytest.FixtureRequest) -> None:
    """Async tests get ``orphan_tasks``; the others have no event loop to look at."""
    if request.node.get_closest_marker("anyio") is not None and inspect.iscoroutinefunction(request.function):
        request.getfixturevalue("orphan_tasks")


@pytest.fixture
async def orphan_tasks() -> AsyncIterator[None]:
    """After the test, no task but its own may be alive."""
    before = asyncio.all_tasks()
    yield
    for _ in range(10):  # tasks that are done but for their last callbacks
        left = [task for task in asyncio.all_tasks() - before if not (task.done() or _is_runner(task))]
        if not left:
            return
        await asyncio.sleep(0)
    names = [f"{task.get_name()}: {task.get_coro()!r}" for task in left]
    pytest.fail(f"tasks left behind: {names}")


def _is_runner(task: asyncio.Task[Any]) -> bool:
    """The anyio plugin's own tasks, which step from fixture to test and back."""
    return "TestRunner." in getattr(task.get_coro(), "__qualname__", "")
