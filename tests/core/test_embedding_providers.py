"""The providers: the packaged encoder, the one without weights, and the one behind HTTP."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import anyio.to_thread
import httpx
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from kimera_stream.core.embedding import BatchingEmbedder, HashingProvider, MiniLmProvider, make_provider
from kimera_stream.core.embedding.minilm import load_encoder, model_path
from kimera_stream.core.embedding.provider import approximate_tokens
from kimera_stream.core.embedding.remote import ATTEMPTS, BREAKER_THRESHOLD, RemoteProvider
from kimera_stream.infrastructure.compute import ComputePlan, plan_compute, processor_has_bfloat16
from kimera_stream.infrastructure.settings import EmbeddingSettings
from kimera_stream.kernels import transformer
from kimera_stream.protocol.errors import UnavailableError

T = TypeVar("T")
TEXTS = [
    "The door is open.",
    "db-1 has been down since 14:20 because of a full disk, and nobody has noticed yet.",
    "x",
    "Der Fluss führt Hochwasser. " * 40,
    "The door is closed.",
]


class OneThread:
    """``Threads`` without limits."""

    async def run(self, purpose: str, fn: Callable[..., T], *args: Any) -> T:
        return await anyio.to_thread.run_sync(fn, *args)


# -- hashing -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.text(max_size=60), max_size=5))
def test_hashing_gives_finite_unit_rows_for_any_text(texts: list[str]) -> None:
    rows = HashingProvider(32).encode_now(texts)
    assert rows.shape == (len(texts), 32)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


def test_hashing_is_the_same_in_every_process() -> None:
    program = (
        "from kimera_stream.core.embedding.hashing import HashingProvider as H;"
        "print(H(64).encode_now(['The door is open.']).tobytes().hex())"
    )
    other = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert (
        other.stdout.strip().splitlines()[-1] == HashingProvider(64).encode_now(["The door is open."]).tobytes().hex()
    )


def test_hashing_puts_related_texts_nearer_than_unrelated_ones() -> None:
    a, b, c = HashingProvider(256).encode_now(
        ["The red pump in hall 3 stopped.", "In hall 3 the red pumps are stopping.", "Paris is the capital of France."]
    )
    assert a @ b > 0.5 > 0.2 > a @ c


# -- the packaged encoder ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact() -> Any:
    import torch

    torch.set_num_threads(1)
    from kimera_stream.core.embedding.minilm_encoder import MiniLmEncoder

    return MiniLmEncoder(model_path(), ComputePlan("cpu", "float32", 1), batch_size=2)


@pytest.mark.timeout(600)  # the import alone takes minutes where the processors are busy
def test_the_encoder_gives_what_sentence_transformers_gives(exact: Any) -> None:
    from sentence_transformers import SentenceTransformer

    reference = SentenceTransformer(str(model_path()), device="cpu", local_files_only=True)
    wanted = reference.encode(TEXTS, normalize_embeddings=True)
    assert (exact.encode(TEXTS) * wanted).sum(axis=1).min() > 0.99999


def test_out_of_memory_halves_the_batch_and_goes_on(exact: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    wanted, forward, sizes = exact.encode(TEXTS), exact._forward, []

    def scarce(tokens: Any) -> Any:
        sizes.append(len(tokens))
        if len(tokens) > 1:
            raise torch.OutOfMemoryError
        return forward(tokens)

    monkeypatch.setattr(exact, "_forward", scarce)
    np.testing.assert_allclose(exact.encode(TEXTS), wanted, atol=1e-5)
    assert sizes == [2, *[1] * len(TEXTS)]

    def none(tokens: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(exact, "_forward", none)
    with pytest.raises(UnavailableError, match="single text"):
        exact.encode(TEXTS)


@pytest.mark.skipif(not transformer.variants(), reason="no transformer in C on this processor")
def test_integers_stay_within_a_thousandth_of_float32(exact: Any) -> None:
    integers = load_encoder(ComputePlan("cpu", "int16", 2))
    rows = integers.encode(TEXTS)
    assert (exact.encode(TEXTS) * rows).sum(axis=1).min() >= 0.9999
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(integers.encode(TEXTS[::-1]), rows[::-1])
    assert integers.encode([]).shape == (0, 384)
    counts = integers.encode_counted(TEXTS)[1]
    assert counts == exact.encode_counted(TEXTS)[1]
    assert min(counts) > 2, "the two that frame a text count"


@pytest.mark.skipif(not transformer.variants(), reason="no transformer in C on this processor")
def test_integers_need_no_torch() -> None:
    program = (
        "import sys\n"
        "from kimera_stream.core.embedding.minilm import load_encoder\n"
        "from kimera_stream.engines.verifier_runtime import VerifierRuntime\n"
        "from kimera_stream.infrastructure.compute import plan_compute\n"
        "load_encoder(plan_compute('cpu', 'int16')).encode(['a'])\n"
        "VerifierRuntime.load(None, 'cpu', 'int16', 128, 32, False).judge([('a', 'b')])\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip().splitlines()[-1] == "False"


@pytest.mark.skipif(not processor_has_bfloat16(), reason="this processor has no bfloat16 instructions")
def test_bfloat16_stays_within_a_thousandth_of_float32(exact: Any) -> None:
    from kimera_stream.core.embedding.minilm_encoder import MiniLmEncoder

    half = MiniLmEncoder(model_path(), ComputePlan("cpu", "bfloat16", 1))
    assert (exact.encode(TEXTS) * half.encode(TEXTS)).sum(axis=1).min() >= 0.999


def test_a_text_is_encoded_alike_alone_and_among_others(exact: Any) -> None:
    together = exact.encode(TEXTS)
    alone = np.concatenate([exact.encode([text]) for text in TEXTS])
    assert np.allclose(together, alone, atol=1e-5)
    assert exact.encode([]).shape == (0, 384)


@pytest.mark.anyio
async def test_the_provider_refuses_until_it_is_loaded_and_after_it_was_closed() -> None:
    provider = MiniLmProvider(EmbeddingSettings(device="cpu"), OneThread())
    with pytest.raises(UnavailableError, match="loading"):
        await provider.encode(["a"])
    await provider.start()
    assert provider.plan is not None
    assert provider.plan.device == "cpu"
    assert (await provider.encode(["a"])).shape == (1, provider.dimension)
    await provider.close()
    with pytest.raises(UnavailableError):
        await provider.encode(["a"])


def test_cuda_asked_for_and_absent_is_refused_with_the_next_step() -> None:
    import torch

    if torch.cuda.is_available():
        assert plan_compute("cuda", "auto").device == "cuda"
    else:
        with pytest.raises(UnavailableError, match="KIMERA_EMBEDDING__DEVICE"):
            plan_compute("cuda", "auto")


@pytest.mark.parametrize(
    ("provider", "model"),
    [
        ("hashing", "hashing-1-8"),
        ("none", "none-8"),
        ("minilm", "all-MiniLM-L6-v2"),
        ("http", "default@models.example"),
    ],
)
def test_the_setting_chooses_the_provider(provider: Any, model: str) -> None:
    settings = EmbeddingSettings(provider=provider, dimension=8, url="http://models.example/v1")
    assert make_provider(settings, OneThread()).model == model


# -- behind HTTP -------------------------------------------------------------------------------------------------------


def remote(answer: Callable[[httpx.Request], httpx.Response], **settings: Any) -> RemoteProvider:
    chosen = EmbeddingSettings(
        **{"provider": "http", "dimension": 3, "url": "http://models.example/v1", "api_key": "secret", **settings}
    )
    return RemoteProvider(chosen, transport=httpx.MockTransport(answer), wait=0.001)


def embeddings(request: httpx.Request, dimension: int = 3) -> httpx.Response:
    texts = msgspec.json.decode(request.content)["input"]
    rows = [{"index": i, "embedding": [float(len(text))] + [1.0] * (dimension - 1)} for i, text in enumerate(texts)]
    return httpx.Response(200, json={"data": rows[::-1]})


@pytest.mark.anyio
async def test_remote_rows_are_put_in_order_and_scaled_and_requests_carry_key_and_model() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return embeddings(request)

    provider = remote(answer, batch_size=2, model="m")
    await provider.start()
    rows = await provider.encode(["a", "bbbb", "cc"])
    assert np.allclose(np.linalg.norm(rows, axis=1), 1)
    assert np.allclose(rows[:, 0] / rows[:, 1], [1, 4, 2])
    assert len(seen) == 2
    assert str(seen[0].url) == "http://models.example/v1/embeddings"
    assert seen[0].headers["authorization"] == "Bearer secret"
    assert msgspec.json.decode(seen[0].content)["model"] == "m"
    await provider.close()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ({"prompt_tokens": 10, "total_tokens": 10}, [1, 9, 10]),
        ({"prompt_tokens": 0}, [0, 0, 0]),
        ({"prompt_tokens": None}, [1, 2, 1]),
        ({"prompt_tokens": -3}, [1, 2, 1]),
        ({"prompt_tokens": 2**32}, [1, 2, 1]),
        ({"prompt_tokens": True}, [1, 2, 1]),
        ("none", [1, 2, 1]),
        (None, [1, 2, 1]),
    ],
)
async def test_the_tokens_are_those_that_the_service_counted(usage: Any, counts: list[int]) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=embeddings(request).json() | {"usage": usage})

    provider = remote(answer, batch_size=2)
    service = BatchingEmbedder(provider, EmbeddingSettings(batch_wait=0.0), CollectorRegistry())
    assert not service.counts_exactly, "a text's share of the sum goes by length"
    assert (await provider.encode_counted(["a", "bbbbb", "cc"]))[1] == counts
    assert service.providers["http"].used == 2


def test_what_is_known_of_all_texts_together_is_shared_out_and_none_of_it_lost() -> None:
    texts = ["a", "bb" * 7, "", "ü" * 5, "c" * 100]
    for total in (0, 1, 2, 57, 1_000):
        counts = approximate_tokens(texts, total)
        assert sum(counts) == total
        assert min(counts) == counts[2] == 0
    assert approximate_tokens(["", ""], 5) == [0, 0]


@pytest.mark.anyio
async def test_a_remote_hiccup_is_retried() -> None:
    answers = iter([503, 429, 200])
    provider = remote(lambda request: embeddings(request) if (code := next(answers)) == 200 else httpx.Response(code))
    assert (await provider.encode(["a"])).shape == (1, 3)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda request: embeddings(request, dimension=5), "KIMERA_EMBEDDING__DIMENSION"),
        (lambda request: httpx.Response(401), "status 401"),
        (lambda request: httpx.Response(200, json={"data": []}), "asked for 1"),
        (lambda request: httpx.Response(200, text="<html>"), "something else"),
        (lambda request: httpx.Response(200, json={"data": [{"index": 0, "embedding": [0, 0, 0]}]}), "no direction"),
    ],
)
async def test_remote_nonsense_is_unavailable_and_says_why(
    answer: Callable[[httpx.Request], httpx.Response], message: str
) -> None:
    with pytest.raises(UnavailableError, match=message):
        await remote(answer).encode(["a"])


@pytest.mark.anyio
async def test_a_remote_that_keeps_failing_is_left_alone_for_a_while() -> None:
    calls = 0

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal calls
        calls += 1
        raise httpx.ConnectError("refused")

    provider = remote(answer)
    for _ in range(BREAKER_THRESHOLD):
        with pytest.raises(UnavailableError, match="could not be reached"):
            await provider.encode(["a"])
    assert provider.numbers["http"].state == "opened"
    assert provider.numbers["http"].failed == BREAKER_THRESHOLD
    with pytest.raises(UnavailableError, match="left alone") as caught:
        await provider.encode(["a"])
    assert caught.value.retry_after
    assert calls == BREAKER_THRESHOLD * ATTEMPTS


@pytest.mark.anyio
async def test_an_address_that_is_none_stops_the_start() -> None:
    with pytest.raises(UnavailableError, match="KIMERA_EMBEDDING__URL"):
        await remote(embeddings, url="models.example").start()
