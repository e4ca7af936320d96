"""The one place that reaches through anyio to the asyncio task: to abort what shields itself from cancellation."""

import asyncio
from typing import Any

NativeTask = asyncio.Task[Any]


def current_native_task() -> NativeTask:
    """The running asyncio task."""
    task = asyncio.current_task()
    assert task is not None, "called outside a task"
    return task


def abort_task(task: NativeTask) -> None:
    """Cancel a task natively, which no anyio shield holds off. The last resort of a stop whose deadline has passed."""
    task.cancel()


def task_count() -> int:
    """Tasks alive on the running loop."""
    return len(asyncio.all_tasks())
