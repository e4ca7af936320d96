"""What is registered with the container, and the checks on it before anything is built.

A registration says how one interface comes to be: an instance, a factory whose parameters are other interfaces (by
annotation), another name for a registered interface, or a value that whoever opens a scope brings along. ``check_graph``
finds missing dependencies, cycles and lifetimes that cannot work, each named with the path that leads there.
"""

import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from kimera_stream.protocol.errors import KimeraError

Lifetime = Literal["singleton", "connection", "request", "transient"]
"""singleton: one per container. connection, request: one per scope. transient: a new one at each resolution."""

RANK: Final[Mapping[Lifetime, int]] = {"singleton": 0, "connection": 1, "request": 2}
"""How short each lifetime is; a service may only depend on one that lives at least as long. Transients take the
shortest of what they need."""

Kind = Literal["instance", "factory", "alias", "scope_value"]


class ContainerError(KimeraError):
    """The services as registered cannot be built. A mistake in the composition root, never a condition of operation."""


class MissingServiceError(ContainerError):
    """A dependency, or what was asked for, is not registered."""


class DependencyCycleError(ContainerError):
    """Services depend on each other in a circle; the message names it as ``A -> B -> A``."""


class LifetimeError(ContainerError):
    """A service would outlive what it depends on, or is asked for where it does not live."""


def name_of(key: object) -> str:
    """Name of an interface as people write it."""
    return getattr(key, "__qualname__", None) or str(key)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a factory: which interface it wants, and whether the factory can do without."""

    name: str
    key: Any
    optional: bool


@dataclass(frozen=True, slots=True)
class Registration:
    """How one interface comes to be.

    Attributes:
        key: The interface (class, Protocol, NewType).
        kind: Which of the sources below is used.
        source: The instance, the factory, or the key that an alias stands for; None for values of a scope.
        lifetime: How long what is built lives.
        parameters: What the factory needs.
        cleanup: Called with the instance at the end of its life; may be a coroutine function.
        ping: Called with the instance for health; None takes the instance's own ``ping``, where it has one.
        close_deadline: Seconds that the end of its life may take.
    """

    key: Any
    kind: Kind
    source: Any
    lifetime: Lifetime
    parameters: tuple[Parameter, ...] = ()
    cleanup: Callable[[Any], Any] | None = None
    ping: Callable[[Any], Any] | None = None
    close_deadline: float = 5.0

    @property
    def name(self) -> str:
        return name_of(self.key)

    @property
    def has_end(self) -> bool:
        """Whether something is to be run at the end of its life."""
        return self.cleanup is not None or (self.kind == "factory" and _is_generator(self.source))

    @property
    def needs(self) -> tuple[Any, ...]:
        """Keys of what it is built from."""
        if self.kind == "alias":
            return (self.source,)
        return tuple(parameter.key for parameter in self.parameters)


Registrations = Mapping[Any, Registration]


def _is_generator(factory: object) -> bool:
    return inspect.isasyncgenfunction(factory) or inspect.isgeneratorfunction(factory)


def _interface(annotation: Any) -> Any:
    """``X`` of ``X | None``, anything else as it is."""
    if get_origin(annotation) in (Union, types.UnionType):
        concrete = [part for part in get_args(annotation) if part is not type(None)]
        if len(concrete) == 1:
            return concrete[0]
    return annotation


def parameters_of(key: Any, factory: Callable[..., Any]) -> tuple[Parameter, ...]:
    """What ``factory`` needs, read from its annotations.

    Raises:
        ContainerError: a parameter has no annotation, can only be passed by position, or the factory is wrapped in
            ``contextmanager`` (register the generator itself).
    """
    if _is_generator(inspect.unwrap(factory)) and not _is_generator(factory):
        raise ContainerError(
            f"{name_of(key)}: its factory {name_of(factory)} is a decorated generator: register the generator itself"
        )
    # A class takes what its constructor takes; a callable object what its __call__ does.
    if inspect.isclass(factory):
        annotated: Any = factory.__init__
    elif inspect.isroutine(factory):
        annotated = factory
    else:
        annotated = type(factory).__call__
    try:
        hints = get_type_hints(annotated)
    except NameError as error:
        raise ContainerError(
            f"{name_of(key)}: annotations of its factory {name_of(factory)} cannot be read at run time: {error}"
        ) from error
    found = []
    for name, parameter in inspect.signature(factory).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        optional = parameter.default is not parameter.empty
        if name not in hints or parameter.kind is parameter.POSITIONAL_ONLY:
            if optional:
                continue
            raise ContainerError(
                f"{name_of(key)}: parameter {name!r} of its factory {name_of(factory)} needs a type annotation "
                "and must be passable by name"
            )
        found.append(Parameter(name, _interface(hints[name]), optional))
    return tuple(found)


def check_graph(registrations: Registrations) -> dict[Any, Registration]:
    """The registrations ready to be built: optional parameters without a provider dropped, transients given a lifetime
    rank by what they need, everything verified.

    Raises:
        MissingServiceError: a dependency is not registered.
        DependencyCycleError: services need each other in a circle.
        LifetimeError: a service would outlive a dependency, or a transient has a cleanup that nobody would run.
    """
    pruned = {
        key: replace(
            registration,
            parameters=tuple(p for p in registration.parameters if not p.optional or p.key in registrations),
            lifetime=_lifetime(registration, registrations),
        )
        for key, registration in registrations.items()
    }
    ranks: dict[Any, int] = {}
    for key in pruned:
        _visit(key, pruned, [], ranks)
    return pruned


def _lifetime(registration: Registration, registrations: Registrations) -> Lifetime:
    """Another name lives as long as what it names, which an override may have changed."""
    target = registrations.get(registration.source) if registration.kind == "alias" else None
    return registration.lifetime if target is None else target.lifetime


def ranks_of(registrations: Registrations) -> dict[Any, int]:
    """Rank of the scope in which each service is built (see ``RANK``); the graph must have been checked."""
    ranks: dict[Any, int] = {}
    for key in registrations:
        _visit(key, registrations, [], ranks)
    return ranks


def _visit(key: Any, registrations: Registrations, path: list[Any], ranks: dict[Any, int]) -> int:
    """Rank of ``key`` after checking everything it needs; ``path`` is what led here."""
    if key in ranks:
        return ranks[key]
    if key in path:
        circle = [*path[path.index(key) :], key]
        raise DependencyCycleError(f"services depend on each other in a circle: {arrows(circle)}")
    registration = registrations.get(key)
    if registration is None:
        raise MissingServiceError(
            f"{name_of(key)} is not registered; {name_of(path[-1])} needs it ({arrows([*path, key])})"
        )
    path.append(key)
    needed = [(_visit(need, registrations, path, ranks), need) for need in registration.needs]
    path.pop()
    shortest, culprit = max(needed, key=lambda pair: pair[0], default=(0, None))
    if registration.lifetime == "transient":
        if registration.has_end:
            raise LifetimeError(
                f"{registration.name} is transient, so nothing ends its life: give it the lifetime request or connection, "
                "or no cleanup"
            )
        rank = shortest
    elif registration.kind == "alias":
        rank = shortest
    else:
        rank = RANK[registration.lifetime]
    if shortest > rank:
        raise LifetimeError(
            f"{registration.name} is {registration.lifetime}-scoped and would outlive {name_of(culprit)}, which it needs "
            f"({arrows([*path, key, culprit])})"
        )
    ranks[key] = rank
    return rank


def arrows(keys: Iterable[Any]) -> str:
    """``A -> B -> C``."""
    return " -> ".join(name_of(key) for key in keys)
