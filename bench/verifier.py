"""How fast the verifier reads, beside its plain form: ``python -m bench.verifier --json``.

Plain: the same network in float32 by torch, on the same threads, in batches of 16 as the pairs come, padded to the longest.
Both in alternating rounds, tokenizing included; ratios are taken within a round, by wall clock and by processor time. And
whether quality holds: ROC-AUC on one part of the corpus' clusters, and how far scores move, per precision. ``--int8`` adds
what is not in the product: the plain network with its layers' products in 8 bits, by torch.
"""

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bench.fit_rules import bucket
from bench.quality import auc
from kimera_stream.engines.verifier_model import CrossEncoder, collate, load_encoder, load_trained
from kimera_stream.engines.verifier_pairs import PairTokenizer
from kimera_stream.engines.verifier_runtime import VerifierRuntime, shipped_weights, twice_read
from kimera_stream.engines.verifier_torch import TorchNetwork
from kimera_stream.infrastructure.compute import available_processors, plan_compute, processor_has_bfloat16
from kimera_stream.kernels import transformer
from training.verifier.clusters import read_clusters
from training.verifier.examples import CONTRADICTION
from training.verifier.recipe import OWN_CORPUS

PLAIN_BATCH = 16
Scores = npt.NDArray[np.float32]


class Plain:
    """The network as anybody would write it down: no sorting, no packing, nothing remembered."""

    def __init__(self) -> None:
        from safetensors.torch import load_file

        self._model = CrossEncoder()
        load_encoder(self._model, words_only=True)
        load_trained(self._model, load_file(shipped_weights()))
        self._model.eval()
        runtime = VerifierRuntime.load(None, "cpu", "float32", 128, 32)
        self._calibration, self.operating_points = runtime.calibration, runtime.operating_points

    def judge(self, pairs: Sequence[tuple[str, str]]) -> Scores:
        """As a server does, what is in doubt in both orders."""
        return twice_read(self._read(pairs), lambda doubtful: self._read([pairs[i][::-1] for i in doubtful.tolist()]))

    @torch.inference_mode()
    def _read(self, pairs: Sequence[tuple[str, str]]) -> Scores:
        tokenizer = PairTokenizer(128)
        parts = []
        for start in range(0, len(pairs), PLAIN_BATCH):
            encoded = tokenizer.pairs(pairs[start : start + PLAIN_BATCH])
            parts.append(self._model(*collate(encoded)).float().numpy())
        return self._calibration(np.concatenate(parts))


class EightBits(nn.Module):
    """A projection whose weights torch quantised once, per row, to 8 bits, and whose input it quantises as it comes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight  # the network asks for its type
        weight = linear.weight.detach()
        scales = (weight.abs().amax(dim=1) / 127).double()
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that this will leave torch
            rows = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self._packed = torch.ops.quantized.linear_prepack(rows, linear.bias.detach())

    def forward(self, rows: Tensor) -> Tensor:
        result: Tensor = torch.ops.quantized.linear_dynamic(rows, self._packed, reduce_range=True)
        return result


class PlainInt8(Plain):
    """``Plain``, sorted and in batches of 32 as ``TorchNetwork`` has it, in 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self._model.layers:
            for name, part in list(layer.named_children()):
                if isinstance(part, nn.Linear):
                    setattr(layer, name, EightBits(part))
        self._network = TorchNetwork(self._model, 32)

    def _read(self, pairs: Sequence[tuple[str, str]]) -> Scores:
        return self._calibration(self._network.logits(PairTokenizer(128).pairs(pairs)))


def measure(judge: Callable[[Sequence[tuple[str, str]]], Scores], pairs: list[tuple[str, str]]) -> tuple[float, float]:
    """Pairs per second by the clock, and per second of processor time."""
    wall, own = time.perf_counter(), time.process_time()
    judge(pairs)
    return len(pairs) / (time.perf_counter() - wall), len(pairs) / (time.process_time() - own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="only the one JSON line")
    parser.add_argument("--pairs", type=int, default=512, help="pairs of one round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quality", type=int, default=2000, help="pairs that quality is compared on; 0: not at all")
    parser.add_argument("--part", choices=("dev", "test"), default="test", help="of the corpus")
    parser.add_argument("--int8", action="store_true", help="measure 8 bits by torch as well")
    parser.add_argument("--threads", type=int, default=available_processors())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    labelled = [
        (cluster.anchor, item.text, int(item.label == CONTRADICTION))
        for cluster in read_clusters([OWN_CORPUS])
        if cluster.split == arguments.part
        for item in cluster.items
    ]
    labelled.sort(key=lambda each: bucket(each[0] + each[1]))
    texts = [(a, b) for a, b, _ in labelled]
    wanted = [
        "float32",
        *(["bfloat16"] if processor_has_bfloat16() else []),
        *(["int16"] if transformer.variants() else []),
    ]
    runtimes = {name: VerifierRuntime.load(None, "cpu", name, 128, 32) for name in wanted}  # type: ignore[arg-type]
    torch.set_num_threads(arguments.threads)
    plain = Plain()
    points = plain.operating_points
    judges: dict[str, Callable[[Sequence[tuple[str, str]]], Scores]] = {
        name: runtime.judge for name, runtime in runtimes.items()
    }
    if arguments.int8:
        judges["int8"] = PlainInt8().judge
    torch.set_num_threads(arguments.threads)
    plain.judge(texts[: min(64, arguments.pairs)])
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in ("plain", *judges)}
    for turn in range(arguments.rounds):
        start = turn * arguments.pairs % max(1, len(texts) - arguments.pairs)  # other statements: nothing is remembered
        part = texts[start : start + arguments.pairs]
        rates["plain"].append(measure(plain.judge, part))
        for name, judge in judges.items():
            rates[name].append(measure(judge, part))
    result: dict[str, Any] = {
        "processors": os.cpu_count(),
        "threads": arguments.threads,
        "load": os.getloadavg()[0],
        "auto": plan_compute("cpu", "auto").precision,
        "part": arguments.part,
        "quality_pairs": len(texts[: arguments.quality]),
        "plain_pairs_per_second": round(statistics.median(wall for wall, _ in rates["plain"]), 1),
        "precisions": {},
    }
    reference = plain.judge(texts[: arguments.quality]) if arguments.quality else None
    labels = np.array([label for _, _, label in labelled[: arguments.quality]])
    for name, judge in judges.items():
        ratios = list(zip(rates[name], rates["plain"], strict=True))
        found: dict[str, Any] = {
            "pairs_per_second": round(statistics.median(wall for wall, _ in rates[name]), 1),
            "ratio": round(statistics.median(a[0] / b[0] for a, b in ratios), 2),
            "ratio_processor_time": round(statistics.median(a[1] / b[1] for a, b in ratios), 2),
        }
        if reference is not None:
            scores = judge(texts[: arguments.quality])
            moved = np.abs(scores - reference)
            point = points["balanced"]
            found |= {
                "auc": round(auc(labels, scores) or 0.0, 4),
                "auc_plain": round(auc(labels, reference) or 0.0, 4),
                "largest_difference": round(float(moved.max()), 4),
                "mean_difference": round(float(moved.mean()), 6),
                "decided_otherwise": int(((scores >= point) != (reference >= point)).sum()),
            }
        result["precisions"][name] = found
    if not arguments.json:
        print(json.dumps(result, indent=2))
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
