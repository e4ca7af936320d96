"""How a service begins and ends: factories of every shape turned into what dishka runs, each end under a deadline."""

import inspect
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import anyio
import structlog
from dishka import AsyncContainer, BaseScope, Provider, make_async_container, new_scope
from dishka.exceptions import ExitError

from kimera_stream.infrastructure.container.graph import (
    ContainerError,
    MissingServiceError,
    Registration,
    name_of,
)

log = structlog.get_logger(__name__)


class DishkaScope(BaseScope):
    """Our lifetimes as dishka nests them; their order is the rank of ``graph.RANK``."""

    SINGLETON = new_scope("singleton")
    CONNECTION = new_scope("connection")
    REQUEST = new_scope("request")


SCOPE_BY_RANK: Final = (DishkaScope.SINGLETON, DishkaScope.CONNECTION, DishkaScope.REQUEST)


class ServiceCloseError(ExceptionGroup[Exception]):
    """Some services did not end cleanly; every other one was still ended. One exception per failure, last in, first out."""


@dataclass(frozen=True, slots=True)
class Health:
    """Outcome of one ping. ``latency`` in seconds; ``error`` is one line, None when the service works."""

    ok: bool
    latency: float
    error: str | None = None


class Lives:
    """Begins and ends the services of one container.

    Attributes:
        buildable: Singletons that ``start`` has reached: one built on its side could be built twice.
        close_at: Loop time by which every end of a life has to be over; None for each one's own deadline alone.
    """

    def __init__(self) -> None:
        self.buildable: set[Any] = set()
        self.close_at: float | None = None

    def compile(self, registrations: Mapping[Any, Registration], ranks: Mapping[Any, int]) -> AsyncContainer:
        """The dishka container of checked registrations. Its outermost scope needs no lock: see ``buildable``."""
        provider = Provider()
        for registration in registrations.values():
            scope = SCOPE_BY_RANK[ranks[registration.key]]
            cached = registration.lifetime != "transient"
            if registration.kind == "alias":
                provider.alias(source=registration.source, provides=registration.key, cache=cached)
            elif registration.kind == "scope_value":
                provider.from_context(provides=registration.key, scope=scope)
            else:
                source = self._source(registration)
                provider.provide(source, provides=registration.key, scope=scope, cache=cached)
        return make_async_container(provider, scopes=DishkaScope, lock_factory=None, start_scope=DishkaScope.SINGLETON)

    def _source(self, registration: Registration) -> Any:
        """What dishka calls: takes the parameters by name, gives the service, ends it when sent on."""

        async def create(**arguments: Any) -> Any:
            self._require_start(registration)
            return (await begin(registration, arguments))[0]

        async def live(**arguments: Any) -> AsyncIterator[Any]:
            self._require_start(registration)
            value, generator = await begin(registration, arguments)
            # dishka sends the exception that ended the scope into the generator.
            cause = yield value
            await self._end(registration, value, generator, cause)

        source: Any = live if registration.has_end else create
        # dishka reads the signature, and ours takes anything: it is given the factory's.
        parameters = registration.parameters
        source.__name__ = source.__qualname__ = name_of(registration.source)
        source.__annotations__ = {parameter.name: parameter.key for parameter in parameters}
        source.__signature__ = inspect.Signature(
            [
                inspect.Parameter(parameter.name, inspect.Parameter.KEYWORD_ONLY, annotation=parameter.key)
                for parameter in parameters
            ]
        )
        return source

    def _require_start(self, registration: Registration) -> None:
        if registration.lifetime == "singleton" and registration.key not in self.buildable:
            raise MissingServiceError(f"{registration.name} is not started: call start() first")

    async def _end(self, registration: Registration, value: Any, generator: Any, cause: BaseException | None) -> None:
        """End one life within its deadline, whoever is being cancelled meanwhile; a failure is logged and raised.

        Raises:
            TimeoutError: it took longer than its deadline.
            Exception: whatever the end raised, with a note that names the service.
        """
        seconds = registration.close_deadline
        if self.close_at is not None:
            seconds = max(0.0, min(seconds, self.close_at - anyio.current_time()))
        failure: Exception | None = None
        try:
            with anyio.CancelScope(shield=True, deadline=anyio.current_time() + seconds) as limit:
                await finish(registration, value, generator, cause)
            if limit.cancelled_caught:
                failure = TimeoutError(f"{registration.name} did not end within {seconds:g} s")
        except anyio.get_cancelled_exc_class():
            # Shielded, so it is not ours: something it waited for was cancelled. Raised as it is, it would keep the
            # other services from being ended.
            failure = RuntimeError(f"the end of {registration.name} was cancelled from within")
        except Exception as error:  # noqa: BLE001 - logged and raised below
            failure = error
        if failure is not None:
            failure.add_note(f"while closing {registration.name}")
            log.warning("service_close_failed", service=registration.name, error=type(failure).__name__)
            raise failure


