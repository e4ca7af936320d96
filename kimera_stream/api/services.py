"""The supervised services: in which order they start, how each begins, and what a stop has to finish."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import anyio
import structlog

from kimera_stream.api.auth import TokenAuthenticator
from kimera_stream.api.auth.revoking import Revoking
from kimera_stream.api.http.door import DoorServices, HttpDoor
from kimera_stream.api.runtime import Drain, Runtime
from kimera_stream.api.stats import StatsService
from kimera_stream.api.websocket import StreamEndpoint
from kimera_stream.core.conversation import ConversationMemory, recall
from kimera_stream.core.embedding import BatchingEmbedder
from kimera_stream.core.index import FlatIndex, SnapshotKeeper
from kimera_stream.core.index.restore import regroup
from kimera_stream.core.vault.errors import VaultSchemaError
from kimera_stream.core.vault.retention import Retention
from kimera_stream.core.vault.vault import SqlVault, unix_ms
from kimera_stream.engines.field import FieldDynamics
from kimera_stream.engines.late import LateReader
from kimera_stream.engines.pipeline import Pipeline
from kimera_stream.engines.sequencer import Sequencer
from kimera_stream.engines.verifier import CrossEncoderVerifier
from kimera_stream.engines.watches import WatchRegistry
from kimera_stream.infrastructure.container import Container, MissingServiceError
from kimera_stream.infrastructure.database import CommitWatch
from kimera_stream.infrastructure.resources import Resources
from kimera_stream.infrastructure.settings import Settings, SettingsError
from kimera_stream.infrastructure.tasks import Backoff, Budget, Service, ServiceSpec, Unrecoverable
from kimera_stream.protocol.errors import LimitExceededError, UnavailableError
from kimera_stream.streaming.hub import Hub

log = structlog.get_logger(__name__)

Run = Callable[[Service], Awaitable[None]]
"""The code of one service."""


class Assemble(Protocol):
    """Builds registered services, and what they need, where they are not built yet."""

    async def __call__(self, *keys: object) -> None: ...


RETENTION_INTERVAL = 60.0
COMMIT_LOOK = 0.5
"""Seconds between two looks at how long a commit has lasted."""
RECALL_AGAIN = 5.0
"""Seconds after which a vault that could not be read is asked again for what was said before the start."""
PATIENT = Backoff(base=0.25, factor=2.0, maximum=5.0, floor=0.1)
START_BUDGET = Budget(restarts=8, window=120.0)


class EncoderMismatchError(Unrecoverable):
    """The stored vectors were made by another encoder; vectors of different models cannot be compared."""


class StoreTooLargeError(Unrecoverable):
    """More geoids are stored than the index may hold, and its policy is to refuse."""


@dataclass(slots=True)
class Parts:
    """What the services work with. ``stream`` is set once the WebSocket door can open."""

    settings: Settings
    container: Container
    runtime: Runtime
    door: HttpDoor
    stream: StreamEndpoint | None = None


def access_service(container: Container) -> Run:
    """Keys and tokens."""

    async def access(service: Service) -> None:
        try:
            await container.get(TokenAuthenticator).load()
        except SettingsError as error:
            raise Unrecoverable(str(error)) from error
        service.ready()
        await anyio.sleep_forever()

    return access


def revoking_service(container: Container) -> Run:
    """Word on tokens that no longer count. What lets anybody in waits for it."""

    async def revoking(service: Service) -> None:
        made = container.get(Revoking)
        await made.load(container.get(Hub).recheck)
        service.ready()
        await made.run()

    return revoking


def vault_service(container: Container) -> Run:
    """The durable log and entities."""

    async def vault(service: Service) -> None:
        service.progress("opening the database")
        try:
            await container.get(SqlVault).start()
        except VaultSchemaError as error:
            raise Unrecoverable(str(error)) from error
        service.ready()
        await tell_of_commits(service, container.get(SqlVault).commits)

    return vault


async def tell_of_commits(service: Service, commits: CommitWatch) -> None:
    """Say of a service, and in the log, when a commit lasts too long and when it is over; until cancelled."""
    while True:
        trouble = commits.trouble
        if trouble != service.detail:
            service.progress(trouble)
            if trouble:
                log.warning("database commit is slow", reason=trouble)
            else:
                log.info("database commits again", refused=commits.refused)
        await anyio.sleep(COMMIT_LOOK)


def encoder_service(container: Container) -> Run:
    """The encoder."""

    async def encoder(service: Service) -> None:
        embedder = container.get(BatchingEmbedder)
        service.progress("loading the model")
        await embedder.start()
        service.ready()
        await embedder.run()

    return encoder


def verifier_service(container: Container) -> Run:
    """The cross-encoder."""

    async def verifier(service: Service) -> None:
        service.progress("loading the model")
        await container.get(CrossEncoderVerifier).start()
        service.ready()
        await anyio.sleep_forever()

    return verifier


def service_specs(
    parts: Parts,
) -> tuple[Parts, list[ServiceSpec], list[Drain]]:
    """The parts, the services of a server, and what a stop drains, in order."""
    container = parts.container
    assembling = anyio.Lock()

    async def assembled(*keys: object) -> None:
        """Build what stands on the log; one service at a time asks the container."""
        async with assembling:
            await container.start(*keys)

    async def hub(service: Service) -> None:
        await assembled(Hub, FieldDynamics, Revoking)
        service.ready()
        await container.get(Hub).run()

    async def index(service: Service) -> None:
        await assembled(SnapshotKeeper)
        await load_index(parts, service)
        service.ready()
        await anyio.sleep_forever()

    async def pipeline(service: Service) -> None:
        await assembled(Pipeline, StreamEndpoint)
        await container.get(WatchRegistry).load()
        made, sequencer = container.get(Pipeline), container.get(Sequencer)
        container.get(SnapshotKeeper).follow(lambda: sequencer.applied)
        parts.stream = container.get(StreamEndpoint)
        parts.door.services = DoorServices(
            knowledge=made,
            vault=container.get(SqlVault),
            hub=container.get(Hub),
            field=container.get(FieldDynamics),
            commands=parts.stream.commands,
            revoker=container.get(Revoking),
        )
        await made.run(service.ready)

    async def sieve(service: Service) -> None:
        service.ready()
        await container.get(FlatIndex).keep_sieve()

    async def snapshots(service: Service) -> None:
        service.ready()
        keeper = container.get(SnapshotKeeper)
        keeper.on_change(lambda: service.progress(keeper.trouble))
        await keeper.run()

    async def field(service: Service) -> None:
        service.ready()
        await container.get(FieldDynamics).run()

    async def stats(service: Service) -> None:
        await assembled(StatsService)
        service.ready()
        await container.get(StatsService).run()

    async def late(service: Service) -> None:
        await assembled(LateReader)
        service.ready()
        await container.get(LateReader).run()

    async def conversation(service: Service) -> None:
        service.ready()
        await restore_conversations(container.get(ConversationMemory), container.get(SqlVault), parts.settings)

    async def retention(service: Service) -> None:
        service.ready()
        while True:
            try:
                await container.get(Retention).run_once()
            except UnavailableError as error:
                log.warning("retention put off", error=str(error))
            await anyio.sleep(RETENTION_INTERVAL)

    specs = [
        ServiceSpec("resources", container.get(Resources).serve),
        ServiceSpec("access", access_service(container), on_failure="escalate"),
        ServiceSpec("vault", vault_service(container), backoff=PATIENT, budget=START_BUDGET),
        ServiceSpec("encoder", encoder_service(container), backoff=PATIENT),
        ServiceSpec("hub", hub, after=("vault",)),
        ServiceSpec("revoking", revoking_service(container), after=("access", "hub"), backoff=PATIENT),
        ServiceSpec("index", index, after=("vault", "encoder", "hub")),
        ServiceSpec("field", field, after=("index",)),
        ServiceSpec("retention", retention, after=("vault",)),
        ServiceSpec("conversation", conversation, after=("vault",), on_end="ignore", backoff=PATIENT),
    ]
    specs.append(ServiceSpec("sieve", sieve, after=("index",)))
    before_work = ["index", "revoking"]
    try:
        container.get(CrossEncoderVerifier)
    except MissingServiceError:
        pass  # switched off, or this build carries no weights: the rules decide
    else:
        specs.append(ServiceSpec("verifier", verifier_service(container), backoff=PATIENT))
        specs.append(ServiceSpec("late", late, after=("pipeline",)))
        before_work.append("verifier")
    specs.append(ServiceSpec("pipeline", pipeline, after=tuple(before_work)))
    specs.append(ServiceSpec("stats", stats, after=("pipeline",)))
    specs.append(ServiceSpec("snapshots", snapshots, after=("pipeline",)))

    async def drain_pipeline(_seconds: float) -> None:
        if parts.door.services is not None:
            await container.get(Pipeline).drain()

    async def drain_hub(seconds: float) -> None:
        if parts.stream is not None:
            await container.get(Hub).shutdown(seconds)

    async def drain_snapshots(seconds: float) -> None:
        if parts.stream is not None:
            await container.get(SnapshotKeeper).finish(seconds)

    streams = parts.door.streams
    drains: list[Drain] = [
        ("lines", streams.drain_lines),  # read no more of them; those that were read are answered by the pipeline
        ("pipeline", drain_pipeline),
        ("streams", streams.drain),
        ("hub", drain_hub),
        ("snapshot", drain_snapshots),
    ]
    return parts, specs, drains


async def check_encoder(container: Container) -> None:
    """Record which model makes the vectors of this database, once for all.

    Raises:
        EncoderMismatchError: the stored vectors are another model's.
    """
    vault, model = container.get(SqlVault), container.get(BatchingEmbedder).model
    vectors = await vault.count_geoids() + len(await vault.watches())  # a watch is compared by its vector too
    if vault.encoder is None or (vault.encoder != model and not vectors):
        await vault.record_encoder(model)
    elif vault.encoder != model:
        raise EncoderMismatchError(
            f"the {vectors} stored vectors were made by {vault.encoder}, and this server encodes with {model}; "
            "set KIMERA_EMBEDDING__PROVIDER back, or use another database (KIMERA_PATHS__DATA_DIR, KIMERA_DATABASE__URL)"
        )


async def restore_conversations(memory: ConversationMemory, vault: SqlVault, settings: Settings) -> None:
    """Fill the memory of conversations from the vault, however long that refuses: the node works without it."""
    performance = settings.performance
    refused = False
    while True:
        try:
            restored = await recall(
                memory,
                vault,
                now=unix_ms(),
                sessions=performance.sessions,
                history=performance.session_history,
                ttl=performance.session_ttl,
            )
        except UnavailableError as error:
            if not refused:
                log.warning("conversations are restored later", reason=error.message)
            refused = True
            await anyio.sleep(RECALL_AGAIN)
        else:
            log.info("conversations restored", sessions=restored)
            return


async def load_index(parts: Parts, service: Service) -> None:
    """Put every stored geoid into the index and the field.

    Raises:
        EncoderMismatchError: the stored vectors are another model's.
        StoreTooLargeError: the index may not hold them all.
    """
    container = parts.container
    await check_encoder(container)
    try:
        await container.get(SnapshotKeeper).restore(service.progress)
    except LimitExceededError as error:
        raise StoreTooLargeError(f"the stored geoids do not fit into the index: {error.message}") from error
    within = parts.settings.scoring.compare_within
    if within != "all":
        service.progress(f"finding out the {within} of each geoid")
        await regroup(container.get(FlatIndex), container.get(SqlVault).scan_groups(within))
