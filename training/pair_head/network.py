"""Fitting the two layers, and turning them into what ``kernels.pair_head`` runs on."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kimera_stream.engines.evidence import packaged_rules
from kimera_stream.engines.evidence.reading import read
from kimera_stream.engines.pair_head import EXTRAS, extras_of
from training.pair_head.material import Vectors
from training.verifier.examples import CONTRADICTION, Example
from training.verifier.measure import roc_auc

F32 = npt.NDArray[np.float32]
RULES = EXTRAS.index("rules_log_odds")


class Read:
    """The features ``EXTRAS`` of pairs, kept in a folder between runs: the rules read some thousand pairs a second.

    Args:
        folder: Where they are kept; None: nowhere.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._file = None if folder is None else folder / "extras.npz"
        self._rules = packaged_rules()
        self._known: dict[int, F32] = {}
        read.cache.max_bytes = 1 << 30
        if self._file is not None and self._file.is_file():
            with np.load(self._file) as kept:
                if kept["names"].tolist() == [self._rules.name, *EXTRAS]:
                    self._known = dict(zip(kept["keys"].tolist(), kept["rows"], strict=True))

    def of(self, examples: Sequence[Example], cosines: F32) -> F32:
        """Features of each pair, shape (n, len(EXTRAS))."""
        keys = [_key(e) for e in examples]
        missing = [place for place, key in enumerate(keys) if key not in self._known]
        for start in range(0, len(missing), 4096):
            part = missing[start : start + 4096]
            triples = [(examples[i].first, examples[i].second, float(cosines[i])) for i in part]
            for i, evidence in zip(part, self._rules.judge(triples), strict=True):
                self._known[keys[i]] = extras_of(examples[i].second, [examples[i].first], [evidence])[0]
            print(f"read {start + len(part)} of {len(missing)} pairs", flush=True)
        if missing and self._file is not None:
            np.savez(
                self._file,
                names=[self._rules.name, *EXTRAS],
                keys=np.array(list(self._known), np.int64),
                rows=np.stack(list(self._known.values())),
            )
        return np.stack([self._known[key] for key in keys])


def _key(example: Example) -> int:
    said = f"{example.first}\0{example.second}".encode()
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "little", signed=True)


@dataclass(frozen=True, slots=True)
class Table:
    """Pairs as numbers: rows of ``vectors`` of the older and the newer statement, further features, and the truth."""

    vectors: F32
    older: npt.NDArray[np.int64]
    newer: npt.NDArray[np.int64]
    extras: F32
    truth: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, examples: Sequence[Example], vectors: Vectors, kept: Read) -> "Table":
        """The features that the server would compute of each pair."""
        said = dict.fromkeys(text for e in examples for text in (e.first, e.second))
        texts = {text: place for place, text in enumerate(said)}
        rows = np.stack([vectors[text] for text in said])
        older = np.array([texts[e.first] for e in examples])
        newer = np.array([texts[e.second] for e in examples])
        cosines = np.einsum("ij,ij->i", rows[older], rows[newer])
        return cls(
            rows, older, newer, kept.of(examples, cosines), np.array([e.label == CONTRADICTION for e in examples])
        )

    def turned(self, places: slice) -> "Table":
        """Some of the pairs in the other order as well: the findings stay what they are, on the other sides."""
        sides = [EXTRAS.index(name) for name in ("only_a", "only_b", "name_only_a", "name_only_b")]
        extras = self.extras[places].copy()
        extras[:, sides] = extras[:, [sides[1], sides[0], sides[3], sides[2]]]
        return Table(
            self.vectors,
            np.concatenate([self.older, self.newer[places]]),
            np.concatenate([self.newer, self.older[places]]),
            np.concatenate([self.extras, extras]),
            np.concatenate([self.truth, self.truth[places]]),
        )

    @property
    def rules(self) -> npt.NDArray[np.float64]:
        """Probability by the rules alone."""
        probability: npt.NDArray[np.float64] = 1 / (1 + np.exp(-self.extras[:, RULES].astype(np.float64)))
        return probability

    def features(self, places: npt.NDArray[np.int64]) -> F32:
        """As the kernel computes them, shape (n, 2 dim + extras)."""
        one, other = self.vectors[self.newer[places]], self.vectors[self.older[places]]
        return np.concatenate([np.abs(one - other), one * other, self.extras[places]], axis=1)


