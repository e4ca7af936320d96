"""The encoder on a CUDA device: what stands in for it, and how batches go through it. The device is a pretended one."""

from typing import Any

import anyio
import httpx
import msgspec
import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry

from kimera_stream.core.embedding import BatchingEmbedder, MiniLmProvider, ProviderChain, make_provider, remote
from kimera_stream.core.embedding.minilm import load_encoder
from kimera_stream.core.embedding.minilm_encoder import MiniLmEncoder
from kimera_stream.infrastructure.compute import ComputePlan, DeviceFailedError
from kimera_stream.infrastructure.settings import EmbeddingSettings
from kimera_stream.protocol.errors import UnavailableError
from tests.core.test_embedding_providers import OneThread
from tests.pretended_cuda import PretendedCuda, errors_of_a_device, pretended_cuda

__all__ = ["pretended_cuda"]

pytestmark = pytest.mark.anyio

TEXTS = ["one two three four five", "x", "a b c d", "a rather longer text than all the others are", "two words", "y z"]


def settings(**changes: Any) -> EmbeddingSettings:
    return EmbeddingSettings(**{"precision": "float32", "batch_size": 2, **changes})


@pytest.fixture(scope="module")
def exact() -> MiniLmEncoder:
    encoder = load_encoder(ComputePlan("cpu", "float32", 1), batch_size=2)
    assert isinstance(encoder, MiniLmEncoder)
    return encoder


@pytest.mark.parametrize("error", errors_of_a_device(), ids=lambda error: type(error).__name__)
async def test_a_device_that_fails_at_loading_is_replaced_by_the_cpu(
    pretended_cuda: PretendedCuda, exact: MiniLmEncoder, error: RuntimeError
) -> None:
    pretended_cuda.broken = error
    with pytest.raises(DeviceFailedError, match="embedding: the device failed"):
        await MiniLmProvider(settings(), OneThread()).start()
    chain = make_provider(settings(), OneThread())
    assert isinstance(chain, ProviderChain)
    await chain.start()
    np.testing.assert_allclose(await chain.encode(TEXTS), exact.encode(TEXTS), atol=1e-5)
    assert (chain.numbers["local"].failed, chain.numbers["cpu"].used) == (1, 1)


async def test_a_device_that_failed_for_long_is_loaded_anew_when_it_is_tried_again(
    pretended_cuda: PretendedCuda, exact: MiniLmEncoder
) -> None:
    provider = MiniLmProvider(settings(), OneThread())
    cpu = MiniLmProvider(settings(device="cpu"), OneThread())
    chain = ProviderChain([("local", provider), ("cpu", cpu)], threshold=2, seconds=0.01)
    await chain.start()
    loaded = provider._encoder
    assert isinstance(loaded, MiniLmEncoder)
    loaded._words = None  # type: ignore[assignment] # whatever lay on the device is lost with its context

    pretended_cuda.broken = errors_of_a_device()[0]
    wanted = exact.encode(TEXTS)
    for _ in range(2):
        np.testing.assert_allclose(await chain.encode(TEXTS), wanted, atol=1e-5)
    assert chain.numbers["local"].state == "opened"
    pretended_cuda.broken = None
    with anyio.fail_after(30):
        while chain.numbers["local"].used == 0:
            np.testing.assert_allclose(await chain.encode(TEXTS), wanted, atol=1e-5)
    assert provider._encoder is not loaded
    assert chain.numbers["local"].state == "closed"


