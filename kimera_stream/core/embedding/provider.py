"""What an encoder is, and the one that encodes nothing."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Protocol, runtime_checkable

from kimera_stream.core.interfaces import Matrix
from kimera_stream.infrastructure.failover import WayNumbers
from kimera_stream.protocol.errors import BadRequestError


class Provider(Protocol):
    """One way to encode. Called by one ``BatchingEmbedder`` at a time, never concurrently."""

    @property
    def model(self) -> str:
        """Name and version; a different name means that vectors must not be compared."""

    @property
    def dimension(self) -> int: ...

    async def start(self) -> None:
        """Load what is needed.

        Raises:
            UnavailableError: it cannot work on this machine as configured; the message says what to change.
        """

    async def encode(self, texts: Sequence[str]) -> Matrix:
        """One unit row per text, in order; shape (n, dim), float32.

        Raises:
            UnavailableError: not at present.
        """

    async def close(self) -> None:
        """Free what ``start`` took. May be called without a start, and twice."""


@runtime_checkable
class CountsTokens(Protocol):
    """A provider that says what it read."""

    @property
    def counts_exactly(self) -> bool:
        """Whether each text's count is the encoder's own; else it is approximated, at least in part."""

    async def encode_counted(self, texts: Sequence[str]) -> tuple[Matrix, list[int]]:
        """As ``Provider.encode``, and the tokens of each text that went into its row."""


@runtime_checkable
class TellsHealth(Protocol):
    """A provider that may be left alone for failing, and says so."""

    @property
    def numbers(self) -> dict[str, WayNumbers]:
        """Health and use of each way in which it encodes."""


@runtime_checkable
class Renews(Protocol):
    """A provider that can make anew what it holds on a device."""

    async def renew(self) -> None:
        """Before the first try after it was left alone for failing.

        Raises:
            UnavailableError: as ``Provider.start``.
        """


BYTES_PER_TOKEN = 4
"""About what a token of English takes, where the provider does not say how many there were."""


async def encode_counted(provider: Provider, texts: Sequence[str]) -> tuple[Matrix, list[int]]:
    """Rows, and the tokens of each text: the provider's own count, or an approximation by length."""
    if isinstance(provider, CountsTokens):
        return await provider.encode_counted(texts)
    return await provider.encode(texts), approximate_tokens(texts)


def approximate_tokens(texts: Sequence[str], total: int | None = None) -> list[int]:
    """Tokens of each text by its length. Where their ``total`` is known, it is shared out by length and none of it is lost."""
    sizes = [len(text.encode()) for text in texts]
    if total is None or not sum(sizes):
        return [-(-size // BYTES_PER_TOKEN) for size in sizes]
    ends = [total * end // sum(sizes) for end in accumulate(sizes)]
    return [end - before for before, end in pairwise([0, *ends])]


class NoProvider:
    """For people who bring vectors: encodes nothing, and says so to a statement that comes with text alone."""

    def __init__(self, dimension: int) -> None:
        self._dimension = dimension

    @property
    def model(self) -> str:
        return f"none-{self._dimension}"

    @property
    def dimension(self) -> int:
        return self._dimension

    async def start(self) -> None:
        """Nothing to load."""

    async def encode(self, texts: Sequence[str]) -> Matrix:
        raise BadRequestError(
            f"vector: this server has no encoder (KIMERA_EMBEDDING__PROVIDER=none); expected a vector of "
            f"{self._dimension} numbers beside the text",
            field="vector",
        )

    async def close(self) -> None:
        """Nothing to free."""
