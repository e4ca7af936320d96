"""The registrations of an application, collected by its composition root."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from kimera_stream.infrastructure.container.graph import (
    ContainerError,
    Lifetime,
    MissingServiceError,
    Registration,
    check_graph,
    name_of,
    parameters_of,
)
from kimera_stream.infrastructure.container.running import Container

T = TypeVar("T")
Key = Callable[..., T]


class Services:
    """Registrations, collected before anything is built. Thread-safe; a container keeps the state it was built from."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._registrations: dict[Any, Registration] = {}

    def add(
        self,
        key: Key[T],
        *,
        instance: T | None = None,
        factory: Callable[..., Any] | None = None,
        lifetime: Lifetime = "singleton",
        also: Sequence[Any] = (),
        cleanup: Callable[[Any], Any] | None = None,
        ping: Callable[[Any], Any] | None = None,
        close_deadline: float = 5.0,
    ) -> None:
        """Register the interface ``key``.

        Args:
            key: Class, Protocol or NewType under which the service is known.
            instance: The service itself.
            factory: Class, function, coroutine function or (async) generator function that makes it. Its parameters are
                injected by annotation; one with a default is left out where its interface is not registered. What a
                generator does after its ``yield`` is the end of the service's life.
            lifetime: How long an instance lives, see ``Lifetime``.
            also: Further interfaces that the same instance answers to.
            cleanup: Called with the instance at the end of its life, before the rest of a generator; sync or async.
            ping: Called with the instance by ``Container.health``; by default its own ``ping()``, where it has one.
            close_deadline: Seconds the end of its life may take before it is cancelled and reported.

        Raises:
            ContainerError: registered already, or not exactly one of instance and factory is given.
        """
        registrations = self._make(
            key,
            instance=instance,
            factory=factory,
            lifetime=lifetime,
            also=also,
            cleanup=cleanup,
            ping=ping,
            close_deadline=close_deadline,
        )
        with self._lock:
            for registration in registrations:
                if registration.key in self._registrations:
                    raise ContainerError(f"{registration.name} is registered already; replace it with override()")
            self._registrations.update((registration.key, registration) for registration in registrations)

    def add_scope_value(self, key: Key[T], *, lifetime: Literal["connection", "request"]) -> None:
        """Declare a value that is given when such a scope is opened, as in ``container.connection({key: value})``.

        Raises:
            ContainerError: registered already.
        """
        with self._lock:
            if key in self._registrations:
                raise ContainerError(f"{name_of(key)} is registered already; replace it with override()")
            self._registrations[key] = Registration(key, "scope_value", None, lifetime)

    @contextmanager
    def override(
        self,
        key: Key[T],
        *,
        instance: T | None = None,
        factory: Callable[..., Any] | None = None,
        lifetime: Lifetime = "singleton",
        cleanup: Callable[[Any], Any] | None = None,
        ping: Callable[[Any], Any] | None = None,
    ) -> Iterator[None]:
        """Within the block, containers are built with this in place of what is registered for ``key``. For tests.

        Raises:
            MissingServiceError: nothing is registered for ``key``: the test would replace what nobody uses.
        """
        (replacement,) = self._make(
            key, instance=instance, factory=factory, lifetime=lifetime, cleanup=cleanup, ping=ping
        )
        with self._lock:
            original = self._registrations.get(key)
            if original is None:
                raise MissingServiceError(f"{name_of(key)} is not registered, so it cannot be overridden")
            self._registrations[key] = replacement
        try:
            yield
        finally:
            with self._lock:
                self._registrations[key] = original

    def build(self, overrides: Mapping[Any, Any] | None = None) -> Container:
        """A container of everything registered; nothing is created before its ``start``.

        Args:
            overrides: Instances by interface, in place of what is registered (build-time form of ``override``).

        Raises:
            MissingServiceError: a dependency or an overridden interface is not registered.
            DependencyCycleError: services depend on each other in a circle.
            LifetimeError: a service would outlive what it depends on.
        """
        with self._lock:
            registrations = dict(self._registrations)
        for key, instance in (overrides or {}).items():
            if key not in registrations:
                raise MissingServiceError(f"{name_of(key)} is not registered, so it cannot be overridden")
            registrations[key] = Registration(key, "instance", instance, "singleton")
        return Container(check_graph(registrations))

    @staticmethod
    def _make(
        key: Any,
        *,
        instance: Any,
        factory: Callable[..., Any] | None,
        lifetime: Lifetime,
        also: Sequence[Any] = (),
        cleanup: Callable[[Any], Any] | None = None,
        ping: Callable[[Any], Any] | None = None,
        close_deadline: float = 5.0,
    ) -> list[Registration]:
        if (instance is None) == (factory is None):
            raise ContainerError(f"{name_of(key)}: give either an instance or a factory")
        if factory is not None:
            parameters = parameters_of(key, factory)
            made = Registration(key, "factory", factory, lifetime, parameters, cleanup, ping, close_deadline)
        elif lifetime != "singleton":
            raise ContainerError(f"{name_of(key)}: an instance is a singleton; give a factory for {lifetime} lifetime")
        else:
            made = Registration(key, "instance", instance, lifetime, (), cleanup, ping, close_deadline)
        return [made, *(Registration(other, "alias", key, lifetime) for other in also)]
