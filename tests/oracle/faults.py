"""The faults. Each is done to a deployment and over when it returns; what they must never lead to is checked by others."""

import signal
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import anyio
import anyio.to_thread
import asyncpg

from tests.oracle.deployments import Deployment, Node
from tests.oracle.listeners import Listener
from tests.oracle.model import Heard, Ledger, Op
from tests.oracle.passes import Passes
from tests.oracle.plan import Step
from tests.oracle.processes import NotStarted
from tests.oracle.publishers import Publisher
from tests.oracle.wire import Gone, Web
from tests.oracle.witness import Witness

TURNED_AWAY = 10.0
"""Seconds within which every node has to have heard of a revocation; they look once a second."""
OTHERS_SERVE = 25.0
"""Seconds within which a statement has to be acknowledged that what is broken elsewhere may hold up: a lease and what follows it, on a busy machine."""


@dataclass
class World:
    """What faults are done to.

    Attributes:
        passes: What guests come in by.
        wrong: Promises that were seen to be broken while a fault lasted.
        witnessed: What was heard while disks were full or slow, or the database locked.
        refused: Writes that were refused meanwhile.
        slow: How many times longer answers may take.
    """

    deployment: Deployment
    publishers: list[Publisher]
    listeners: list[Listener]
    ledger: Ledger
    wrong: list[str]
    passes: Passes = field(default_factory=lambda: Passes(0))
    slow: float = 1.0
    witnessed: list[Heard] = field(default_factory=list)
    refused: int = 0


async def cut(world: World, step: Step, rng: Random) -> None:
    """Connections end, some by RST and some by FIN, and again before all have come back."""
    for _ in range(rng.choice([1, 1, 2, 4])):
        for door in world.deployment.doors:
            door.cut(door.some(rng.choice([0.2, 0.5, 1.0]), rng.random), reset=rng.random() < 0.5)
        await anyio.sleep(step.length / 8)


async def half_open(world: World, step: Step, rng: Random) -> None:
    """What is sent on some connections arrives nowhere; then they are gone without a word."""
    links = [link for door in world.deployment.doors for link in door.some(rng.choice([0.3, 0.7]), rng.random)]
    for link in links:
        link.swallowing = True
    await anyio.sleep(step.length * 2)
    for link in links:
        link.cut(reset=True)


async def stall(world: World, step: Step, rng: Random) -> None:
    """Some clients read nothing for so long that the server has to let them fall behind, or go."""
    links = [link for door in world.deployment.doors for link in door.some(rng.choice([0.3, 0.6]), rng.random)]
    for link in links:
        link.stall()
    await anyio.sleep(step.length * 2)
    for link in links:
        link.flow()


async def retry_storm(world: World, step: Step, rng: Random) -> None:
    """Every publisher sends each operation several times, with old keys in between, and loses its connection twice."""
    for publisher in world.publishers:
        publisher.storm(rng.randrange(5, 20))
    for _ in range(2):
        await anyio.sleep(step.length / 3)
        for door in world.deployment.doors:
            door.cut(door.some(0.5, rng.random), reset=True)


async def kill(world: World, step: Step, rng: Random) -> None:
    """kill -9 of a node at any moment; now and then again while it starts."""
    node = _node(world, rng)
    await node.kill()
    if rng.random() < 0.3:
        node.server.launch()
        await anyio.sleep(step.length)
        await node.kill()
    await anyio.sleep(rng.random() * 0.2)
    await node.start()


async def pause(world: World, step: Step, rng: Random) -> None:
    """A node does nothing for a while and then goes on as if nothing had been."""
    node = _node(world, rng)
    node.server.pause()
    await anyio.sleep(step.length * 3)
    node.server.proceed()


async def stop(world: World, _step: Step, rng: Random) -> None:
    """A node is stopped as an operator stops it, under load, and started again."""
    node = _node(world, rng)
    code = await node.restart(gracefully=True)
    if code != 0:
        world.wrong.append(f"a graceful stop of {node.name} ended with {code}: {node.server.said[-500:]}")


