"""What the kernel's benchmarks share."""

from collections.abc import Callable
from typing import Any

from kimera_stream.protocol.objects import Geoid


class InlineThreads:
    """Runs blocking work where it is called: a benchmark has nothing else to do."""

    async def run(self, purpose: str, fn: Callable[..., Any], *args: Any) -> Any:
        return fn(*args)


def plain_geoid(id: str, text: str | None = None) -> Geoid:
    """A geoid with nothing but an id, and perhaps a text."""
    return Geoid(
        id=id, version=1, text=text, semantic_state={}, symbolic_state={}, metadata={}, entropy=0.0, created_at=0,
        updated_at=0, offset=1,
    )  # fmt: skip
