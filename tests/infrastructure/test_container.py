"""The container: wiring by interface, lifetimes, checks before anything is built, start, end and health."""

import inspect
import itertools
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Protocol

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimera_stream.infrastructure.container import (
    Container,
    ContainerError,
    DependencyCycleError,
    LifetimeError,
    MissingServiceError,
    ServiceCloseError,
    Services,
)

pytestmark = pytest.mark.anyio


class Clock(Protocol):
    def now(self) -> int: ...


class FixedClock:
    def now(self) -> int:
        return 42


class Store:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock


class Engine:
    def __init__(self, store: Store, clock: Clock) -> None:
        self.store = store
        self.clock = clock


class Who:
    def __init__(self, name: str) -> None:
        self.name = name


async def started(services: Services, *roots: object) -> Container:
    container = services.build()
    await container.start(*roots)
    return container


# -- wiring ----------------------------------------------------------------------------------------------------------


async def test_injects_by_interface_and_shares_singletons() -> None:
    services = Services()
    services.add(Engine, factory=Engine)
    services.add(Store, factory=Store)
    services.add(Clock, factory=FixedClock)
    async with services.build() as container:
        await container.start()
        engine = container.get(Engine)
        assert engine.clock.now() == 42
        assert engine.store is container.get(Store)
        assert engine.store.clock is engine.clock is container.get(Clock)


async def test_every_shape_of_factory() -> None:
    class A: ...

    class B: ...

    class C: ...

    class D: ...

    class E: ...

    def plain() -> A:
        return A()

    async def coroutine(a: A) -> B:
        await anyio.lowlevel.checkpoint()
        return B()

    def generator(b: B) -> Iterator[C]:
        yield C()

    async def async_generator(c: C) -> AsyncIterator[D]:
        yield D()

    class Maker:
        def __call__(self, d: D) -> E:
            return E()

    services = Services()
    services.add(A, factory=plain)
    services.add(B, factory=coroutine)
    services.add(C, factory=generator)
    services.add(D, factory=async_generator)
    services.add(E, factory=Maker())
    async with services.build() as container:
        await container.start()
        for key in (A, B, C, D, E):
            assert isinstance(container.get(key), key)


async def test_parameter_with_default_is_injected_only_if_registered() -> None:
    class Plain:
        def __init__(self, clock: Clock | None = None, size: int = 3) -> None:
            self.clock = clock
            self.size = size

    services = Services()
    services.add(Plain, factory=Plain)
    bare = await started(services)
    assert bare.get(Plain).clock is None
    assert bare.get(Plain).size == 3

    services.add(Clock, instance=FixedClock())
    full = await started(services)
    assert full.get(Plain).clock is full.get(Clock)


async def test_one_instance_under_several_interfaces() -> None:
    class Reader(Protocol): ...

    class Reading:
        def __init__(self, reader: Reader) -> None:
            self.reader = reader

    services = Services()
    services.add(Store, factory=Store, also=[Reader])
    services.add(Clock, instance=FixedClock())
    services.add(Reading, factory=Reading)
    container = await started(services)
    assert container.get(Reader) is container.get(Store) is container.get(Reading).reader


async def test_factory_of_the_wrong_class_is_named() -> None:
    services = Services()
    services.add(Store, factory=FixedClock)
    with pytest.raises(ContainerError, match="Store: its factory gave a FixedClock"):
        await started(services)


# -- checks ----------------------------------------------------------------------------------------------------------


async def test_cycle_is_found_at_build_and_its_path_named() -> None:
    class A: ...

    class B: ...

    class C: ...

    def make_a(b: B) -> A:
        raise AssertionError("never called")

    def make_b(c: C) -> B:
        raise AssertionError("never called")

    def make_c(a: A) -> C:
        raise AssertionError("never called")

    services = Services()
    services.add(A, factory=make_a)
    services.add(B, factory=make_b)
    services.add(C, factory=make_c)
    with pytest.raises(DependencyCycleError) as caught:
        services.build()
    path = str(caught.value).rsplit(": ", 1)[1].split(" -> ")
    assert [name.rsplit(".", 1)[1] for name in path] == ["A", "B", "C", "A"]


def test_missing_dependency_is_named_with_who_needs_it() -> None:
    services = Services()
    services.add(Engine, factory=Engine)
    services.add(Store, factory=Store)
    with pytest.raises(
        MissingServiceError, match=r"Clock is not registered; Store needs it \(Engine -> Store -> Clock\)"
    ):
        services.build()


