"""Micro-batching: who waits for whom, what is encoded once, and what happens when it fails."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio
import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from kimera_stream.core.embedding import BatchingEmbedder, HashingProvider, NoProvider
from kimera_stream.core.embedding.batching import ENTRY_OVERHEAD, FAULTS_IN_A_ROW, PASSES_QUEUED, TextCache
from kimera_stream.core.embedding.provider import Provider
from kimera_stream.core.interfaces import Matrix
from kimera_stream.infrastructure.settings import EmbeddingSettings
from kimera_stream.protocol.errors import BadRequestError, InternalError, UnavailableError

pytestmark = pytest.mark.anyio
DIMENSION = 16


class Gate(HashingProvider):
    """An encoder that can be held up and made to fail, and remembers its batches."""

    def __init__(self) -> None:
        super().__init__(DIMENSION)
        self.batches: list[list[str]] = []
        self.entered = anyio.Event()
        self.open = anyio.Event()
        self.open.set()
        self.error: Exception | None = None

    async def encode_counted(self, texts: Sequence[str]) -> tuple[Matrix, list[int]]:
        self.batches.append(list(texts))
        self.entered.set()
        await self.open.wait()
        if self.error is not None:
            raise self.error
        return await super().encode_counted(texts)


def embedder(provider: Provider, **settings: object) -> BatchingEmbedder:
    return BatchingEmbedder(
        provider,
        EmbeddingSettings(**{"batch_size": 4, "batch_wait": 0.0, **settings}),
        CollectorRegistry(),  # type: ignore[arg-type]
    )


@asynccontextmanager
async def running(service: BatchingEmbedder) -> AsyncIterator[None]:
    async with anyio.create_task_group() as group:
        group.start_soon(service.run)
        yield
        group.cancel_scope.cancel()


async def test_rows_come_in_the_order_of_the_texts_equal_ones_alike() -> None:
    provider = Gate()
    service = embedder(provider)
    async with running(service):
        rows = await service.embed(["one", "two", "one"])
        assert (await service.embed([])).shape == (0, DIMENSION)
    assert np.array_equal(rows, provider.encode_now(["one", "two", "one"]))
    assert provider.batches == [["one", "two"]]


async def test_concurrent_callers_share_a_pass_and_equal_texts_are_encoded_once() -> None:
    provider = Gate()
    service = embedder(provider, batch_wait=1.0)
    async with running(service), anyio.create_task_group() as group:
        for text in ("a", "b", "a", "c", "d"):
            group.start_soon(service.embed, [text])
    assert sorted(provider.batches[0]) == ["a", "b", "c", "d"]
    assert len(provider.batches) == 1


async def test_a_batch_that_is_not_full_leaves_after_the_wait_and_not_before() -> None:
    provider = Gate()
    service = embedder(provider, batch_size=4, batch_wait=1.0)
    async with running(service), anyio.create_task_group() as group:
        group.start_soon(service.embed, ["a"])
        group.start_soon(service.embed, ["b"])
        await anyio.wait_all_tasks_blocked()
        assert (provider.batches, service.queued) == ([], 2), "they wait for two more"
        with anyio.fail_after(30):
            await provider.entered.wait()
    assert provider.batches == [["a", "b"]]


async def test_a_full_batch_leaves_at_once() -> None:
    provider = Gate()
    service = embedder(provider, batch_size=2, batch_wait=1.0)
    async with running(service), anyio.create_task_group() as group:
        group.start_soon(service.embed, ["a"])
        await anyio.wait_all_tasks_blocked()
        assert (provider.batches, service.queued) == ([], 1), "it waits for one more"
        group.start_soon(service.embed, ["b"])
        await anyio.wait_all_tasks_blocked()
        assert provider.batches == [["a", "b"]], "with nothing but a clock left to wait for"


async def test_a_text_that_is_being_encoded_is_waited_for() -> None:
    provider = Gate()
    provider.open = anyio.Event()
    service = embedder(provider)
    async with running(service), anyio.create_task_group() as group:
        group.start_soon(service.embed, ["same"])
        await provider.entered.wait()
        group.start_soon(service.embed, ["same"])
        await anyio.lowlevel.checkpoint()
        provider.open.set()
    assert provider.batches == [["same"]]


async def test_what_was_encoded_once_comes_from_the_cache() -> None:
    provider = Gate()
    service = embedder(provider)
    async with running(service):
        first = await service.embed(["kept"])
        assert np.array_equal(await service.embed(["kept"]), first)
    assert provider.batches == [["kept"]]


@pytest.mark.parametrize("error", [UnavailableError("later", retry_after=3.0)])
async def test_a_failing_provider_refuses_its_callers_and_the_loop_goes_on(error: UnavailableError) -> None:
    provider = Gate()
    provider.error = error
    service = embedder(provider)
    async with running(service):
        with pytest.raises(UnavailableError, match="later") as caught:
            await service.embed(["a"])
        assert caught.value.retry_after == 3.0
        provider.error = None
        assert (await service.embed(["a"])).shape == (1, DIMENSION)


async def test_a_text_that_cannot_be_encoded_is_refused_alone() -> None:
    class Picky(Gate):
        async def encode_counted(self, texts: Sequence[str]) -> tuple[Matrix, list[int]]:
            if "poison" in texts:
                self.batches.append(list(texts))
                raise RuntimeError("defect")
            return await super().encode_counted(texts)

    provider = Picky()
    service = embedder(provider, batch_size=8)
    outcomes: dict[str, object] = {}

    async def call(text: str) -> None:
        try:
            outcomes[text] = (await service.embed([text])).shape
        except InternalError as caught:
            outcomes[text] = caught.code

    async with running(service), anyio.create_task_group() as group:
        for text in ["a", "b", "poison", "c", "d"]:
            group.start_soon(call, text)
    fine = (1, DIMENSION)
    assert outcomes == {"a": fine, "b": fine, "poison": "internal", "c": fine, "d": fine}
    assert sum("poison" in batch for batch in provider.batches) == 3
    assert service.queued == 0


async def test_a_defect_that_lets_nothing_through_answers_those_who_wait_and_reaches_the_supervisor() -> None:
    provider = Gate()
    provider.error = RuntimeError("defect")
    service = embedder(provider, batch_size=64)
    refused: list[str] = []

    async def call(text: str) -> None:
        try:
            await service.embed([text])
        except (UnavailableError, InternalError) as caught:
            refused.append(caught.code)

    async with anyio.create_task_group() as group:
        for n in range(FAULTS_IN_A_ROW + 5):
            group.start_soon(call, f"text {n}")
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(RuntimeError, match="defect"):
            await service.run()
    assert sorted(refused) == ["internal"] * FAULTS_IN_A_ROW + ["unavailable"] * 5
    provider.error = None
    async with running(service):
        assert (await service.embed(["a"])).shape == (1, DIMENSION)


async def test_stopping_refuses_those_who_wait() -> None:
    provider = Gate()
    provider.open = anyio.Event()
    service = embedder(provider)
    refused: list[str] = []

    async def call(text: str) -> None:
        try:
            await service.embed([text])
        except UnavailableError:
            refused.append(text)

    async with anyio.create_task_group() as callers, running(service):
        callers.start_soon(call, "encoding")
        await provider.entered.wait()
        callers.start_soon(call, "queued")
        await anyio.lowlevel.checkpoint()
        await anyio.lowlevel.checkpoint()
    assert sorted(refused) == ["encoding", "queued"]


async def test_a_text_that_nobody_waits_for_any_more_is_not_encoded() -> None:
    provider = Gate()
    provider.open = anyio.Event()
    service = embedder(provider)
    async with running(service), anyio.create_task_group() as group:
        group.start_soon(service.embed, ["first"])
        await provider.entered.wait()
        async with anyio.create_task_group() as leaving:
            leaving.start_soon(service.embed, ["abandoned"])
            while service.queued == 0:
                await anyio.lowlevel.checkpoint()
            leaving.cancel_scope.cancel()
        provider.open.set()
        await service.embed(["second"])
    assert provider.batches == [["first"], ["second"]]


async def test_the_queue_is_bounded_and_callers_beyond_it_wait_for_room() -> None:
    provider = Gate()
    provider.open = anyio.Event()
    service = embedder(provider)
    bound = 4 * PASSES_QUEUED
    async with running(service), anyio.create_task_group() as group:
        group.start_soon(service.embed, ["first"])
        await provider.entered.wait()
        group.start_soon(service.embed, [f"text {i}" for i in range(bound + 50)])
        while service.queued < bound:
            await anyio.lowlevel.checkpoint()
        for _ in range(5):
            await anyio.lowlevel.checkpoint()
        assert service.queued == bound
        provider.open.set()
    assert sum(len(batch) for batch in provider.batches) == bound + 51


async def test_tokens_are_counted_for_each_text_and_again_from_the_cache() -> None:
    service = embedder(HashingProvider(DIMENSION))
    assert service.counts_exactly
    async with running(service):
        for _ in range(2):
            rows, counts = await service.embed_counted(["one two", "three", "one two", "a b c d"])
            assert counts == [2, 1, 2, 4]
            assert (rows[0] == rows[2]).all()


async def test_where_the_provider_does_not_count_tokens_are_approximated() -> None:
    class Silent:
        model, dimension = "silent", DIMENSION

        async def start(self) -> None: ...

        async def close(self) -> None: ...

        async def encode(self, texts: Sequence[str]) -> Matrix:
            return HashingProvider(DIMENSION).encode_now(texts)

    service = embedder(Silent())
    assert not service.counts_exactly
    async with running(service):
        assert (await service.embed_counted(["ab", "abcd", "abcde", "üüü"]))[1] == [1, 1, 2, 2]


async def test_without_an_encoder_text_is_refused_for_good() -> None:
    service = embedder(NoProvider(DIMENSION))
    async with running(service):
        with pytest.raises(BadRequestError, match="no encoder"):
            await service.embed(["a"])


def test_the_cache_stays_within_its_bytes_and_drops_the_least_used() -> None:
    row = np.ones(4, dtype=np.float32)
    cache = TextCache(3 * (1 + row.nbytes + ENTRY_OVERHEAD))
    for text in "abc":
        cache.put(text, row)
    assert cache.get("a") is not None
    cache.put("d", row)
    assert cache.get("b") is None
    assert cache.get("a") is not None
    assert cache.bytes <= 3 * (1 + row.nbytes + ENTRY_OVERHEAD)
