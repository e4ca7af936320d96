"""Providers that stand in for each other, and those that must not."""

from collections.abc import Sequence

import httpx
import msgspec
import numpy as np
import pytest

from kimera_stream.core.embedding import HashingProvider, ProviderChain
from kimera_stream.core.embedding.remote import RemoteProvider
from kimera_stream.core.interfaces import Matrix
from kimera_stream.infrastructure.settings import EmbeddingSettings
from kimera_stream.protocol.errors import UnavailableError

pytestmark = pytest.mark.anyio


class Faulty(HashingProvider):
    """The hashing encoder under another's name, which fails on demand and may turn its vectors."""

    def __init__(self, *, broken: bool = False, turned: bool = False, starts: bool = True) -> None:
        super().__init__(32)
        self.broken, self.turned, self.starts = broken, turned, starts
        self.started = 0
        self.encoded = 0

    async def start(self) -> None:
        self.started += 1
        if not self.starts:
            raise UnavailableError("no such device")

    async def encode_counted(self, texts: Sequence[str]) -> tuple[Matrix, list[int]]:
        self.encoded += 1
        if self.broken:
            raise UnavailableError("the device failed")
        rows, counts = await super().encode_counted(texts)
        return (np.ascontiguousarray(rows[:, ::-1]) if self.turned else rows), counts


async def test_another_takes_over_with_the_same_vectors_and_the_first_comes_back() -> None:
    first, second = Faulty(), Faulty()
    chain = ProviderChain([("cuda", first), ("cpu", second)], threshold=1, seconds=0.01)
    await chain.start()
    assert (second.started, second.encoded) == (0, 0), "it starts when it is needed"
    wanted = await chain.encode(["a", "b"])
    first.broken = True
    np.testing.assert_array_equal(await chain.encode(["a", "b"]), wanted)
    assert chain.numbers["cuda"].state == "opened"
    assert chain.numbers["cpu"].used == 1
    assert chain.counts_exactly
    assert (await chain.encode_counted(["a b", "c"]))[1] == [2, 1]
    first.broken = False
    for _ in range(10_000):
        before = first.encoded
        await chain.encode(["a"])
        if first.encoded > before:
            break
    assert chain.numbers["cuda"].state == "closed"


async def test_a_device_that_is_not_there_at_the_start_is_passed_over() -> None:
    chain = ProviderChain([("cuda", Faulty(starts=False)), ("cpu", Faulty())])
    await chain.start()
    assert (await chain.encode(["a"])).shape == (1, 32)
    with pytest.raises(UnavailableError, match="no such device"):
        await ProviderChain([("cuda", Faulty(starts=False)), ("cpu", Faulty(starts=False))]).start()


async def test_a_stand_in_with_other_vectors_is_refused_for_good() -> None:
    first, impostor = Faulty(), Faulty(turned=True)
    chain = ProviderChain([("cuda", first), ("http", impostor)], threshold=1)
    await chain.start()
    first.broken = True
    for _ in range(2):
        with pytest.raises(UnavailableError):
            await chain.encode(["a"])
    assert impostor.encoded == 1, "only the probe"
    assert chain.numbers["http"].used == 0


def test_providers_of_different_models_cannot_be_chained() -> None:
    with pytest.raises(ValueError, match="different models"):
        ProviderChain([("one", HashingProvider(32)), ("two", HashingProvider(64))])
    remote = RemoteProvider(EmbeddingSettings(url="http://models.example/v1", dimension=32))
    with pytest.raises(ValueError, match="different models"):
        ProviderChain([("one", HashingProvider(32)), ("two", remote)])


async def test_a_service_of_the_same_model_stands_in() -> None:
    twin = HashingProvider(32)

    def answer(request: httpx.Request) -> httpx.Response:
        texts = msgspec.json.decode(request.content)["input"]
        rows = [{"index": i, "embedding": row.tolist()} for i, row in enumerate(twin.encode_now(texts))]
        return httpx.Response(200, content=msgspec.json.encode({"data": rows}))

    settings = EmbeddingSettings(url="http://models.example/v1", dimension=32)
    first = Faulty()
    remote = RemoteProvider(settings, transport=httpx.MockTransport(answer), serves=first.model)
    chain = ProviderChain([("local", first), ("http", remote)])
    await chain.start()
    first.broken = True
    np.testing.assert_allclose(await chain.encode(["a"]), twin.encode_now(["a"]), atol=1e-6)
    await chain.close()