async def revoke(world: World, step: Step, rng: Random) -> None:
    """The token by which guests came in at every door is revoked through one of them: each has to let them in no more."""
    passes = world.passes
    given = passes.current
    node = rng.choice([each for each in world.deployment.nodes if each.door is not None])
    with anyio.move_on_after(TURNED_AWAY * world.slow) as told:
        await passes.revoke(node.server.url, rng)
    if told.cancelled_caught:
        world.wrong.append(f"{node.name} does not revoke a token")
        return
    inside = {each.heard.name for each in world.listeners if each.invited}
    with anyio.move_on_after(TURNED_AWAY * world.slow):
        async with anyio.create_task_group() as group:

            async def wait(guest: Listener) -> None:
                await guest.turned_away(given.token)
                inside.discard(guest.heard.name)

            for each in world.listeners:
                if each.invited:
                    group.start_soon(wait, each)
    world.wrong += [f"{name} is let in by a token that {node.name} has revoked" for name in sorted(inside)]
    passes.issue()
    await anyio.sleep(step.length / 4)


async def disk_full(world: World, step: Step, rng: Random) -> None:
    """No room for another byte: nothing may be acknowledged, everything may be read, and it is over when there is room."""

    async def full(on: bool) -> None:
        for shim in world.deployment.shims:
            shim.disk_full(on)

    await _witnessed(world, "a full disk", rng, lambda: full(True), lambda: full(False), step.length, writable=False)
    if world.deployment.postgres is not None:
        await _database_again(world)


async def sync_fails(world: World, step: Step, rng: Random) -> None:
    """fsync fails: nothing may be acknowledged."""

    async def fail(on: bool) -> None:
        for shim in world.deployment.shims:
            shim.sync_fails(on)

    await _witnessed(
        world, "a failing fsync", rng, lambda: fail(True), lambda: fail(False), step.length, writable=False
    )
    if world.deployment.postgres is not None:
        await _database_again(world)
    elif rng.random() < 0.5:  # what was written and not synced must not come back as something else
        await world.deployment.nodes[0].restart(gracefully=False)


async def slow_sync(world: World, step: Step, rng: Random) -> None:
    """Each fsync takes long, now and then longer than a commit may; half of the time the node is killed in the middle."""
    takes = rng.choice([30, 100, 400, 4_000])

    async def slow(milliseconds: int) -> None:
        for shim in world.deployment.shims:
            shim.sync_takes(milliseconds)

    async def killed() -> None:
        if rng.random() < 0.5:
            await _node(world, rng).restart(gracefully=False)
        await slow(0)

    await _witnessed(world, f"an fsync of {takes} ms", rng, lambda: slow(takes), killed, step.length, writable=True)


async def clock(world: World, step: Step, rng: Random) -> None:
    """The time of day jumps, by up to hours and in either direction, and stays there; now and then a restart comes after."""
    for shim in world.deployment.clocks:
        shim.clock_jumps(rng.choice([-1, 1]) * rng.choice([900, 61_000, 3_600_000, 4 * 3_600_000]))
    await anyio.sleep(step.length)
    if rng.random() < 0.4:
        await _node(world, rng).restart(gracefully=False)


async def locked(world: World, step: Step, rng: Random) -> None:
    """Somebody else holds what a writer needs for longer than the server waits: SQLite's write lock, in PostgreSQL the log's row."""
    postgres = world.deployment.postgres
    async with AsyncExitStack() as held:

        async def take() -> None:
            if postgres is None:
                connection = await anyio.to_thread.run_sync(_write_lock, world.deployment.database)
                held.callback(connection.close)
            else:
                session = await asyncpg.connect(postgres.url().replace("+asyncpg", ""))
                held.push_async_callback(session.close)
                await session.execute("BEGIN")
                await session.execute("SELECT head FROM log_state FOR UPDATE")

        length = 0.5 + step.length * 2
        await _witnessed(world, "a locked database", rng, take, held.aclose, length, writable=False)


