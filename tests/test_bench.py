"""The programs of ``bench/`` go on running as what they measure changes; their figures on a machine at work say nothing."""

import json
import sys

import pytest

from bench import kernel
from kimera_stream import kernels


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