def test_singleton_may_not_depend_on_a_request() -> None:
    services = Services()
    services.add(Clock, factory=FixedClock, lifetime="request")
    services.add(Store, factory=Store)
    with pytest.raises(LifetimeError, match="Store is singleton-scoped and would outlive Clock"):
        services.build()


def test_registering_twice_is_refused() -> None:
    services = Services()
    services.add(Clock, instance=FixedClock())
    with pytest.raises(ContainerError, match="Clock is registered already"):
        services.add(Clock, instance=FixedClock())


def test_instance_and_factory_exclude_each_other() -> None:
    with pytest.raises(ContainerError, match="either an instance or a factory"):
        Services().add(Clock, instance=FixedClock(), factory=FixedClock)
    with pytest.raises(ContainerError, match="either an instance or a factory"):
        Services().add(Clock)


def test_factory_without_annotation_is_refused() -> None:
    def make(clock):  # type: ignore[no-untyped-def]
        return Store(clock)

    with pytest.raises(ContainerError, match=r"parameter 'clock' of its factory .*make needs a type annotation"):
        Services().add(Store, factory=make)


def test_annotation_that_does_not_exist_at_run_time_is_refused() -> None:
    def make(clock: "Imported") -> Store:  # type: ignore[name-defined]  # noqa: F821
        return Store(clock)

    with pytest.raises(ContainerError, match=r"Store: annotations of its factory .* 'Imported' is not defined"):
        Services().add(Store, factory=make)


def test_decorated_generator_is_refused() -> None:
    @asynccontextmanager
    async def make() -> AsyncIterator[Store]:
        yield Store(FixedClock())

    with pytest.raises(ContainerError, match="register the generator itself"):
        Services().add(Store, factory=make)


def test_transient_with_an_end_is_refused() -> None:
    services = Services()
    services.add(Clock, factory=FixedClock, lifetime="transient", cleanup=lambda clock: None)
    with pytest.raises(LifetimeError, match="Clock is transient"):
        services.build()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sets(st.integers(0, 7)), min_size=8, max_size=8))
def test_build_refuses_exactly_the_cyclic_graphs(edges: list[set[int]]) -> None:
    keys = [type(f"K{index}", (), {}) for index in range(8)]
    services = Services()
    for index, needs in enumerate(edges):

        def make(**arguments: object) -> object:
            return object()

        make.__annotations__ = {f"p{need}": keys[need] for need in needs}

        make.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(f"p{need}", inspect.Parameter.KEYWORD_ONLY) for need in needs]
        )
        services.add(keys[index], factory=make)

    def reaches(start: int, seen: set[int]) -> set[int]:
        for need in edges[start]:
            if need not in seen:
                seen.add(need)
                reaches(need, seen)
        return seen

    cyclic = any(index in reaches(index, set()) for index in range(8))
    if cyclic:
        with pytest.raises(DependencyCycleError) as caught:
            services.build()
        path = [int(name[1:]) for name in str(caught.value).rsplit(": ", 1)[1].split(" -> ")]
        assert path[0] == path[-1]
        assert all(after in edges[before] for before, after in itertools.pairwise(path))
    else:
        services.build()


# -- lifetimes -------------------------------------------------------------------------------------------------------


def scoped_services(ended: list[str]) -> Services:
    class Session:
        def __init__(self, clock: Clock, who: Who) -> None:
            self.who = who

    async def request_log(session: Session) -> AsyncIterator[Store]:
        cause = yield Store(FixedClock())
        ended.append(f"request {type(cause).__name__}")

    services = Services()
    services.add(Clock, factory=FixedClock)
    services.add_scope_value(Who, lifetime="connection")
    services.add(
        Session, factory=Session, lifetime="connection", cleanup=lambda s: ended.append(f"session {s.who.name}")
    )
    services.add(Store, factory=request_log, lifetime="request")
    services.add(Engine, factory=Engine, lifetime="transient")
    services.session = Session  # type: ignore[attr-defined]
    return services


async def test_scopes_share_within_and_differ_between() -> None:
    ended: list[str] = []
    services = scoped_services(ended)
    session_key = services.session  # type: ignore[attr-defined]
    async with services.build() as container:
        await container.start()
        async with container.connection({Who: Who("ada")}) as ada, container.connection({Who: Who("bob")}) as bob:
            session = await ada.get(session_key)
            assert session.who.name == "ada"
            assert session is await ada.get(session_key)
            assert session is not await bob.get(session_key)
            assert await ada.get(Clock) is container.get(Clock)
            async with ada.request() as first, ada.request() as second:
                assert await first.get(session_key) is session
                store = await first.get(Store)
                assert store is await first.get(Store)
                assert store is not await second.get(Store)
                one, two = await first.get(Engine), await first.get(Engine)
                assert one is not two
                assert one.store is two.store is store
            assert ended == ["request NoneType", "request NoneType"]
    assert ended[2:] == ["session bob", "session ada"]