def _write_lock(file: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(file, isolation_level=None, check_same_thread=False, timeout=5)
    connection.execute("BEGIN IMMEDIATE")
    return connection


async def torn_log(world: World, _step: Step, rng: Random) -> None:
    """A write that a power cut interrupted: behind the last whole frame of the write-ahead log stands a part of one."""
    (node,) = world.deployment.nodes
    await node.kill()

    def tear() -> None:
        wal = world.deployment.database.with_name(world.deployment.database.name + "-wal")
        if not wal.exists() or wal.stat().st_size < 32 + 24:
            return
        content = wal.read_bytes()
        header = bytearray(content[32 : 32 + 24])
        frame = bytes(header) + rng.randbytes(4096)
        with wal.open("r+b") as file:
            file.seek(_end_of_frames(content))
            file.write(frame[: rng.randrange(8, len(frame))])

    await anyio.to_thread.run_sync(tear)
    await node.start()


async def database_sessions(world: World, step: Step, rng: Random) -> None:
    """Every session of the server with its database is terminated, up to four times."""
    assert world.deployment.postgres is not None
    for _ in range(rng.choice([1, 2, 4])):
        await world.deployment.postgres.terminate_connections()
        await anyio.sleep(step.length / 4)


async def database_restart(world: World, step: Step, rng: Random) -> None:
    """PostgreSQL is stopped, fast or at once, and comes back a while later."""
    postgres = world.deployment.postgres
    assert postgres is not None
    await postgres.end(rng.choice([signal.SIGINT, signal.SIGQUIT]))
    await anyio.sleep(step.length / 2)
    await postgres.start()


async def database_kill(world: World, step: Step, _rng: Random) -> None:
    """kill -9 of PostgreSQL's first process."""
    postgres = world.deployment.postgres
    assert postgres is not None
    await postgres.kill()
    await anyio.sleep(step.length / 2)
    await postgres.start()


async def database_pause(world: World, step: Step, _rng: Random) -> None:
    """PostgreSQL, its first process and all others, does nothing for a while."""
    postgres = world.deployment.postgres
    assert postgres is not None
    postgres.pause()
    await anyio.sleep(step.length * 3)
    postgres.proceed()


async def database_stall(world: World, step: Step, _rng: Random) -> None:
    """Nothing passes between servers and database for a while, and then everything that waited does."""
    links = [link for proxy in world.deployment.leading_to("postgres") for link in proxy.links.values()]
    for link in links:
        link.stall()
    await anyio.sleep(step.length * 2)
    for link in links:
        link.flow()


async def database_partition(world: World, step: Step, _rng: Random) -> None:
    """What servers and database say to each other is lost, and then their connections are."""
    await _partition(world, "postgres", step)


async def database_cut_off(world: World, step: Step, rng: Random) -> None:
    """What one node and the database say to each other is lost, while the others have theirs."""
    await _cut_off(world, "postgres", step, rng)


async def database_failover(world: World, step: Step, _rng: Random) -> None:
    """PostgreSQL dies for good, and its standby, for which it has waited with every commit, takes its place. Shortly before, the standby
    says nothing: what is then acknowledged all the same would be lost."""
    primary = world.deployment.postgres
    assert primary is not None
    standby = world.deployment.standby = await primary.stand_by()
    await anyio.sleep(step.length)
    standby.pause()
    await anyio.sleep(step.length / 2)
    proxies = world.deployment.leading_to("postgres")
    for proxy in proxies:
        proxy.upstream = None
    await primary.kill_all()
    standby.proceed()
    await standby.promote()
    world.deployment.postgres, world.deployment.standby = standby, None
    for proxy in proxies:
        proxy.cut(list(proxy.links.values()), reset=True)
        proxy.upstream = ("127.0.0.1", standby.port)
    await primary.vanish()


async def node_disk_full(world: World, step: Step, rng: Random) -> None:
    """No room in the data folder of a node that keeps nothing there but snapshots: everything goes on, and it can be stopped and started."""
    node = rng.choice([each for each in world.deployment.nodes if each.role != "edge"])
    assert node.shim is not None
    node.shim.disk_full(True)
    try:
        await _acknowledged(world, world.deployment.reader, f"no room for {node.name}'s snapshots", rng)
        await anyio.sleep(step.length)
        code = await node.restart(gracefully=True)
        if code != 0:
            world.wrong.append(f"a graceful stop of {node.name} with a full disk ended with {code}")
    finally:
        node.shim.disk_full(False)


async def redis_flush(world: World, step: Step, rng: Random) -> None:
    """Redis forgets everything, up to three times."""
    assert world.deployment.redis is not None
    for _ in range(rng.choice([1, 1, 3])):
        await world.deployment.redis.flush()
        await anyio.sleep(step.length / 4)


async def redis_restart(world: World, step: Step, _rng: Random) -> None:
    """kill -9 of Redis, which keeps nothing; it comes back a while later."""
    redis = world.deployment.redis
    assert redis is not None
    await redis.kill()
    await anyio.sleep(step.length)
    await redis.start()


async def redis_pause(world: World, step: Step, _rng: Random) -> None:
    """Redis does nothing for a while."""
    assert world.deployment.redis is not None
    world.deployment.redis.pause()
    await anyio.sleep(step.length * 3)
    world.deployment.redis.proceed()


async def redis_partition(world: World, step: Step, _rng: Random) -> None:
    """What nodes and Redis say to each other is lost, and then their connections are."""
    await _partition(world, "redis", step)


async def redis_cut_off(world: World, step: Step, rng: Random) -> None:
    """What one node and Redis say to each other is lost, while the others have theirs."""
    await _cut_off(world, "redis", step, rng)


async def _partition(world: World, part: str, step: Step) -> None:
    proxies = world.deployment.leading_to(part)
    for proxy in proxies:
        proxy.partition(True)
    await anyio.sleep(step.length * 2)
    for proxy in proxies:
        proxy.partition(False)


async def _cut_off(world: World, part: str, step: Step, rng: Random) -> None:
    """It lasts until somebody else has been served: nobody needs the one that is cut off."""
    node = _node(world, rng)
    other = next(each for each in world.deployment.nodes if each.door is not None and each is not node)
    (proxy,) = world.deployment.leading_to(part, node.name)
    proxy.partition(True)
    try:
        await anyio.sleep(step.length * 2)
        await _acknowledged(world, other.server.url, f"{node.name} is cut off from {part}", rng)
    finally:
        proxy.partition(False)


async def _acknowledged(world: World, url: str, what: str, rng: Random) -> None:
    """Meanwhile a publish at that node has to be acknowledged, if not at the first try."""
    mark = f"meanwhile-{rng.getrandbits(40)}"
    body = {"symbolic_state": {mark: True}, "metadata": {"mark": mark}}
    op = world.ledger.add(Op(mark, "publish", "", body=body, key=f"key-{mark}"))
    last = "no answer"
    with anyio.move_on_after(OTHERS_SERVE * world.slow):
        async with Web(url, patience=OTHERS_SERVE * world.slow) as web:
            while op.outcome != "acked":
                op.sent.append((-1, len(op.sent)))
                try:
                    status, reply = await web.ask(
                        "POST", "/v1/geoids", json=body, headers={"Idempotency-Key": f"key-{mark}"}
                    )
                except Gone as gone:
                    last = str(gone)
                else:
                    if status in (200, 201):
                        world.ledger.published(op, reply)
                        return
                    last = str(reply.get("code"))
                    world.ledger.refused(op, last)
                await anyio.sleep(0.1)
    if op.outcome != "acked":
        op.outcome = "unknown"
        world.wrong.append(f"{what}: nothing is acknowledged at {url} within {OTHERS_SERVE * world.slow:.0f} s: {last}")


def _node(world: World, rng: Random) -> Node:
    return rng.choice(world.deployment.nodes)


async def _database_again(world: World) -> None:
    """PostgreSQL ends itself where it cannot write its log; whoever looks after it starts it again."""
    postgres = world.deployment.postgres
    assert postgres is not None
    await postgres.look_after()


async def _witnessed(
    world: World,
    what: str,
    rng: Random,
    begin: Callable[[], Awaitable[None]],
    end: Callable[[], Awaitable[None]],
    length: float,
    *,
    writable: bool,
) -> None:
    witness = Witness(what, world.deployment, world.ledger, rng, writable, world.slow)
    try:
        await witness.run(begin, end, length)
    except BaseExceptionGroup as errors:
        found, rest = errors.split((NotStarted, Gone, TimeoutError))
        while isinstance(found, BaseExceptionGroup):
            found = found.exceptions[0]
        if found is None or rest is not None:
            raise
        raise found from errors
    finally:
        world.wrong += witness.wrong
        world.witnessed += witness.heard
        world.refused += witness.refused


def _end_of_frames(content: bytes) -> int:
    """Where the frames end that belong to the present write-ahead log: those with the salt of its header."""
    page = int.from_bytes(content[8:12], "big")
    salt = content[16:24]
    place = 32
    while place + 24 + page <= len(content) and content[place + 8 : place + 16] == salt:
        place += 24 + page
    return place


Fault = Callable[[World, Step, Random], Awaitable[None]]

FAULTS: dict[str, Fault] = {
    each.__name__: each
    for each in (
        cut, half_open, stall, retry_storm, kill, pause, stop, revoke, disk_full, sync_fails, slow_sync, clock, locked, torn_log,
        database_sessions, database_restart, database_kill, database_pause, database_stall, database_partition, database_cut_off,
        database_failover, node_disk_full, redis_flush, redis_restart, redis_pause, redis_partition, redis_cut_off,
    )
}  # fmt: skip
