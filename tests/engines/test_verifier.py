"""The verifier as callers see it, with the shipped weights."""

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import anyio
import anyio.to_thread
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kimera_stream.engines.verifier import MODEL_NAME, CrossEncoderVerifier, Verifier, weights_available
from kimera_stream.engines.verifier_marks import GREATER, LESS, MATCHED, NONE
from kimera_stream.engines.verifier_pairs import REMEMBERED_BYTES, PairTokenizer
from kimera_stream.engines.verifier_runtime import (
    DOUBT,
    Calibration,
    VerifierRuntime,
    margin,
    same_words,
    shipped_weights,
    twice_read,
)
from kimera_stream.engines.verifier_torch import TorchNetwork
from kimera_stream.infrastructure import compute
from kimera_stream.kernels import transformer
from kimera_stream.protocol.errors import UnavailableError
from tests.pretended_cuda import PretendedCuda, errors_of_a_device, pretended_cuda

__all__ = ["pretended_cuda"]

T = TypeVar("T")

PAIRS = [
    ("The checkout API is down in eu-west-1.", "Checkout API in eu-west-1 is up and serving requests."),
    ("The checkout API is down in eu-west-1.", "The checkout API in eu-west-1 is unavailable."),
    ("The checkout API is down in eu-west-1.", "The search API is up in us-east-2."),
    ("Full-time staff get 25 days of paid leave.", "Full-time staff get 20 days of paid leave."),
    ("Full-time staff get 25 days of paid leave.", "Full-time staff get twenty-five days of paid leave."),
    ("The backup takes 2 hours.", "The backup takes 120 minutes."),
    ("The door is locked.", "The door is not locked."),
    ("x", "y"),
]


class Workers:
    """Threads as the resource service gives them, counting what they ran."""

    def __init__(self) -> None:
        self.runs: list[int] = []
        self.gate: anyio.Event | None = None

    async def run(self, purpose: Literal["encode", "score", "io"], fn: Callable[..., T], *args: Any) -> T:
        assert purpose == "score"
        if args:
            self.runs.append(len(args[0]))
        if self.gate is not None:
            await self.gate.wait()
        return await anyio.to_thread.run_sync(fn, *args)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def runtime() -> VerifierRuntime:
    return VerifierRuntime.load(None, "cpu", "float32", 128, 8)


@pytest.fixture
def shared(runtime: VerifierRuntime, monkeypatch: pytest.MonkeyPatch) -> VerifierRuntime:
    """One loaded model for all tests that do not test loading."""
    monkeypatch.setattr(VerifierRuntime, "load", classmethod(lambda *_: runtime))
    return runtime


def test_the_package_carries_weights_small_enough_to_ship() -> None:
    assert weights_available()
    path = shipped_weights()
    assert 1_000_000 < path.stat().st_size <= 25 * 1024 * 1024
    card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert card["name"] == MODEL_NAME
    points = card["operating_points"]
    assert 0 < points["sensitive"] <= points["balanced"] <= points["precise"] < 1


def test_it_tells_contradictions_from_agreement_and_from_other_things(runtime: VerifierRuntime) -> None:
    scores = runtime.judge(PAIRS)
    balanced = runtime.operating_points["balanced"]
    flagged = [bool(score >= balanced) for score in scores[:7]]
    assert flagged == [True, False, False, True, False, False, True]


def test_what_is_said_again_contradicts_nothing(runtime: VerifierRuntime) -> None:
    again = [
        ("The outage started at 09:12 and hit all regions.",) * 2,
        ("Bus 7 is late.", "bus 7 is late!"),
        ("Staff get 25 days of leave.", "Staff get twenty-five days of leave"),
    ]
    np.testing.assert_array_equal(runtime.judge(again), np.zeros(3, dtype=np.float32))
    assert not same_words("The door is locked.", "The door is locked?")
    assert not same_words("Bus 7 is late.", "Bus 8 is late.")


