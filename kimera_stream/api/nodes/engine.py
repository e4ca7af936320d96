"""A node that embeds, scores and commits: work from the bus, the slices that it owns."""

from kimera_stream.api.runtime import Drain
from kimera_stream.api.services import Assemble, Parts
from kimera_stream.infrastructure.container import Services
from kimera_stream.infrastructure.settings import Settings
from kimera_stream.infrastructure.tasks import ServiceSpec


def add_engine(services: Services, settings: Settings) -> None:
    """Register what an engine has."""


def engine_specs(parts: Parts, assembled: Assemble) -> list[ServiceSpec]:
    """The services of an engine, besides those that every node has."""
    return []


def engine_drains(parts: Parts) -> list[Drain]:
    """What a stop has to finish."""
    return []