async def test_request_without_connection_ends_what_it_opened() -> None:
    ended: list[str] = []
    services = scoped_services(ended)
    async with services.build() as container:
        await container.start()
        with pytest.raises(KeyError):  # noqa: PT012
            async with container.request({Who: Who("ada")}) as request:
                await request.get(Store)
                raise KeyError
        assert ended == ["request KeyError", "session ada"]


async def test_concurrent_gets_in_one_scope_build_once() -> None:
    built = 0
    gate = anyio.Event()

    async def slow() -> Store:
        nonlocal built
        built += 1
        await gate.wait()
        return Store(FixedClock())

    services = Services()
    services.add(Store, factory=slow, lifetime="connection")
    found: list[Store] = []
    async with services.build() as container, container.connection() as connection:

        async def get() -> None:
            found.append(await connection.get(Store))

        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(get)
            await anyio.wait_all_tasks_blocked()
            gate.set()
    assert built == 1
    assert len(found) == 5
    assert len({id(store) for store in found}) == 1


async def test_asking_in_the_wrong_place_says_where_it_lives() -> None:
    services = scoped_services([])
    session_key = services.session  # type: ignore[attr-defined]
    async with services.build() as container:
        with pytest.raises(MissingServiceError, match="Clock is not started"):
            container.get(Clock)
        await container.start()
        with pytest.raises(
            LifetimeError, match=r"Session lives in a connection: resolve it within container.connection"
        ):
            container.get(session_key)
        with pytest.raises(MissingServiceError, match="FixedClock is not registered"):
            container.get(FixedClock)
        async with container.connection({Who: Who("ada")}) as connection:
            with pytest.raises(LifetimeError, match="Store lives in a request"):
                await connection.get(Store)
        async with container.connection() as connection:
            with pytest.raises(MissingServiceError, match="Session needs Who, which was not given"):
                await connection.get(session_key)
        with pytest.raises(MissingServiceError, match="Clock was not declared by add_scope_value"):
            async with container.connection({Clock: FixedClock()}):
                pass
        async with container.connection({Who: Who("ada")}) as connection:
            with pytest.raises(LifetimeError, match="Who is a value of a connection"):
                async with connection.request({Who: Who("eve")}):
                    pass


async def test_transient_of_singletons() -> None:
    services = Services()
    services.add(Clock, factory=FixedClock)
    services.add(Store, factory=Store, lifetime="transient")
    services.add(Engine, factory=Engine)
    async with services.build() as container:
        await container.start(Engine)
        first, second = await container.create(Store), await container.create(Store)
        assert first is not second
        assert first.clock is container.get(Clock)
        with pytest.raises(LifetimeError, match="use create"):
            container.get(Store)
        with pytest.raises(LifetimeError, match="Engine is singleton-scoped, not transient"):
            await container.create(Engine)


# -- start -----------------------------------------------------------------------------------------------------------


async def test_independent_factories_start_together_and_dependents_after() -> None:
    class A: ...

    class B: ...

    class C: ...

    both = anyio.Event()
    running = 0
    seen: list[tuple[str, str]] = []

    async def meet() -> None:
        nonlocal running
        running += 1
        if running == 2:
            both.set()
        await both.wait()  # only ends if the other one runs at the same time

    async def make_a() -> A:
        await meet()
        return A()

    async def make_b() -> B:
        await meet()
        return B()

    def make_c(a: A, b: B) -> C:
        assert both.is_set()
        return C()

    services = Services()
    services.add(C, factory=make_c)
    services.add(A, factory=make_a)
    services.add(B, factory=make_b)
    with anyio.fail_after(10):
        async with services.build() as container:
            await container.start(parallel=2, progress=lambda name, state: seen.append((name.rsplit(".")[-1], state)))
    assert set(seen[:2]) == {("A", "starting"), ("B", "starting")}
    assert set(seen[2:4]) == {("A", "ready"), ("B", "ready")}
    assert seen[4:] == [("C", "starting"), ("C", "ready")]


async def test_parallel_bounds_how_many_start_at_once() -> None:
    running = most = 0
    services = Services()
    for index in range(6):

        async def make() -> object:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await anyio.lowlevel.checkpoint()
            running -= 1
            return object()

        services.add(type(f"Part{index}", (Protocol,), {"_is_protocol": True}), factory=make)
    async with services.build() as container:
        await container.start(parallel=2)
    assert most == 2