async def test_a_service_stands_in_where_device_and_processor_fail(
    pretended_cuda: PretendedCuda, exact: MiniLmEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        rows = exact.encode(msgspec.json.decode(request.content)["input"])
        return httpx.Response(
            200,
            content=msgspec.json.encode(
                {"data": [{"index": i, "embedding": row.tolist()} for i, row in enumerate(rows)]}
            ),
        )

    client = httpx.AsyncClient
    monkeypatch.setattr(
        remote.httpx, "AsyncClient", lambda **each: client(**each | {"transport": httpx.MockTransport(answer)})
    )
    chain = make_provider(settings(fallback="http", url="http://models.example/v1"), OneThread())
    embedder = BatchingEmbedder(chain, settings(), CollectorRegistry())
    assert list(embedder.providers) == ["local", "cpu", "http"]
    await chain.start()
    pretended_cuda.broken = errors_of_a_device()[0]
    wanted = exact.encode(TEXTS)

    async def away(_provider: Any) -> None:
        raise UnavailableError("no weights")

    monkeypatch.setattr(MiniLmProvider, "start", away)
    np.testing.assert_allclose(await chain.encode(TEXTS), wanted, atol=1e-5)
    assert [each.failed for each in embedder.providers.values()] == [1, 1, 0]
    assert embedder.providers["http"].used == 1
    await chain.close()


@pytest.mark.parametrize(
    ("changes", "ways"),
    [
        ({}, ["local", "cpu"]),
        ({"fallback": "http"}, ["local", "cpu", "http"]),
        ({"device": "cpu", "fallback": "http"}, ["local", "http"]),
        ({"device": "cpu"}, None),
    ],
)
@pytest.mark.usefixtures("pretended_cuda")
def test_the_settings_choose_what_stands_in(changes: dict[str, str], ways: list[str] | None) -> None:
    made = make_provider(settings(url="http://models.example/v1", **changes), OneThread())
    assert (list(made.numbers) if isinstance(made, ProviderChain) else None) == ways


@pytest.mark.parametrize("precision", ["float32", "int16"])
async def test_only_the_share_of_memory_that_is_set_is_taken(pretended_cuda: PretendedCuda, precision: str) -> None:
    provider = MiniLmProvider(settings(gpu_memory_fraction=0.25, precision=precision), OneThread())
    await provider.start()
    assert provider.plan == ComputePlan("cuda", "float32", provider.plan.threads if provider.plan else 0)
    assert pretended_cuda.fractions == [0.25]


def test_the_next_batch_is_queued_before_the_one_that_runs_is_waited_for(
    pretended_cuda: PretendedCuda, exact: MiniLmEncoder
) -> None:
    encoder = load_encoder(ComputePlan("cuda", "float32", 1), batch_size=2)
    np.testing.assert_allclose(encoder.encode(TEXTS), exact.encode(TEXTS), atol=1e-5)
    assert pretended_cuda.told == ["queued 1", "queued 2", "waited 1", "queued 3", "waited 2", "waited 3"]
    assert pretended_cuda.pinned == 3, "each batch goes to the device from pinned memory"


def test_batches_are_made_by_length_and_rows_come_in_the_order_of_the_texts(
    exact: MiniLmEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = np.concatenate([exact.encode([text]) for text in TEXTS])
    forward, seen = exact._forward, []

    def watched(tokens: Any) -> Any:
        seen.append([len(each) for each in tokens])
        return forward(tokens)

    monkeypatch.setattr(exact, "_forward", watched)
    np.testing.assert_allclose(exact.encode(TEXTS), alone, atol=1e-5)
    lengths = [length for batch in seen for length in batch]
    assert lengths == sorted(lengths)
    assert lengths != [len(each.ids) for each in exact._tokenizer.encode_batch(TEXTS)]


def test_without_memory_in_the_middle_nothing_is_lost_or_done_twice(
    exact: MiniLmEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = exact.encode(TEXTS)
    forward, sizes = exact._forward, []

    def scarce(tokens: Any) -> Any:
        sizes.append(len(tokens))
        if len(sizes) > 1 and len(tokens) > 1:
            raise torch.OutOfMemoryError
        return forward(tokens)

    monkeypatch.setattr(exact, "_forward", scarce)
    np.testing.assert_allclose(exact.encode(TEXTS), wanted, atol=1e-5)
    assert sizes == [2, 2, 2, 1, 1, 1, 1], "tried once more after the batch ahead was taken, then halved"
