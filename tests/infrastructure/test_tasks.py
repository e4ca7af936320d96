"""The supervisor: order, readiness, restarts, budgets, cancellation by name, and a stop that always ends."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio
import pytest
from structlog.testing import capture_logs

from kimera_stream.infrastructure.tasks import (
    Backoff,
    Budget,
    Service,
    ServiceFailed,
    ServiceSpec,
    ServiceState,
    Supervisor,
    Unrecoverable,
)
from kimera_stream.infrastructure.tasks.child import begin_child
from kimera_stream.protocol.errors import UnavailableError

pytestmark = pytest.mark.anyio
QUICK = Backoff(base=0.001, maximum=0.002, floor=0.0)


async def forever(service: Service) -> None:
    service.ready()
    await anyio.sleep_forever()


@asynccontextmanager
async def spent(run: Callable[[Service], Awaitable[None]]) -> AsyncIterator[Supervisor]:
    """The supervisor of one service, ``bad``, that has failed for good after two restarts."""
    with anyio.fail_after(5):
        async with Supervisor(
            [ServiceSpec("bad", run, backoff=QUICK, budget=Budget(restarts=2, window=60))]
        ) as supervisor:
            supervisor.begin()
            await supervisor.fatal.wait()
            yield supervisor


async def test_starts_in_order_and_independent_ones_together() -> None:
    events: list[str] = []
    both = anyio.Event()
    waiting = 0

    def needs(name: str):
        async def run(service: Service) -> None:
            nonlocal waiting
            if name in {"left", "right"}:  # each waits for the other to have started: only possible side by side
                waiting += 1
                if waiting == 2:
                    both.set()
                await both.wait()
            events.append(name)
            service.ready()
            await anyio.sleep_forever()

        return run

    specs = [
        ServiceSpec("top", needs("top"), after=("left", "right")),
        ServiceSpec("left", needs("left"), after=("base",)),
        ServiceSpec("right", needs("right"), after=("base",)),
        ServiceSpec("base", needs("base")),
    ]
    with anyio.fail_after(5):
        async with Supervisor(specs) as supervisor:
            supervisor.begin()
            assert not supervisor.is_ready
            await supervisor.ready()
            assert supervisor.is_ready
    assert events[0] == "base"
    assert events[-1] == "top"


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([ServiceSpec("a", forever, after=("b",)), ServiceSpec("b", forever, after=("a",))], "a -> b -> a"),
        ([ServiceSpec("a", forever, after=("x",))], "x, which does not exist"),
        ([ServiceSpec("a", forever), ServiceSpec("a", forever)], "two services are named a"),
    ],
)
async def test_a_wrong_plan_is_refused_by_name(specs: list[ServiceSpec], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Supervisor(specs)


async def test_a_crash_is_logged_once_counted_and_restarted() -> None:
    recovered = anyio.Event()
    seen: list[tuple[str, str]] = []

    async def run(service: Service) -> None:
        if service.statistics.starts < 3:
            raise RuntimeError(f"boom {service.statistics.starts}")
        service.ready()
        recovered.set()
        await anyio.sleep_forever()

    with capture_logs() as logs, anyio.fail_after(5):
        async with Supervisor(
            [ServiceSpec("flaky", run, backoff=QUICK)], crashed=lambda name, error: seen.append((name, str(error)))
        ) as supervisor:
            supervisor.begin()
            await supervisor.ready()
            await recovered.wait()
            (service,) = supervisor.services
            assert service.statistics.crashes == 2
            assert service.statistics.operational_failures == 0
    assert seen == [("flaky", "boom 1"), ("flaky", "boom 2")]
    assert [line["event"] for line in logs if line["log_level"] == "error"] == ["service crashed"] * 2


async def test_an_operational_failure_is_one_line_without_traceback() -> None:
    async def run(service: Service) -> None:
        if service.statistics.starts == 1:
            raise UnavailableError("the database does not answer")
        await forever(service)

    with capture_logs() as logs, anyio.fail_after(5):
        async with Supervisor([ServiceSpec("vault", run, backoff=QUICK)]) as supervisor:
            supervisor.begin()
            await supervisor.ready()
            assert supervisor.services[0].statistics.operational_failures == 1
            assert supervisor.services[0].statistics.crashes == 0
    failed = [line for line in logs if line["event"] == "service failed"]
    assert len(failed) == 1
    assert "exc_info" not in failed[0]


async def test_what_is_away_is_waited_out_beyond_the_budget() -> None:
    async def run(service: Service) -> None:
        if service.statistics.starts < 20:
            raise UnavailableError("the database is away", retry_after=1.0)
        await forever(service)

    said: list[str] = []
    with capture_logs() as logs, anyio.fail_after(5):
        async with Supervisor(
            [ServiceSpec("reader", run, backoff=QUICK, budget=Budget(restarts=2, window=60))],
            changed=lambda service: said.append(f"{service.state.value}: {service.detail}"),
        ) as supervisor:
            supervisor.begin()
            assert not supervisor.is_ready
            await supervisor.ready()
            assert supervisor.is_ready
            assert supervisor.services[0].statistics.operational_failures == 19
    assert "backing off: waits: the database is away" in said
    warnings = [line for line in logs if line["log_level"] == "warning"]
    assert len(warnings) == 1, "the others come too soon after it"


async def test_what_was_waited_for_is_not_told_once_a_start_fails_otherwise() -> None:
    async def run(service: Service) -> None:
        if service.statistics.starts == 1:
            raise UnavailableError("the database is away", retry_after=1.0)
        if service.statistics.starts == 2:
            raise RuntimeError("a defect")
        await forever(service)

    said: list[str] = []
    with capture_logs(), anyio.fail_after(5):
        async with Supervisor(
            [ServiceSpec("reader", run, backoff=QUICK)],
            changed=lambda service: said.append(f"{service.state.value}: {service.detail}"),
        ) as supervisor:
            supervisor.begin()
            await supervisor.ready()
    assert said[: said.index("ready: ") + 1] == [
        "starting: ",
        "backing off: waits: the database is away",
        "starting: waits: the database is away",
        "backing off: ",
        "starting: ",
        "ready: ",
    ]


@pytest.mark.parametrize(
    ("error", "ready_first"),
    [
        (RuntimeError("a defect"), False),
        (UnavailableError("no weights are installed"), False),
        (UnavailableError("the database is away", retry_after=1.0), True),
    ],
    ids=["defect", "does not pass", "after it was ready"],
)
async def test_what_is_not_waited_out_spends_the_budget(error: Exception, ready_first: bool) -> None:
    async def run(service: Service) -> None:
        if ready_first:
            service.ready()
        raise error

    async with spent(run) as supervisor:
        assert supervisor.services[0].statistics.starts == 3


async def test_too_many_restarts_end_readiness_and_set_fatal() -> None:
    async def run(service: Service) -> None:
        service.ready()
        raise RuntimeError("always")

    async with spent(run) as supervisor:
        assert not supervisor.is_ready
        assert supervisor.services[0].state is ServiceState.FAILED
        assert supervisor.services[0].statistics.starts == 3
        with pytest.raises(ServiceFailed, match="bad failed for good"):
            await supervisor.ready()


async def test_ready_raises_when_a_start_fails_for_good() -> None:
    async def run(service: Service) -> None:
        raise RuntimeError("cannot start")

    with anyio.fail_after(5):
        async with Supervisor(
            [ServiceSpec("bad", run, on_failure="escalate"), ServiceSpec("ok", forever)]
        ) as supervisor:
            supervisor.begin()
            with pytest.raises(ServiceFailed, match="cannot start"):
                await supervisor.ready()


async def test_a_clean_end_can_be_ignored_or_count_as_failure() -> None:
    async def once(service: Service) -> None:
        service.ready()

    with anyio.fail_after(5):
        async with Supervisor([ServiceSpec("job", once, on_end="ignore")]) as supervisor:
            supervisor.begin()
            await supervisor.ready()
            await supervisor.services[0].finished.wait()
            assert supervisor.is_ready
            assert supervisor.services[0].state is ServiceState.ENDED
        async with Supervisor([ServiceSpec("job", once, on_end="escalate")]) as supervisor:
            supervisor.begin()
            await supervisor.fatal.wait()


async def test_cancel_by_name_runs_cleanups_last_first_and_does_not_restart() -> None:
    order: list[str] = []

    async def run(service: Service) -> None:
        async def note(what: str) -> None:
            order.append(what)

        async def fails() -> None:
            order.append("fails")
            raise OSError("cleanup trouble")

        service.on_cleanup("first", lambda: note("first"))
        service.on_cleanup("fails", fails)
        service.on_cleanup("last", lambda: note("last"))
        service.ready()
        await anyio.sleep_forever()

    with anyio.fail_after(5):
        async with Supervisor([ServiceSpec("named", run), ServiceSpec("other", forever)]) as supervisor:
            supervisor.begin()
            await supervisor.ready()
            report = await supervisor.cancel("named")
            assert report.stopped == ["named"]
            assert order == ["last", "fails", "first"]
            assert supervisor.services[0].state is ServiceState.STOPPED
            assert supervisor.services[0].statistics.starts == 1
            assert supervisor.services[1].state is ServiceState.READY
            with pytest.raises(KeyError):
                await supervisor.cancel("nobody")


async def test_stop_drains_dependants_first() -> None:
    order: list[str] = []

    def drain(name: str):
        async def note() -> None:
            order.append(name)

        return note

    with anyio.fail_after(5):
        async with Supervisor(
            [
                ServiceSpec("low", forever, drain=drain("low")),
                ServiceSpec("high", forever, after=("low",), drain=drain("high")),
            ]
        ) as supervisor:
            supervisor.begin()
            await supervisor.ready()
            report = await supervisor.stop()
    assert order == ["high", "low"]
    assert report.clean
    assert sorted(report.stopped) == ["high", "low"]


async def test_stop_aborts_what_shields_itself_and_says_so() -> None:
    async def stubborn(service: Service) -> None:
        service.ready()
        with anyio.CancelScope(shield=True):
            await anyio.sleep_forever()

    async def never() -> None:
        await anyio.sleep_forever()

    with anyio.fail_after(5):
        async with Supervisor(
            [ServiceSpec("stubborn", stubborn, stop_deadline=0.05), ServiceSpec("slow", forever, drain=never)],
            stop_deadline=0.2,
        ) as supervisor:
            supervisor.begin()
            await supervisor.ready()
            report = await supervisor.stop()
    assert report.aborted == ["stubborn"]
    assert report.undrained == ["slow"]
    assert not report.clean


async def test_stopping_before_ready_ends_those_that_wait() -> None:
    async def never_ready(service: Service) -> None:
        await anyio.sleep_forever()

    with anyio.fail_after(5):
        async with Supervisor([ServiceSpec("a", never_ready), ServiceSpec("b", forever, after=("a",))]) as supervisor:
            supervisor.begin()
            await anyio.lowlevel.checkpoint()
    assert {service.state for service in supervisor.services} == {ServiceState.STOPPED}


def test_backoff_grows_within_its_bounds() -> None:
    backoff, rng = Backoff(base=1, factor=2, maximum=8, floor=0.5), random.Random(7)
    for attempt, ceiling in [(1, 1), (2, 2), (3, 4), (4, 8), (5, 8), (500, 8)]:
        delays = [backoff.delay(attempt, rng) for _ in range(200)]
        assert all(0.5 <= delay <= ceiling for delay in delays)
        assert max(delays) > 0.8 * ceiling


def test_budget_forgets_what_left_its_window() -> None:
    budget = Budget(restarts=2, window=10)
    assert [budget.spend(t) for t in (0, 1, 2)] == [True, True, False]
    assert budget.spend(10.5)
    assert not budget.spend(10.6)


async def test_what_another_start_would_not_help_ends_at_once() -> None:
    starts = 0

    async def hopeless(_service: Service) -> None:
        nonlocal starts
        starts += 1
        raise Unrecoverable("the database is another one's; name yours")

    with capture_logs() as logs, anyio.fail_after(5):
        async with Supervisor([ServiceSpec("db", hopeless, backoff=QUICK)]) as supervisor:
            supervisor.begin()
            with pytest.raises(ServiceFailed, match="name yours"):
                await supervisor.ready()
    assert starts == 1
    assert not any("exc_info" in entry for entry in logs), "a message for a person needs no traceback"


async def test_a_child_ends_without_an_error_by_its_own_group_alone() -> None:
    ended: list[asyncio.Task[None]] = []

    async def wait() -> None:
        task = asyncio.current_task()
        assert task is not None
        ended.append(task)
        await anyio.sleep_forever()

    async with anyio.create_task_group() as group:
        begin_child(group, wait, name="one")
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    with anyio.CancelScope() as around:
        async with anyio.create_task_group() as group:
            begin_child(group, wait, name="another")
            await anyio.wait_all_tasks_blocked()
            around.cancel()
    assert [task.cancelled() for task in ended] == [False, True], "what else cancels it may want to hear of it"
