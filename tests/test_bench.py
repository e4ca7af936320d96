"""The programs of ``bench/`` go on running as what they measure changes; their figures on a machine at work say nothing."""

import json
import sys
from collections.abc import Iterator

import pytest
import torch

from bench import kernel, verifier
from kimera_stream import kernels
from kimera_stream.engines.verifier import weights_available
from kimera_stream.kernels import transformer


@pytest.mark.skipif(kernels.IMPLEMENTATION != "compiled", reason="it measures the compiled kernel")
def test_the_bench_of_the_kernel_prints_one_object_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--rows", "4096", "--rounds", "1", "--sieve-rows", "6000"]
    monkeypatch.setattr(sys, "argv", ["bench.kernel", "--json", *small])
    kernel.main()
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(printed) == ["speed", "recall", "index", "sieve"]
    assert 0 < printed["index"]["bytes per geoid, counted"] < 601
    assert printed["sieve"]["sizes"][0]["rows"] == 6000


@pytest.fixture
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(not weights_available(), reason="this installation carries no verifier weights")
@pytest.mark.usefixtures("torch_threads")
def test_the_bench_of_the_verifier_prints_one_object_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--pairs", "4", "--rounds", "1", "--quality", "12", "--threads", "1", "--part", "dev", "--int8"]
    monkeypatch.setattr(sys, "argv", ["bench.verifier", "--json", *small])
    verifier.main()
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (printed["part"], printed["quality_pairs"], printed["threads"]) == ("dev", 12, 1)
    precisions = printed["precisions"]
    assert set(precisions) >= {"float32", "int8"} | ({"int16"} if transformer.variants() else set())
    assert precisions["float32"]["largest_difference"] < 0.001
    assert precisions["float32"]["decided_otherwise"] == 0
    assert 0 < precisions["int8"]["mean_difference"] <= precisions["int8"]["largest_difference"] < 1
    assert all(each["pairs_per_second"] > 0 for each in precisions.values())