async def test_start_of_a_root_starts_only_what_it_needs() -> None:
    services = Services()
    services.add(Clock, factory=FixedClock)
    services.add(Store, factory=Store)
    services.add(Engine, factory=Engine)
    async with services.build() as container:
        await container.start(Store)
        store = container.get(Store)
        with pytest.raises(MissingServiceError, match="Engine is not started"):
            container.get(Engine)
        await container.start()
        assert container.get(Engine).store is store


async def test_failed_start_names_the_service_and_ends_what_was_created() -> None:
    ended: list[str] = []
    seen: list[tuple[str, str]] = []

    def fail(clock: Clock) -> Store:
        raise OSError("disk full")

    services = Services()
    services.add(Clock, factory=FixedClock, cleanup=lambda clock: ended.append("clock"))
    services.add(Store, factory=fail)
    services.add(Engine, factory=Engine)
    with pytest.raises(OSError, match="disk full") as caught:
        async with services.build() as container:
            await container.start(progress=lambda name, state: seen.append((name, state)))
    assert "while starting Store" in caught.value.__notes__
    assert ended == ["clock"]
    assert seen[-1] == ("Store", "failed")


async def test_a_scope_does_not_build_singletons_behind_the_back_of_start() -> None:
    services = Services()
    services.add(Clock, factory=FixedClock)
    services.add(Store, factory=Store, lifetime="request")
    async with services.build() as container, container.request() as request:
        with pytest.raises(MissingServiceError, match="Clock is not started"):
            await request.get(Store)


# -- end -------------------------------------------------------------------------------------------------------------


async def test_ends_last_in_first_out_and_all_of_them_despite_failures() -> None:
    ended: list[str] = []

    async def clock() -> AsyncIterator[Clock]:
        yield FixedClock()
        ended.append("clock")

    def store(clock: Clock) -> Iterator[Store]:
        yield Store(clock)
        ended.append("store")
        raise OSError("flush failed")

    async def stop(engine: Engine) -> None:
        await anyio.lowlevel.checkpoint()
        ended.append("engine")
        raise ValueError("bad state")

    services = Services()
    services.add(Engine, factory=Engine, cleanup=stop)
    services.add(Store, factory=store)
    services.add(Clock, factory=clock)
    container = await started(services)
    with pytest.raises(ServiceCloseError) as caught:
        await container.close()
    assert ended == ["engine", "store", "clock"]
    assert [type(error) for error in caught.value.exceptions] == [ValueError, OSError]
    assert "Engine, Store" in str(caught.value)
    await container.close()
    with pytest.raises(MissingServiceError, match="the container is closed"):
        container.get(Clock)


async def test_an_end_that_hangs_is_cut_off_and_the_others_run() -> None:
    ended: list[str] = []
    services = Services()

    async def hang(store: Store) -> None:
        await anyio.sleep_forever()

    services.add(Clock, factory=FixedClock, cleanup=lambda clock: ended.append("clock"))
    services.add(Store, factory=Store, cleanup=hang, close_deadline=0.01)
    container = await started(services)
    with pytest.raises(ServiceCloseError) as caught:
        await container.close()
    (error,) = caught.value.exceptions
    assert isinstance(error, TimeoutError)
    assert "Store did not end within 0.01 s" in str(error)
    assert ended == ["clock"]


async def test_one_deadline_for_all_ends() -> None:
    async def hang(service: object) -> None:
        await anyio.sleep_forever()

    services = Services()
    services.add(Clock, factory=FixedClock, cleanup=hang, close_deadline=3600)
    services.add(Store, factory=Store, cleanup=hang, close_deadline=3600)
    container = await started(services)
    with anyio.fail_after(30), pytest.raises(ServiceCloseError) as caught:
        await container.close(deadline=0.02)
    assert len(caught.value.exceptions) == 2


async def test_an_end_cancelled_from_within_does_not_stop_the_others() -> None:
    ended: list[str] = []

    async def cancelled(store: Store) -> None:
        raise anyio.get_cancelled_exc_class()

    services = Services()
    services.add(Clock, factory=FixedClock, cleanup=lambda clock: ended.append("clock"))
    services.add(Store, factory=Store, cleanup=cancelled)
    container = await started(services)
    with pytest.raises(ServiceCloseError, match="Store"):
        await container.close()
    assert ended == ["clock"]


