"""The container: interfaces in, wired services out.

A thin face over dishka, which compiles the resolution, keeps each scope's instances and ends them last in, first out.
Added here: checks whose messages name the path, parallel start with progress, a deadline for every end of life, health,
and resolution of running singletons by one dictionary lookup. Why dishka: docs/adr/0001-container.md.

The composition root writes::

    services = Services()
    services.add(Settings, instance=settings)
    services.add(Threads, factory=WorkerThreads)  # a class: its constructor's annotations are injected
    services.add(VaultService, factory=open_vault, also=[LogReader])  # an async generator: after its yield comes the end
    services.add(Session, factory=Session, lifetime="connection")
    services.add_scope_value(Principal, lifetime="connection")  # brought by whoever opens the scope

    async with services.build() as container:
        await container.start(progress=show)
        vault = container.get(VaultService)
        async with container.connection({Principal: principal}) as connection:
            session = await connection.get(Session)

and nothing else resolves: services receive what they need as constructor parameters. A factory must not hold a task
group or a cancel scope open across its ``yield`` (different tasks may start and end it); tasks belong to the supervisor.

``graph`` checks what is registered, ``services`` collects it, ``lives`` begins and ends services, ``running`` resolves.
"""

from kimera_stream.infrastructure.container.graph import (
    ContainerError,
    DependencyCycleError,
    Lifetime,
    LifetimeError,
    MissingServiceError,
)
from kimera_stream.infrastructure.container.lives import Health, ServiceCloseError
from kimera_stream.infrastructure.container.running import Container, Progress, Scope, StartState
from kimera_stream.infrastructure.container.services import Services

__all__ = [
    "Container",
    "ContainerError",
    "DependencyCycleError",
    "Health",
    "Lifetime",
    "LifetimeError",
    "MissingServiceError",
    "Progress",
    "Scope",
    "ServiceCloseError",
    "Services",
    "StartState",
]
