"""What is let go without the collector of garbage."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Begins with nothing to collect and has nothing collected: what names itself stays and can be counted."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