async def test_ends_run_although_the_owner_is_cancelled() -> None:
    ended: list[str] = []

    async def stop(store: Store) -> None:
        await anyio.lowlevel.checkpoint()
        ended.append("store")

    services = Services()
    services.add(Clock, factory=FixedClock)
    services.add(Store, factory=Store, cleanup=stop)
    services.add(Engine, factory=Engine, lifetime="request", cleanup=lambda engine: ended.append("engine"))
    with anyio.CancelScope() as scope:
        async with services.build() as container:
            await container.start()
            async with container.request() as request:
                await request.get(Engine)
                scope.cancel()
                await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert ended == ["engine", "store"]


async def test_what_ended_the_block_is_not_hidden_by_a_failing_end() -> None:
    def stop(clock: Clock) -> None:
        raise OSError("close failed")

    services = Services()
    services.add(Clock, factory=FixedClock, cleanup=stop)
    with pytest.raises(KeyError) as caught:  # noqa: PT012
        async with services.build() as container:
            await container.start()
            raise KeyError("the cause")
    assert any("Clock" in note for note in caught.value.__notes__)


# -- health, overrides, threads --------------------------------------------------------------------------------------


async def test_health_reports_each_service_that_can_be_pinged() -> None:
    class Pinged(Protocol): ...

    class Fine:
        async def ping(self) -> None: ...

    class Broken:
        async def ping(self) -> None:
            raise ConnectionError("refused\nand more")

    class Stuck:
        async def ping(self) -> None:
            await anyio.sleep_forever()

    pinged: list[Clock] = []
    services = Services()
    services.add(Fine, factory=Fine, also=[Pinged])
    services.add(Broken, factory=Broken)
    services.add(Stuck, factory=Stuck)
    services.add(Clock, factory=FixedClock, ping=pinged.append)
    services.add(Store, factory=Store)
    async with services.build() as container:
        await container.start()
        health = {name.rsplit(".")[-1]: report for name, report in (await container.health(timeout=0.05)).items()}
    assert {name: report.ok for name, report in health.items()} == {
        "Fine": True,
        "Broken": False,
        "Stuck": False,
        "Clock": True,
    }
    assert health["Broken"].error == "ConnectionError: refused"
    assert health["Stuck"].error == "no answer within 0.05 s"
    assert health["Stuck"].latency >= 0.04
    assert len(pinged) == 1


async def test_overrides_reach_dependents_and_end_with_the_block() -> None:
    class Other:
        def now(self) -> int:
            return 7

    services = Services()
    services.add(Clock, factory=FixedClock)
    services.add(Store, factory=Store)
    with services.override(Clock, factory=Other):
        inside = await started(services)
    assert inside.get(Store).clock.now() == 7
    assert (await started(services)).get(Store).clock.now() == 42

    async with services.build({Clock: Other()}) as container:
        await container.start()
        assert container.get(Store).clock.now() == 7

    with pytest.raises(MissingServiceError, match="cannot be overridden"):
        services.build({Engine: object()})
    with pytest.raises(MissingServiceError, match="cannot be overridden"), services.override(Engine, factory=Engine):
        pass


async def test_override_of_a_scoped_service_by_an_instance_reaches_its_other_names() -> None:
    class Reader(Protocol): ...

    services = Services()
    services.add(Clock, factory=FixedClock)
    services.add(Store, factory=Store, lifetime="request", also=[Reader])
    fake = Store(FixedClock())
    with services.override(Store, instance=fake):
        container = await started(services)
    assert container.get(Reader) is container.get(Store) is fake


async def test_get_from_many_threads_and_registering_from_many_threads() -> None:
    keys = [type(f"Part{index}", (), {}) for index in range(64)]
    services = Services()
    barrier = threading.Barrier(8)

    def register(part: list[type]) -> None:
        barrier.wait(10)
        for key in part:
            services.add(key, factory=key)

    threads = [threading.Thread(target=register, args=(keys[index::8],)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await anyio.to_thread.run_sync(thread.join)
    async with services.build() as container:
        await container.start()
        found: list[list[object]] = []

        def resolve() -> None:
            barrier.wait(10)
            found.append([container.get(key) for key in keys])

        async with anyio.create_task_group() as group:
            for _ in range(8):
                group.start_soon(anyio.to_thread.run_sync, resolve)
        assert len(found) == 8
        assert len({tuple(map(id, values)) for values in found}) == 1


async def test_starting_twice_at_once_is_refused() -> None:
    inside, go = anyio.Event(), anyio.Event()

    async def slow() -> Store:
        inside.set()
        await go.wait()
        return Store(FixedClock())

    services = Services()
    services.add(Store, factory=slow)
    async with services.build() as container, anyio.create_task_group() as group:
        group.start_soon(container.start)
        await inside.wait()
        with pytest.raises(ContainerError, match="being started already"):
            await container.start()
        go.set()