def test_scores_are_probabilities_and_repeatable(runtime: VerifierRuntime) -> None:
    first, again = runtime.judge(PAIRS), runtime.judge(PAIRS)
    assert first.dtype == np.float32
    assert first.shape == (len(PAIRS),)
    assert ((first >= 0) & (first <= 1)).all()
    np.testing.assert_array_equal(first, again)


def test_company_does_not_change_a_score(runtime: VerifierRuntime) -> None:
    together = runtime.judge(PAIRS)
    alone = np.concatenate([runtime.judge([pair]) for pair in PAIRS])
    np.testing.assert_allclose(together, alone, atol=2e-3)
    backwards = runtime.judge(PAIRS[::-1])[::-1]
    np.testing.assert_allclose(together, backwards, atol=2e-3)


def test_half_precision_says_nearly_the_same(runtime: VerifierRuntime) -> None:
    half = VerifierRuntime.load(None, "cpu", "bfloat16", 128, 8)
    np.testing.assert_allclose(half.judge(PAIRS), runtime.judge(PAIRS), atol=0.08)


@pytest.mark.skipif(not transformer.variants(), reason="no transformer in C on this processor")
def test_integers_say_the_same(runtime: VerifierRuntime) -> None:
    integers = VerifierRuntime.load(None, "cpu", "int16", 128, 8)
    assert (integers.device, integers.precision) == ("cpu", "int16")
    texts = sorted({text for pair in PAIRS for text in pair})
    pairs = [(a, b) for a in texts for b in texts] + [("word " * 300, "the gate is shut")]
    np.testing.assert_allclose(integers.judge(pairs), runtime.judge(pairs), atol=0.01)
    assert integers.judge([]).shape == (0,)


def test_what_one_order_leaves_in_doubt_is_read_in_both(runtime: VerifierRuntime) -> None:
    texts = sorted({text for pair in PAIRS for text in pair})
    pairs = [(a, b) for a in texts for b in texts if not same_words(a, b)]
    straight = runtime.calibration(runtime.logits(pairs))
    turned = runtime.calibration(runtime.logits([(b, a) for a, b in pairs]))
    found = runtime.judge(pairs)
    sure = (straight < DOUBT[0]) | (straight > DOUBT[-1])
    split = (straight >= DOUBT[1]) & (straight <= DOUBT[2])
    assert sure.any()
    assert split.any()
    np.testing.assert_allclose(found[sure], straight[sure], atol=1e-5)
    np.testing.assert_allclose(found[split], ((straight + turned) / 2)[split], atol=1e-5)


@given(st.lists(st.floats(0, 1, width=32), max_size=20), st.integers(0, 2**32 - 1))
def test_a_second_reading_lies_between_both_and_moves_with_the_first(scores: list[float], seed: int) -> None:
    """Close to the band's edge it counts for next to nothing, so that rounding cannot make a score jump."""
    first = np.array(scores, dtype=np.float32)
    second = np.random.default_rng(seed).random(len(first), dtype=np.float32)
    asked: list[int] = []

    def turned(doubtful: Any) -> Any:
        asked.extend(doubtful.tolist())
        return second[doubtful]

    found = twice_read(first, turned)
    assert (found >= np.minimum(first, second) - 1e-6).all()
    assert (found <= np.maximum(first, second) + 1e-6).all()
    assert asked == [i for i, score in enumerate(first.tolist()) if DOUBT[0] < score < DOUBT[-1]]
    nudged = twice_read(np.clip(first + np.float32(1e-3), 0, 1), lambda doubtful: second[doubtful])
    assert np.abs(nudged - found).max(initial=0) < 0.02


@pytest.mark.parametrize("text", ["", " ", "word " * 5_000, "☃" * 300, "\x00", "[SEP] [CLS] [PAD]"])
def test_odd_texts_get_a_score(runtime: VerifierRuntime, text: str) -> None:
    scores = runtime.judge([(text, "The door is locked."), ("The door is locked.", text), (text, text)])
    assert np.isfinite(scores).all()


