"""Text to unit vectors: providers (who encodes) and the batching in front of them (who waits for whom).

``BatchingEmbedder`` implements ``EmbeddingService`` over one ``Provider``; ``make_provider`` chooses it by settings.
"""

from kimera_stream.core.embedding.batching import BatchingEmbedder
from kimera_stream.core.embedding.chain import ProviderChain
from kimera_stream.core.embedding.hashing import HashingProvider
from kimera_stream.core.embedding.minilm import MiniLmProvider
from kimera_stream.core.embedding.provider import NoProvider, Provider
from kimera_stream.core.interfaces import Threads
from kimera_stream.infrastructure.compute import cuda_possible
from kimera_stream.infrastructure.settings import EmbeddingSettings

__all__ = [
    "BatchingEmbedder",
    "HashingProvider",
    "MiniLmProvider",
    "NoProvider",
    "Provider",
    "ProviderChain",
    "make_provider",
]


def make_provider(settings: EmbeddingSettings, threads: Threads) -> Provider:
    """The provider that ``settings.provider`` names; not started yet."""
    if settings.provider == "minilm":
        return _minilm(settings, threads)
    if settings.provider == "hashing":
        return HashingProvider(settings.dimension, threads)
    if settings.provider == "http":
        return _remote(settings)
    return NoProvider(settings.dimension)


def _minilm(settings: EmbeddingSettings, threads: Threads) -> Provider:
    """MiniLM where it runs best, and what stands in for it: the CPU for CUDA, and a service of the same model."""
    first = MiniLmProvider(settings, threads)
    ways: list[tuple[str, Provider]] = [("local", first)]
    if settings.device != "cpu" and cuda_possible():
        ways.append(("cpu", MiniLmProvider(settings.model_copy(update={"device": "cpu"}), threads)))
    if settings.fallback == "http":
        ways.append(("http", _remote(settings, serves=first.model)))
    return first if len(ways) == 1 else ProviderChain(ways)


def _remote(settings: EmbeddingSettings, *, serves: str | None = None) -> Provider:
    # Loaded where it is used: the HTTP client would make every other start slower.
    from kimera_stream.core.embedding.remote import RemoteProvider

    return RemoteProvider(settings, serves=serves)
