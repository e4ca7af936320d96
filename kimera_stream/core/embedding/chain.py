"""Several providers of one model, one behind the other: CUDA, then the CPU, then a service.

Only providers of the *same* model may stand in for each other: vectors of different models must never meet in one index. A
service says itself what it serves, so its first answer is compared with what the first provider makes of the same text.
"""

from collections.abc import Sequence
from functools import partial

import structlog

from kimera_stream.core.embedding.provider import CountsTokens, Provider, Renews, encode_counted
from kimera_stream.core.interfaces import Matrix
from kimera_stream.infrastructure.failover import Failover, WayNumbers
from kimera_stream.protocol.errors import UnavailableError

log = structlog.get_logger(__name__)

PROBE = "The backup of db-3 finished at 04:10, ten minutes late."
LEAST_COSINE = 0.995
"""Between two providers' vectors of the probe: bfloat16 keeps 0.999, another model does not come near."""


class ProviderChain:
    """``Provider`` over others.

    Args:
        providers: Name and provider, the preferred first.
        threshold, seconds: See ``Failover``.

    Raises:
        ValueError: they are not of one model and dimension.
    """

    def __init__(self, providers: Sequence[tuple[str, Provider]], *, threshold: int = 3, seconds: float = 15.0) -> None:
        models = {(provider.model, provider.dimension) for _, provider in providers}
        if len(models) != 1:
            raise ValueError(
                f"embedding: providers of different models cannot stand in for each other: {sorted(models)}; "
                "their vectors must not meet in one index"
            )
        self._providers = dict(providers)
        self._failover = Failover("embedding", list(self._providers), threshold=threshold, seconds=seconds)
        self._started: set[str] = set()
        self._compared: set[str] = set()
        self._refused: dict[str, str] = {}
        self._probe: Matrix | None = None

    @property
    def model(self) -> str:
        return next(iter(self._providers.values())).model

    @property
    def dimension(self) -> int:
        return next(iter(self._providers.values())).dimension

    @property
    def numbers(self) -> dict[str, WayNumbers]:
        """Health and use of each provider."""
        return self._failover.numbers

    async def start(self) -> None:
        """Start the first; those behind it start when they are needed.

        Raises:
            UnavailableError: none can be started.
        """
        last: UnavailableError | None = None
        for name in self._providers:
            try:
                await self._ready(name)
            except UnavailableError as error:
                log.warning("encoder cannot be started, trying the next", provider=name, error=error.message)
                last = error
                continue
            return
        assert last is not None
        raise last

    async def encode(self, texts: Sequence[str]) -> Matrix:
        """By the first provider that works."""
        return (await self.encode_counted(texts))[0]

    async def encode_counted(self, texts: Sequence[str]) -> tuple[Matrix, list[int]]:
        """By the first provider that works, with its count of tokens, or an approximation where it has none."""
        return await self._failover.run(*(partial(self._by, name, texts) for name in self._providers))

    async def close(self) -> None:
        """Close them all."""
        for provider in self._providers.values():
            await provider.close()
        self._started.clear()

    @property
    def counts_exactly(self) -> bool:
        """Whether every one of them says what it read."""
        return all(
            isinstance(provider, CountsTokens) and provider.counts_exactly for provider in self._providers.values()
        )

    async def _by(self, name: str, texts: Sequence[str]) -> tuple[Matrix, list[int]]:
        await self._ready(name)
        return await encode_counted(self._providers[name], texts)

    async def _ready(self, name: str) -> None:
        if name in self._refused:
            raise UnavailableError(self._refused[name])
        provider = self._providers[name]
        if name not in self._started:
            await provider.start()
            self._started.add(name)
        elif self._failover.returning(name) and isinstance(provider, Renews):
            self._compared.discard(name)
            await provider.renew()
        if name in self._compared:
            return
        row = await provider.encode([PROBE])
        if self._probe is None:
            self._probe = row
        cosine = float((row * self._probe).sum())
        if cosine < LEAST_COSINE:
            self._refused[name] = (
                f"embedding: {name} says that it serves {provider.model}, but its vectors are others "
                f"(cosine {cosine:.3f}); it is not used"
            )
            log.error("encoder refused: another model", provider=name, cosine=round(cosine, 3))
            raise UnavailableError(self._refused[name])
        self._compared.add(name)