async def begin(registration: Registration, arguments: Mapping[str, Any]) -> tuple[Any, Any]:
    """What the registration provides, and the started generator that is to end it, if its factory is one.

    Raises:
        ContainerError: a generator factory ends without yielding, or the value is no instance of its class.
    """
    if registration.kind != "factory":
        return registration.source, None
    generator: Any = None
    value = registration.source(**arguments)
    if inspect.isasyncgen(value) or inspect.isgenerator(value):
        generator = value
        try:
            value = await anext(generator) if inspect.isasyncgen(generator) else next(generator)
        except (StopAsyncIteration, StopIteration):
            raise ContainerError(f"{registration.name}: its factory ended without yielding a service") from None
    elif inspect.isawaitable(value):
        value = await value
    # Protocols are left to the type checker: checking them here would evaluate the instance's properties.
    key = registration.key
    if inspect.isclass(key) and not getattr(key, "_is_protocol", False) and not isinstance(value, key):
        raise ContainerError(f"{registration.name}: its factory gave a {type(value).__qualname__}")
    return value, generator


async def finish(registration: Registration, value: Any, generator: Any, cause: BaseException | None) -> None:
    """Run a service's explicit cleanup, then the rest of its generator, which receives ``cause`` (what ended the scope,
    None at a normal end) as the value of its ``yield``. The generator is finished even if the cleanup fails.

    Raises:
        ContainerError: the generator yields more than once.
    """
    try:
        if registration.cleanup is not None:
            outcome = registration.cleanup(value)
            if inspect.isawaitable(outcome):
                await outcome
    finally:
        if generator is not None:
            await _exhaust(registration, generator, cause)


async def _exhaust(registration: Registration, generator: Any, cause: BaseException | None) -> None:
    asynchronous = inspect.isasyncgen(generator)
    try:
        if asynchronous:
            await generator.asend(cause)
        else:
            generator.send(cause)
    except (StopAsyncIteration, StopIteration):
        return
    raise ContainerError(f"{registration.name}: its factory yielded more than once")


async def check_health(registration: Registration, value: Any, timeout: float) -> Health:
    """Ping one service. Never raises: whatever goes wrong is the report."""
    begun = time.perf_counter()
    error = None
    try:
        with anyio.fail_after(timeout):
            outcome = registration.ping(value) if registration.ping is not None else value.ping()
            if inspect.isawaitable(outcome):
                await outcome
    except TimeoutError:
        error = f"no answer within {timeout:g} s"
    except Exception as failure:  # noqa: BLE001 - reported
        error = f"{type(failure).__name__}: {failure}".splitlines()[0]
    return Health(error is None, time.perf_counter() - begun, error)


async def close(inner: AsyncContainer, cause: BaseException | None) -> None:
    """End everything that a scope holds, last in, first out.

    Raises:
        ServiceCloseError: some did not end cleanly or in time.
    """
    try:
        await inner.close(cause)
    except ExitError as failures:
        collected = list(_leaves(failures))
        names = ", ".join(
            note.removeprefix("while closing ") for error in collected for note in getattr(error, "__notes__", ())
        )
        raise ServiceCloseError(f"services that did not end cleanly: {names}", collected) from None


def _leaves(group: ExitError) -> Iterator[Exception]:
    """dishka nests the failures of the scopes that it opened on the way."""
    for error in group.exceptions:
        if isinstance(error, ExitError):
            yield from _leaves(error)
        else:
            yield error