def test_running_out_of_memory_halves_the_batch_and_goes_on(
    runtime: VerifierRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    forward = TorchNetwork.forward

    def scarce(self: TorchNetwork, encoded: Any) -> Any:
        sizes.append(len(encoded))
        if len(encoded) > 2:
            raise torch.OutOfMemoryError
        return forward(self, encoded)

    expected = runtime.judge(PAIRS)
    monkeypatch.setattr(TorchNetwork, "forward", scarce)
    np.testing.assert_allclose(runtime.judge(PAIRS), expected, atol=2e-3)
    assert sizes[:3] == [8, 4, 2]

    def none(self: TorchNetwork, encoded: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(TorchNetwork, "forward", none)
    with pytest.raises(UnavailableError, match="single pair"):
        runtime.judge(PAIRS)


def test_a_remembered_statement_is_the_same_and_few_are_remembered() -> None:
    tokenizer = PairTokenizer(64)
    texts = [f"valve {number} is shut" for number in range(12_000)]
    first = tokenizer.statements(texts[:3])
    assert tokenizer.statements([texts[2], texts[0], "new", texts[0]])[:2] == [first[2], first[0]]
    assert tokenizer.statements(texts)[: len(first)] == first
    assert 4_000 < len(tokenizer._known) < 12_000
    assert tokenizer._known.bytes <= REMEMBERED_BYTES


def test_the_longer_statement_is_cut_and_the_input_never_too_long() -> None:
    tokenizer = PairTokenizer(32)
    long, short = tokenizer.statements(["gate " * 100, "the gate is shut"])
    for first, second in ((long, short), (short, long), (long, long), (short, short)):
        pair = tokenizer.pair(first, second)
        assert len(pair.tokens) == len(pair.segments) == len(pair.flags) <= 32
        assert pair.tokens.count(102) == 2
    assert set(short.tokens) <= set(tokenizer.pair(long, short).tokens)
    assert set(short.tokens) <= set(tokenizer.pair(short, long).tokens)


def test_tokens_are_flagged_by_whole_words() -> None:
    tokenizer = PairTokenizer(64)
    pair = tokenizer.pair(*tokenizer.statements(["valve 3 is shut", "valve 33 is shut"]))
    flags = dict(zip(pair.tokens, pair.flags, strict=True))
    three, thirty_three = tokenizer.statements(["3", "33"])
    assert flags[three.tokens[0]] == LESS
    assert flags[thirty_three.tokens[0]] == GREATER
    assert sorted(set(pair.flags)) == [NONE, MATCHED, GREATER, LESS]


def test_calibration_keeps_the_order_and_stays_in_bounds() -> None:
    logits = np.array([[-50, 3, 1], [0, 0, 0], [1, 0, 0], [40, -3, 2]], dtype=np.float32)
    scores = Calibration(1.3, -0.2)(logits)
    assert (np.diff(scores) > 0).all()
    assert ((scores >= 0) & (scores <= 1)).all()
    assert margin(logits)[1] == pytest.approx(-np.log(2))


@pytest.mark.anyio
@pytest.mark.usefixtures("shared")
async def test_it_loads_by_itself_and_says_its_name() -> None:
    workers = Workers()
    verifier: Verifier = CrossEncoderVerifier(workers)
    assert isinstance(verifier, Verifier)
    assert verifier.name == MODEL_NAME
    scores = await verifier.judge(PAIRS)
    assert scores.shape == (len(PAIRS),)
    assert (await verifier.judge([])).shape == (0,)
    assert workers.runs == [len(PAIRS)]


@pytest.mark.anyio
async def test_callers_who_wait_are_judged_together(shared: VerifierRuntime) -> None:
    workers = Workers()
    verifier = CrossEncoderVerifier(workers, round_size=7)
    await verifier.start()
    workers.gate = anyio.Event()
    results: dict[int, Any] = {}

    async def ask(number: int) -> None:
        results[number] = await verifier.judge([PAIRS[number]] * (number + 1))

    async with anyio.create_task_group() as group:
        for number in range(4):
            group.start_soon(ask, number)
            await anyio.wait_all_tasks_blocked()
        assert verifier.waiting == 2 + 3 + 4
        workers.gate.set()
    assert workers.runs == [1, 2 + 3, 4]  # four more would not have fitted into seven
    assert verifier.judged == 10
    assert verifier.waiting == 0
    for number, result in results.items():
        np.testing.assert_allclose(result, shared.judge([PAIRS[number]] * (number + 1)), atol=2e-3)


@pytest.mark.anyio
@pytest.mark.usefixtures("shared")
async def test_a_caller_who_leaves_takes_nobody_along() -> None:
    workers = Workers()
    verifier = CrossEncoderVerifier(workers)
    await verifier.start()
    workers.gate = anyio.Event()
    results: list[Any] = []

    async def ask() -> None:
        results.append(await verifier.judge(PAIRS[:2]))

    async with anyio.create_task_group() as group:
        leader, waiter = anyio.CancelScope(), anyio.CancelScope()

        async def leave(scope: anyio.CancelScope) -> None:
            with scope:
                await ask()

        group.start_soon(leave, leader)
        await anyio.wait_all_tasks_blocked()
        group.start_soon(leave, waiter)
        group.start_soon(ask)
        await anyio.wait_all_tasks_blocked()
        waiter.cancel()
        leader.cancel()
        await anyio.wait_all_tasks_blocked()
        assert verifier.waiting == 2 or results == []
        workers.gate.set()
    assert len(results) == 1
    assert verifier.waiting == 0


@pytest.mark.anyio
async def test_a_failure_hits_only_the_round_it_is_in(shared: VerifierRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers()
    verifier = CrossEncoderVerifier(workers)
    await verifier.start()
    judge = VerifierRuntime.judge
    poison = ("poison", "poison")

    def picky(self: VerifierRuntime, pairs: Any) -> Any:
        if poison in pairs:
            raise UnavailableError("verifier: no memory")
        return judge(self, pairs)

    monkeypatch.setattr(VerifierRuntime, "judge", picky)
    workers.gate = anyio.Event()
    outcomes: dict[str, Any] = {}

    async def ask(name: str, pairs: list[tuple[str, str]]) -> None:
        try:
            outcomes[name] = len(await verifier.judge(pairs))
        except UnavailableError as error:
            outcomes[name] = error.code

    async with anyio.create_task_group() as group:
        group.start_soon(ask, "first", PAIRS[:1])
        await anyio.wait_all_tasks_blocked()
        group.start_soon(ask, "bad", [poison])
        await anyio.wait_all_tasks_blocked()
        group.start_soon(ask, "good", PAIRS[:3])
        await anyio.wait_all_tasks_blocked()
        workers.gate.set()
    assert outcomes == {"first": 1, "bad": "unavailable", "good": 3}
    assert shared.judge(PAIRS[:1]).shape == (1,)


class FailingDevice:
    """A network on CUDA that fails while ``broken``, as torch does."""

    device = "cuda"

    def __init__(self, *, broken: bool = True) -> None:
        self.broken = broken
        self.asked = 0

    def logits(self, pairs: Any) -> Any:
        self.asked += 1
        try:
            if self.broken:
                raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
        except RuntimeError as error:
            raise compute.device_failure("verifier", self.device, error) from error
        return np.zeros((len(pairs), 3), dtype=np.float32)


@pytest.fixture
def failing(runtime: VerifierRuntime, monkeypatch: pytest.MonkeyPatch) -> FailingDevice:
    """The network of the device that a verifier loads now."""
    card = {
        "name": runtime.name,
        "calibration": {"scale": runtime.calibration.scale, "shift": runtime.calibration.shift},
        "operating_points": runtime.operating_points,
    }
    network = FailingDevice()
    on_device = VerifierRuntime(network, card, precision="bfloat16")
    monkeypatch.setattr(
        VerifierRuntime, "load", classmethod(lambda _cls, _w, device, *_: runtime if device == "cpu" else on_device)
    )
    return network


@pytest.mark.anyio
async def test_a_failing_device_is_replaced_by_the_cpu_and_comes_back(
    runtime: VerifierRuntime, failing: FailingDevice
) -> None:
    verifier = CrossEncoderVerifier(Workers(), device_pause=0.01)
    await verifier.start()
    for _ in range(5):
        np.testing.assert_allclose(await verifier.judge(PAIRS), runtime.judge(PAIRS), atol=2e-3)
    assert verifier.devices["cuda"].failed >= 3
    assert verifier.devices["cpu"].used == 5
    failing.broken = False
    with anyio.fail_after(30):
        while not verifier.devices["cuda"].used:
            await verifier.judge(PAIRS[:1])
    assert verifier.devices["cuda"].state == "closed"


@pytest.mark.anyio
async def test_a_device_that_failed_for_long_is_loaded_anew_when_it_is_tried_again(
    runtime: VerifierRuntime, failing: FailingDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, made = failing, []
    load = VerifierRuntime.load

    def anew(_cls: Any, _weights: Any, device: str, *rest: Any) -> VerifierRuntime:
        if device == "cpu":
            return runtime
        made.append(device)
        if len(made) > 1:  # what is made now works; what was made first stays dead
            monkeypatch.setattr(dead, "logits", lambda _: pytest.fail("the dead one was asked again"))
            return VerifierRuntime(
                FailingDevice(broken=False),
                {"name": "n", "calibration": {"scale": 1, "shift": 0}, "operating_points": {}},
                precision="bfloat16",
            )
        return load(None, "auto", "auto", 128, 8, False)

    monkeypatch.setattr(VerifierRuntime, "load", classmethod(anew))
    verifier = CrossEncoderVerifier(Workers(), device_pause=0.01)
    await verifier.start()
    assert list(verifier.devices) == ["cuda", "cpu"], "told before anything fails"
    with anyio.fail_after(30):
        while not verifier.devices["cuda"].used:
            await verifier.judge(PAIRS[:1])
    assert made == ["auto", "cuda"]
    assert dead.asked == 3, "as often as opens the breaker"


@pytest.mark.anyio
async def test_what_lay_on_a_device_is_let_go_before_it_is_loaded_anew(
    runtime: VerifierRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[VerifierRuntime]] = []
    alive: list[int] = []

    def anew(_cls: Any, _weights: Any, device: str, *_: Any) -> VerifierRuntime:
        if device == "cpu":
            return runtime
        gc.collect()
        alive.append(sum(each() is not None for each in made))
        card = {"name": "n", "calibration": {"scale": 1, "shift": 0}, "operating_points": {"balanced": 0.5}}
        loaded = VerifierRuntime(FailingDevice(broken=len(made) < 2), card, precision="bfloat16")
        made.append(weakref.ref(loaded))
        return loaded

    monkeypatch.setattr(VerifierRuntime, "load", classmethod(anew))
    verifier = CrossEncoderVerifier(Workers(), device_pause=0.01)
    await verifier.start()
    with anyio.fail_after(30):
        while not verifier.devices["cuda"].used:
            await verifier.judge(PAIRS[:1])
    assert alive == [0, 0, 0]
    assert (verifier.name, verifier.operating_points) == ("n", {"balanced": 0.5})


@pytest.mark.anyio
@pytest.mark.parametrize("error", errors_of_a_device(), ids=lambda error: type(error).__name__)
async def test_a_device_that_fails_at_loading_is_replaced_by_the_cpu_and_comes_back(
    runtime: VerifierRuntime, pretended_cuda: PretendedCuda, error: RuntimeError
) -> None:
    pretended_cuda.broken = error
    verifier = CrossEncoderVerifier(Workers(), precision="float32", memory_fraction=0.25, device_pause=0.01)
    await verifier.start()
    wanted = runtime.judge(PAIRS)
    np.testing.assert_allclose(await verifier.judge(PAIRS), wanted, atol=2e-3)
    assert (verifier.devices["cuda"].failed, verifier.devices["cpu"].used) == (1, 1)
    assert verifier.operating_points == runtime.operating_points
    pretended_cuda.broken = None
    np.testing.assert_allclose(await verifier.judge(PAIRS), wanted, atol=2e-3)
    assert verifier.devices["cuda"].used == 1
    assert pretended_cuda.fractions == [0.25] * 3, "the share of memory that is set, whenever it is loaded"


def test_the_next_batch_is_queued_before_the_one_that_runs_is_waited_for(
    runtime: VerifierRuntime, pretended_cuda: PretendedCuda
) -> None:
    on_device = VerifierRuntime.load(None, "cuda", "float32", 128, 3)
    assert on_device.device == "cuda"
    np.testing.assert_allclose(on_device.logits(PAIRS), runtime.logits(PAIRS), atol=0.02)
    assert pretended_cuda.told == ["queued 1", "queued 2", "waited 1", "queued 3", "waited 2", "waited 3"]
    assert pretended_cuda.pinned == 3, "each batch goes to the device from pinned memory"


def test_batches_are_made_by_length_and_scores_come_in_the_order_of_the_pairs(
    runtime: VerifierRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = np.concatenate([runtime.logits([pair]) for pair in PAIRS])
    forward, seen = TorchNetwork.forward, []

    def watched(self: TorchNetwork, encoded: Any) -> Any:
        seen.extend(len(pair.tokens) for pair in encoded)
        return forward(self, encoded)

    monkeypatch.setattr(TorchNetwork, "forward", watched)
    np.testing.assert_allclose(runtime.logits(PAIRS), alone, atol=0.02)
    assert seen == sorted(seen)
    assert seen != [len(pair.tokens) for pair in PairTokenizer(128).pairs(PAIRS)]


def test_a_defect_on_the_cpu_is_no_failing_device() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        compute.device_failure("verifier", "cpu", RuntimeError("shapes do not fit"))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_cuda_it_says_the_same(runtime: VerifierRuntime) -> None:
    device = VerifierRuntime.load(None, "cuda", "float32", 128, 8, 0.5)
    assert device.device == "cuda"
    np.testing.assert_allclose(device.judge(PAIRS), runtime.judge(PAIRS), atol=0.01)


@pytest.mark.anyio
async def test_missing_or_wrong_weights_are_said_clearly(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"scoring\.verifier"):
        await CrossEncoderVerifier(Workers(), weights=tmp_path / "none.safetensors").start()
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    (tmp_path / "bad.json").write_text('{"name": "bad"}')
    with pytest.raises(UnavailableError, match="verifier"):
        await CrossEncoderVerifier(Workers(), weights=tmp_path / "bad.safetensors").start()


@pytest.mark.anyio
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
async def test_cuda_asked_for_and_not_there_is_said_clearly() -> None:
    with pytest.raises(UnavailableError, match="CUDA"):
        await CrossEncoderVerifier(Workers(), device="cuda").start()


@pytest.mark.parametrize(
    ("flags", "variants", "precision"),
    [({"avx2"}, (), "float32"), ({"avx2"}, ("avx2",), "int16"), ({"avx512_bf16"}, ("avx512",), "bfloat16")],
)
def test_the_precision_follows_the_processor(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], variants: tuple[str, ...], precision: str
) -> None:
    monkeypatch.setattr(compute, "processor_flags", lambda: frozenset(flags))
    monkeypatch.setattr(transformer, "variants", lambda: variants)
    assert compute.plan_compute("cpu", "auto").precision == precision
    assert compute.plan_compute("cpu", "float32").precision == "float32"
    if not variants:
        with pytest.raises(UnavailableError, match="int16"):
            compute.plan_compute("cpu", "int16")
