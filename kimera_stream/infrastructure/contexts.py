"""State that belongs to a context: the application, a session within it, a request within that.

    WHO: ContextKey[Principal] = ContextKey("who")

    async with context("session", "s-1") as session:
        session.set(WHO, principal)
        session.on_exit(outbox.close)
        async with context("request"):
            ...
            current().get(WHO)  # found in the session around the request

A context is entered and left by one task. Tasks started within it see it, contexts that they enter themselves are theirs
alone, and once it is left nobody gets anything from it any more: a task that outlives it gets an error, not stale state.
"""

import inspect
from collections.abc import Callable
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any, Final, Generic, Literal, Self, TypeVar, cast

import anyio
import structlog

from kimera_stream.protocol.errors import KimeraError

T = TypeVar("T")
ContextKind = Literal["application", "session", "request"]
_DEPTH: Final[dict[ContextKind, int]] = {"application": 0, "session": 1, "request": 2}
_current: ContextVar["Context | None"] = ContextVar("kimera_context", default=None)
_MISSING: Final = object()

log = structlog.get_logger(__name__)


class ContextError(KimeraError):
    """A context is used where there is none, after its end, or nested the wrong way round: a mistake in the program."""


class ContextCloseError(ExceptionGroup[Exception]):
    """Some callbacks at the end of a context failed or took too long; every other one was still called."""


class ContextKey(Generic[T]):
    """Identifies one value of a context. Two keys of the same name are different keys."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"ContextKey({self.name!r})"


class Context:
    """One context, made by ``context``; use as ``async with``.

    Attributes:
        kind: application, session or request.
        id: Whom or what it is for; informative.
        parent: The context around it, None for the outermost.
    """

    def __init__(self, kind: ContextKind, id: str, close_deadline: float) -> None:
        self.kind: Final = kind
        self.id: Final = id
        self.parent: Context | None = None
        self._close_deadline = close_deadline
        self._values: dict[ContextKey[Any], Any] = {}
        self._exits: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self._token: Token[Context | None] | None = None
        self._open = False

    def set(self, key: ContextKey[T], value: T) -> None:
        """Keep ``value`` until the context ends; it hides a value of the contexts around it.

        Raises:
            ContextError: the context is not open.
        """
        self.require_open()
        self._values[key] = value

    def get(self, key: ContextKey[T], default: T | object = _MISSING) -> T:
        """The value of this context, or of the nearest one around it that has one.

        Raises:
            ContextError: none has, and no default is given; or the context is not open.
        """
        self.require_open()
        if key in self._values:
            return cast(T, self._values[key])
        if self.parent is not None:
            return self.parent.get(key, default)
        if default is _MISSING:
            raise ContextError(f"{key.name} is set neither here nor in a context around this one")
        return cast(T, default)

    def on_exit(self, callback: Callable[..., Any], *args: Any) -> None:
        """Call ``callback(*args)`` (sync or async) when the context ends, the last one given first.

        Raises:
            ContextError: the context is not open.
        """
        self.require_open()
        self._exits.append((callback, args))

    async def __aenter__(self) -> Self:
        if self._open or self._token is not None:
            raise ContextError(f"the {self.kind} {self.id!r} has been entered before")
        self.parent = _current.get()
        if self.parent is not None:
            self.parent.require_open()
            # A request may open another one within itself, nothing may open what should be around it.
            if _DEPTH[self.kind] < _DEPTH[self.parent.kind] or self.kind == "application":
                raise ContextError(f"a context of kind {self.kind} does not open within a {self.parent.kind}")
        self._token = _current.set(self)
        self._open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._token is not None
        try:
            failures = await self._run_exits()
        finally:
            self._open = False
            self._values.clear()
            _current.reset(self._token)
        if failures:
            group = ContextCloseError(f"the {self.kind} {self.id!r} did not end cleanly", failures)
            if error is None:
                raise group
            # What ended the block matters more; each failure has been logged.
            error.add_note(str(group))

    async def _run_exits(self) -> list[Exception]:
        """Call every callback under one deadline, whoever is being cancelled meanwhile. Callbacks may add callbacks."""
        failures: list[Exception] = []
        ends = anyio.current_time() + self._close_deadline
        while self._exits:
            callback, args = self._exits.pop()
            name = getattr(callback, "__qualname__", repr(callback))
            failure: Exception | None = None
            try:
                with anyio.CancelScope(shield=True, deadline=ends) as limit:
                    outcome = callback(*args)
                    if inspect.isawaitable(outcome):
                        await outcome
                if limit.cancelled_caught:
                    failure = TimeoutError(f"{name} was cut off: the context had {self._close_deadline:g} s to end")
            except anyio.get_cancelled_exc_class():
                # Shielded, so something it waited for was cancelled; the other callbacks are still to be called.
                failure = RuntimeError(f"{name} was cancelled from within")
            except Exception as error:  # noqa: BLE001 - logged here, raised together with the others
                failure = error
            if failure is not None:
                log.warning("context_exit_failed", context=self.kind, callback=name, error=type(failure).__name__)
                failures.append(failure)
        return failures

    def require_open(self) -> None:
        """Do nothing while the context is open.

        Raises:
            ContextError: it has ended, or was never entered.
        """
        if not self._open:
            state = "has ended" if self._token is not None else "has not been entered"
            raise ContextError(f"the {self.kind} {self.id!r} {state}")


def context(kind: ContextKind, id: str = "", *, close_deadline: float = 5.0) -> Context:
    """A new context, to be entered with ``async with``.

    Args:
        kind: A session opens within an application or alone, a request within either, within another request, or alone.
        id: Whom or what it is for.
        close_deadline: Seconds for all callbacks at its end together; those still to come when it has passed are called,
            and cancelled where they first wait.

    Raises (on entering):
        ContextError: it is nested the wrong way round.

    Raises (on leaving):
        ContextCloseError: a callback failed or was cut off, and the block itself raised nothing.
    """
    return Context(kind, id, close_deadline)


def current(kind: ContextKind | None = None) -> Context:
    """The innermost context of the calling task, or the innermost one of ``kind``.

    Raises:
        ContextError: there is none.
    """
    found = _current.get()
    while found is not None and kind is not None and found.kind != kind:
        found = found.parent
    if found is None:
        raise ContextError("there is no context here" if kind is None else f"there is no {kind} here")
    return found
