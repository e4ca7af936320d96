"""Text to unit vectors: providers (who encodes) and the batching in front of them (who waits for whom).

``BatchingEmbedder`` implements ``EmbeddingService`` over one ``Provider``; ``make_provider`` chooses it by settings.
"""

from kimera_stream.core.embedding.batching import BatchingEmbedder
from kimera_stream.core.embedding.hashing import HashingProvider
from kimera_stream.core.embedding.minilm import MiniLmProvider
from kimera_stream.core.embedding.provider import NoProvider, Provider
from kimera_stream.core.embedding.remote import RemoteProvider
from kimera_stream.core.interfaces import Threads
from kimera_stream.infrastructure.settings import EmbeddingSettings

__all__ = [
    "BatchingEmbedder",
    "HashingProvider",
    "MiniLmProvider",
    "NoProvider",
    "Provider",
    "RemoteProvider",
    "make_provider",
]


def make_provider(settings: EmbeddingSettings, threads: Threads) -> Provider:
    """The provider that ``settings.provider`` names; not started yet."""
    if settings.provider == "minilm":
        return MiniLmProvider(settings, threads)
    if settings.provider == "hashing":
        return HashingProvider(settings.dimension, threads)
    if settings.provider == "http":
        return RemoteProvider(settings)
    return NoProvider(settings.dimension)
