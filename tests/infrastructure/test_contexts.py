"""Contexts: values found from within, callbacks at the end, nothing shared between tasks that should not be."""

import anyio
import anyio.lowlevel
import pytest

from kimera_stream.infrastructure.contexts import (
    Context,
    ContextCloseError,
    ContextError,
    ContextKey,
    context,
    current,
)

pytestmark = pytest.mark.anyio
WHO: ContextKey[str] = ContextKey("who")
COUNT: ContextKey[int] = ContextKey("count")


async def test_values_are_found_in_the_contexts_around() -> None:
    async with context("application", "app") as app:
        app.set(WHO, "everyone")
        app.set(COUNT, 1)
        async with context("session", "s-1") as session:
            session.set(WHO, "ada")
            async with context("request", "r-1") as request:
                assert current() is request
                assert current("session") is session
                assert current("application") is app
                assert request.get(WHO) == "ada"
                assert request.get(COUNT) == 1
                request.set(COUNT, 2)
            assert session.get(COUNT) == 1
        assert app.get(WHO) == "everyone"


async def test_missing_value_and_missing_context() -> None:
    with pytest.raises(ContextError, match="there is no context here"):
        current()
    async with context("session", "s-1") as session:
        with pytest.raises(ContextError, match="who is set neither here nor in a context around this one"):
            session.get(WHO)
        assert session.get(WHO, "nobody") == "nobody"
        with pytest.raises(ContextError, match="there is no request here"):
            current("request")
    with pytest.raises(ContextError, match="there is no context here"):
        current()


async def test_keys_of_one_name_are_different_keys() -> None:
    async with context("request") as request:
        request.set(ContextKey("who"), "other")
        assert request.get(WHO, "none") == "none"


@pytest.mark.parametrize(("outer", "inner"), [("session", "application"), ("request", "session"), ("application",) * 2])
async def test_nesting_the_wrong_way_round_is_refused(outer: str, inner: str) -> None:
    async with context(outer) as around:  # type: ignore[arg-type]
        with pytest.raises(ContextError, match=f"a context of kind {inner} does not open within a {outer}"):
            async with context(inner):  # type: ignore[arg-type]
                pass
        assert current() is around


async def test_request_within_a_request() -> None:
    async with context("request", "outer") as outer, context("request", "inner") as inner:
        assert inner.parent is outer


async def test_a_context_is_entered_once() -> None:
    once = context("request", "r")
    async with once:
        with pytest.raises(ContextError, match="has been entered before"):
            async with once:
                pass
    with pytest.raises(ContextError, match="has been entered before"):
        async with once:
            pass


async def test_callbacks_run_last_first_while_values_are_still_there() -> None:
    seen: list[str] = []

    async def flush(name: str) -> None:
        await anyio.lowlevel.checkpoint()
        seen.append(f"{name} of {current().get(WHO)}")

    async with context("session") as session:
        session.set(WHO, "ada")
        session.on_exit(flush, "first")
        session.on_exit(seen.append, "second")
        session.on_exit(session.on_exit, seen.append, "added at the end")
    assert seen == ["added at the end", "second", "first of ada"]


async def test_all_callbacks_run_and_their_failures_are_raised_together() -> None:
    seen: list[str] = []

    def fail(error: Exception) -> None:
        raise error

    async def cancelled() -> None:
        raise anyio.get_cancelled_exc_class()

    with pytest.raises(ContextCloseError, match="the session 's' did not end cleanly") as caught:  # noqa: PT012
        async with context("session", "s") as session:
            session.on_exit(seen.append, "last")
            session.on_exit(fail, OSError("disk"))
            session.on_exit(cancelled)
            session.on_exit(fail, ValueError("state"))
    assert seen == ["last"]
    assert [type(error) for error in caught.value.exceptions] == [ValueError, RuntimeError, OSError]


async def test_what_ended_the_block_is_not_hidden() -> None:
    def fail() -> None:
        raise OSError("disk")

    with pytest.raises(KeyError) as caught:  # noqa: PT012
        async with context("session", "s") as session:
            session.on_exit(fail)
            raise KeyError("cause")
    assert any("did not end cleanly" in note for note in caught.value.__notes__)


async def test_callbacks_are_shielded_and_have_a_deadline() -> None:
    seen: list[str] = []

    async def slow() -> None:
        await anyio.lowlevel.checkpoint()
        seen.append("slow")

    with anyio.CancelScope() as scope:
        async with context("request") as request:
            request.on_exit(slow)
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert seen == ["slow"]

    with pytest.raises(ContextCloseError) as caught:  # noqa: PT012
        async with context("request", close_deadline=0.01) as request:
            request.on_exit(seen.append, "after the one that hangs")
            request.on_exit(anyio.sleep_forever)
    (error,) = caught.value.exceptions
    assert isinstance(error, TimeoutError)
    assert seen[-1] == "after the one that hangs"


async def test_tasks_do_not_see_each_others_contexts() -> None:
    both = anyio.Event()
    entered = 0
    seen: dict[str, str] = {}

    async def visit(name: str) -> None:
        nonlocal entered
        async with context("request", name) as request:
            request.set(WHO, name)
            entered += 1
            if entered == 2:
                both.set()
            await both.wait()
            seen[name] = f"{current().id} {current().get(WHO)} in {current('session').id}"

    async with context("session", "s") as session:
        async with anyio.create_task_group() as group:
            group.start_soon(visit, "a")
            group.start_soon(visit, "b")
        assert current() is session
        assert session.get(WHO, "unset") == "unset"
    assert seen == {"a": "a a in s", "b": "b b in s"}


async def test_a_task_that_outlives_a_context_gets_an_error_not_stale_state() -> None:
    left = anyio.Event()
    errors: list[str] = []

    async def late(session: Context) -> None:
        assert current() is session
        await left.wait()
        for use in (lambda: session.get(WHO), lambda: session.set(WHO, "x"), lambda: session.on_exit(print)):
            with pytest.raises(ContextError) as caught:
                use()
            errors.append(str(caught.value))
        with pytest.raises(ContextError, match="has ended"):
            async with context("request"):
                pass

    async with anyio.create_task_group() as group:
        async with context("session", "s") as session:
            session.set(WHO, "ada")
            group.start_soon(late, session)
            await anyio.wait_all_tasks_blocked()
        left.set()
    assert errors == ["the session 's' has ended"] * 3
