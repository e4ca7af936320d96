"""A container of built services, and the scopes within it."""

import threading
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeVar, runtime_checkable

import anyio
from dishka import AsyncContainer
from dishka.exceptions import NoContextValueError

from kimera_stream.infrastructure.container.graph import (
    RANK,
    ContainerError,
    LifetimeError,
    MissingServiceError,
    Registration,
    name_of,
    ranks_of,
)
from kimera_stream.infrastructure.container.lives import (
    SCOPE_BY_RANK,
    Health,
    Lives,
    ServiceCloseError,
    check_health,
    close,
)

T = TypeVar("T")
Key = Callable[..., T]
"""An interface, typed as what it constructs: a type checker then accepts Protocols and abstract classes too."""
StartState = Literal["starting", "ready", "failed"]
Progress = Callable[[str, StartState], None]
"""Called on the event loop with a service's name and its state; must not block."""


@runtime_checkable
class _Pinging(Protocol):
    async def ping(self) -> None: ...


class Scope:
    """The services of one connection or one request, open until its ``async with`` ends."""

    def __init__(self, container: "Container", inner: AsyncContainer, rank: int, given: frozenset[Any]) -> None:
        self._container = container
        self._inner = inner
        self._rank = rank
        self._given = given

    async def get(self, key: Key[T]) -> T:
        """The service of this scope, or of one around it.

        Raises:
            MissingServiceError: not registered, or a value that was not given when the scope was opened.
            LifetimeError: it lives in a narrower scope.
        """
        return await self._container._resolve(self._inner, self._rank, self._given, key)  # noqa: SLF001 - one unit

    @asynccontextmanager
    async def request(self, values: Mapping[Any, Any] | None = None) -> AsyncIterator["Scope"]:
        """A request within this connection; ``values`` by interface as declared by ``add_scope_value``."""
        if self._rank == RANK["request"]:
            raise LifetimeError("a request does not open within a request")
        entering = self._container._enter(self._inner, self._rank, RANK["request"], self._given, values)  # noqa: SLF001
        async with entering as scope:
            yield scope