@dataclass(frozen=True, slots=True)
class Choice:
    """Of one training. ``dropout``: share of hidden units left out."""

    hidden: int = 56
    rate: float = 2e-3
    decay: float = 0.02
    dropout: float = 0.3
    epochs: int = 6
    batch: int = 1024


def fit(
    table: Table, weights: F32, development: Sequence[Table], choice: Choice, seed: int
) -> tuple[dict[str, F32], float]:
    """The weights of the epoch that ranks the development tables best, and its mean ROC-AUC over them."""
    torch.manual_seed(seed)
    order = np.random.default_rng(seed)
    inputs = np.empty((len(table.truth), table.vectors.shape[1] * 2 + len(EXTRAS)), np.float16)
    for start in range(0, len(inputs), 8192):
        inputs[start : start + 8192] = table.features(np.arange(start, min(start + 8192, len(inputs))))
    sample = inputs[order.choice(len(inputs), min(40_000, len(inputs)), replace=False)].astype(np.float32)
    mean, scale = sample.mean(0), sample.std(0)
    scale[scale < 1e-4] = 1.0  # what never differs here must not weigh a thousandfold where it does
    first, second = nn.Linear(sample.shape[1], choice.hidden), nn.Linear(choice.hidden, 1)
    net = nn.Sequential(first, nn.ReLU(), nn.Dropout(choice.dropout), second)
    optimiser = torch.optim.AdamW(net.parameters(), lr=choice.rate, weight_decay=choice.decay)
    steps = choice.epochs * (len(table.truth) // choice.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, choice.rate, total_steps=steps + 1, pct_start=0.1)
    best: tuple[float, dict[str, F32]] = (0.0, {})
    for epoch in range(choice.epochs):
        net.train()
        shuffled, total = order.permutation(len(table.truth)), 0.0
        for start in range(0, len(shuffled) - choice.batch + 1, choice.batch):
            places = shuffled[start : start + choice.batch]
            batch = torch.from_numpy((inputs[places] - mean) / scale)
            wanted = torch.from_numpy(table.truth[places].astype(np.float32))
            losses = nn.functional.binary_cross_entropy_with_logits(net(batch)[:, 0], wanted, reduction="none")
            loss = (losses * torch.from_numpy(weights[places])).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item() * len(places)
        net.eval()
        folded = _folded(first, second, mean, scale)
        areas = [roc_auc(each.truth, logits(folded, each)) for each in development]
        quality = float(np.mean(areas))
        print(
            f"epoch {epoch + 1}: loss {total / len(shuffled):.4f}, ROC-AUC {[round(a, 4) for a in areas]}", flush=True
        )
        if quality > best[0]:
            best = quality, folded
    return best[1], best[0]


def _folded(first: nn.Linear, second: nn.Linear, mean: F32, scale: F32) -> dict[str, F32]:
    """Layers over the raw features, the first in half precision, as it ships."""

    def array(tensor: Tensor) -> npt.NDArray[np.float64]:
        return tensor.detach().numpy().astype(np.float64)

    w1 = (array(first.weight) / scale).astype(np.float16).astype(np.float64)
    b1 = array(first.bias) - w1 @ mean.astype(np.float64)
    return {
        "w1": w1.astype(np.float32),
        "b1": b1.astype(np.float32),
        "w2": array(second.weight)[0].astype(np.float32),
        "b2": array(second.bias).astype(np.float32),
    }


def logits(weights: dict[str, F32], table: Table) -> npt.NDArray[np.float64]:
    """Of every pair, shape (n,)."""
    found = [np.zeros(0)]
    for start in range(0, len(table.truth), 8192):
        features = table.features(np.arange(start, min(start + 8192, len(table.truth))))
        hidden = np.maximum(features @ weights["w1"].T + weights["b1"], 0)
        found.append((hidden @ weights["w2"] + weights["b2"][0]).astype(np.float64))
    return np.concatenate(found)
