"""The PostgreSQL server that tests use, and databases of their own on it."""

import os
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import anyio
import asyncpg

POSTGRES = os.environ.get("KIMERA_TEST_POSTGRES_URL", "postgresql+asyncpg://postgres@127.0.0.1:5432/postgres")


def run_apart(fn: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    """Run it on a loop of its own: fixtures may be made while the test's loop is set up."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(anyio.run, fn, *args).result()


async def administer(*statements: str) -> None:
    connection = await asyncpg.connect(POSTGRES.replace("+asyncpg", ""), timeout=5)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


def url_of(database: str) -> str:
    return f"{POSTGRES.rpartition('/')[0]}/{database}"


@contextmanager
def own_database(template: str = "template1") -> Iterator[str]:
    """The name of a new database, a copy of ``template``; dropped at the end."""
    name = f"kimera_test_{uuid4().hex}"
    run_apart(administer, f"CREATE DATABASE {name} TEMPLATE {template}")
    try:
        yield name
    finally:
        run_apart(administer, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