class Container:
    """Built services. Made by ``Services.build``; use as ``async with``, which closes it.

    ``get`` may be called from any thread. Everything else belongs to the event loop that started it.
    """

    def __init__(self, registrations: dict[Any, Registration]) -> None:
        self._registrations = registrations
        self._ranks = ranks_of(registrations)
        self._running: dict[Any, Any] = {}
        self._starting = threading.Lock()
        self._closed = False
        self._lives = Lives()
        self._inner = self._lives.compile(registrations, self._ranks)

    # -- resolution ------------------------------------------------------------------------------------------------

    def get(self, key: Key[T]) -> T:
        """The running singleton.

        Raises:
            MissingServiceError: not registered, or not started.
            LifetimeError: it lives in a scope, or is transient.
        """
        try:
            return self._running[key]  # type: ignore[no-any-return]
        except KeyError:
            raise self._why_not(key) from None

    async def create(self, key: Key[T]) -> T:
        """A new instance of a transient service.

        Raises:
            MissingServiceError: not registered, or a singleton that it needs is not started.
            LifetimeError: not transient, or it needs a scope.
        """
        registration = self._registrations.get(key)
        if registration is not None and registration.lifetime != "transient":
            raise LifetimeError(f"{registration.name} is {registration.lifetime}-scoped, not transient")
        return await self._resolve(self._inner, RANK["singleton"], frozenset(), key)

    @asynccontextmanager
    async def connection(self, values: Mapping[Any, Any] | None = None) -> AsyncIterator[Scope]:
        """The scope of one connection; ``values`` by interface as declared by ``add_scope_value``.

        Raises:
            MissingServiceError: a given value was never declared.
            ServiceCloseError: on leaving, if something did not end cleanly and the block itself raised nothing.
        """
        async with self._enter(self._inner, RANK["singleton"], RANK["connection"], frozenset(), values) as scope:
            yield scope

    @asynccontextmanager
    async def request(self, values: Mapping[Any, Any] | None = None) -> AsyncIterator[Scope]:
        """The scope of one request that belongs to no connection, else like ``connection``."""
        async with self._enter(self._inner, RANK["singleton"], RANK["request"], frozenset(), values) as scope:
            yield scope

    # -- life --------------------------------------------------------------------------------------------------------

    async def start(self, *roots: Any, parallel: int = 4, progress: Progress | None = None) -> None:
        """Create singletons, each as soon as all it needs is there, at most ``parallel`` at a time.

        Args:
            roots: Only these and what they need; none given: all. May be called again for more.
            parallel: Factories that run at once.
            progress: Told of every singleton that starts, is ready or fails.

        Raises:
            MissingServiceError: a root is not registered.
            ContainerError: it is being started already, or closed.
            Exception: the first failure of a factory, with a note that names the service. What was created before stays,
                until ``close``.
        """
        if self._closed:
            raise ContainerError("the container is closed")
        if not self._starting.acquire(blocking=False):
            raise ContainerError("the container is being started already")
        try:
            # What transients and scoped services need is started with them.
            wanted = [
                registration.key
                for registration in self._closure(roots or self._singletons())
                if registration.lifetime == "singleton" and registration.key not in self._running
            ]
            ready = {key: anyio.Event() for key in wanted}
            limiter = anyio.CapacityLimiter(parallel)
            try:
                async with anyio.create_task_group() as group:
                    for key in wanted:
                        group.start_soon(self._start_one, key, ready, limiter, progress, name=f"start:{name_of(key)}")
            except BaseExceptionGroup as failures:
                if len(failures.exceptions) == 1:
                    raise failures.exceptions[0] from None
                raise
        finally:
            self._starting.release()

    async def health(self, *, timeout: float = 2.0) -> dict[str, Health]:
        """Ping every running singleton that can be pinged, all at once, each for at most ``timeout`` seconds."""
        results: dict[str, Health] = {}

        async def check(registration: Registration, value: Any) -> None:
            results[registration.name] = await check_health(registration, value, timeout)

        async with anyio.create_task_group() as group:
            for key, value in list(self._running.items()):
                registration = self._registrations[key]
                if registration.kind != "alias" and (registration.ping is not None or isinstance(value, _Pinging)):
                    group.start_soon(check, registration, value, name=f"ping:{registration.name}")
        return dict(sorted(results.items()))

    async def close(self, *, deadline: float | None = None) -> None:
        """End every singleton, the last created first, all of them even if some fail; a second call does nothing.

        Not cancellable: each end has its own deadline, and with ``deadline`` (seconds) all of them together have one.

        Raises:
            ServiceCloseError: some did not end cleanly or in time.
        """
        if self._closed:
            return
        self._closed = True
        self._lives.close_at = None if deadline is None else anyio.current_time() + deadline
        self._running.clear()
        await close(self._inner, None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.close()
        except ServiceCloseError as failures:
            if error is None:
                raise
            # What ended the block matters more; the failures have been logged one by one.
            error.add_note(str(failures))

    # -- how ---------------------------------------------------------------------------------------------------------

    def _singletons(self) -> list[Any]:
        return [key for key, registration in self._registrations.items() if registration.lifetime == "singleton"]

    def _closure(self, roots: Iterable[Any]) -> list[Registration]:
        """``roots`` and all they need, each after its own needs."""
        ordered: dict[Any, Registration] = {}

        def visit(key: Any) -> None:
            if key in ordered:
                return
            registration = self._registrations.get(key)
            if registration is None:
                raise self._why_not(key)
            for need in registration.needs:
                visit(need)
            ordered[key] = registration

        for root in roots:
            visit(root)
        return list(ordered.values())

    async def _start_one(
        self, key: Any, ready: Mapping[Any, anyio.Event], limiter: anyio.CapacityLimiter, progress: Progress | None
    ) -> None:
        registration = self._registrations[key]
        told = progress if progress is not None and registration.kind == "factory" else None
        # Transitively: a transient that it needs is built along with it, from singletons of its own.
        for need in self._closure(registration.needs):
            if need.key in ready:
                await ready[need.key].wait()
        async with limiter:
            if told is not None:
                told(registration.name, "starting")
            self._lives.buildable.add(key)
            try:
                self._running[key] = await self._inner.get(key)
            except Exception as failure:
                failure.add_note(f"while starting {registration.name}")
                if told is not None:
                    told(registration.name, "failed")
                raise
            if told is not None:
                told(registration.name, "ready")
        ready[key].set()

    async def _resolve(self, inner: AsyncContainer, rank: int, given: frozenset[Any], key: Key[T]) -> T:
        if key in self._running:
            return self._running[key]  # type: ignore[no-any-return]
        registration = self._registrations.get(key)
        if registration is None or self._ranks[key] > rank or registration.lifetime == "singleton":
            raise self._why_not(key)
        try:
            return await inner.get(key)  # type: ignore[no-any-return]
        except NoContextValueError as error:
            missing = [
                need.name for need in self._closure([key]) if need.kind == "scope_value" and need.key not in given
            ]
            raise MissingServiceError(
                f"{registration.name} needs {', '.join(missing)}, which was not given when the scope was opened"
            ) from error

    @asynccontextmanager
    async def _enter(
        self, outer: AsyncContainer, outer_rank: int, rank: int, given: frozenset[Any], values: Mapping[Any, Any] | None
    ) -> AsyncIterator[Scope]:
        fresh = dict(values or {})
        for key in fresh:
            registration = self._registrations.get(key)
            if registration is None or registration.kind != "scope_value":
                raise MissingServiceError(f"{name_of(key)} was not declared by add_scope_value")
            if not outer_rank < self._ranks[key] <= rank:
                raise LifetimeError(
                    f"{registration.name} is a value of a {registration.lifetime}, which is not being opened"
                )
        inner = outer(context=fresh, lock_factory=anyio.Lock, scope=SCOPE_BY_RANK[rank])
        try:
            yield Scope(self, inner, rank, given | frozenset(fresh))
        except BaseException as error:
            try:
                await close(inner, error)
            except ServiceCloseError as failures:
                error.add_note(str(failures))
            raise
        await close(inner, None)

    def _why_not(self, key: Any) -> ContainerError:
        registration = self._registrations.get(key)
        if registration is None:
            return MissingServiceError(f"{name_of(key)} is not registered")
        if registration.lifetime == "transient" and self._ranks[key] == RANK["singleton"]:
            return LifetimeError(f"{registration.name} is transient: use create()")
        if self._ranks[key] > RANK["singleton"]:
            scope = next(name for name, rank in RANK.items() if rank == self._ranks[key])
            return LifetimeError(f"{registration.name} lives in a {scope}: resolve it within container.{scope}()")
        if self._closed:
            return MissingServiceError(f"{registration.name} is gone: the container is closed")
        return MissingServiceError(f"{registration.name} is not started: call start() first")
