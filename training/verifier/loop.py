"""The training loop: length-bucketed batches, bf16 where it is faster, a progress bar, checkpoints to resume from."""

import hashlib
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from kimera_stream.engines.verifier_model import (
    CrossEncoder,
    EncodedPair,
    PairTokenizer,
    collate,
    load_trained,
    trained_state,
)
from kimera_stream.engines.verifier_runtime import Calibration, fast_half, twice_read
from training.verifier.examples import CONTRADICTION, NOT_CONTRADICTION, Example

FASTER_MARKS = 8
"""How much faster the few rows of marks learn than everything else: most of them occur in few pairs."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One pass of training.

    Attributes:
        name: Names the checkpoint file.
        epochs: Passes over the examples.
        rate: Peak learning rate.
        batch: Pairs per step.
        smoothing: Label smoothing; keeps the probabilities off 0 and 1.
        decay: Weight decay of the matrices.
        frozen: Lowest layers (and the embeddings below them) left as they are; two of six save a fifth of the time.
        settle: Share of the steps, at the end, in which the learning rate falls to nothing; before, it stays at its peak.
    """

    name: str
    epochs: float
    rate: float
    batch: int = 48
    smoothing: float = 0.03
    decay: float = 0.01
    frozen: int = 0
    settle: float = 1.0

    def scale(self, step: int, steps: int) -> float:
        """Learning rate of step ``step`` of ``steps``, as a share of the peak: up over 6 %, level, down over ``settle``."""
        warm = max(1, int(0.06 * steps))
        falling = max(1.0, self.settle * (steps - warm))
        return min((step + 1) / warm, 1.0, (steps - step) / falling)


@dataclass(slots=True)
class Runtime:
    """Where and how it runs.

    Attributes:
        minutes: Time a stage may take; the learning rate then falls with the clock where that is faster than the steps,
            so that a slow machine ends with a settled model instead of an unfinished one. None: as long as it takes.
        checkpoint_every: Seconds.
    """

    device: str
    work: Path
    seed: int = 7
    minutes: float | None = None
    checkpoint_every: float = 120.0

    @property
    def half(self) -> bool:
        return self.device == "cuda" or bool(torch.backends.cpu.get_cpu_capability().startswith("AVX512"))


def loss_of(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Mean cross-entropy; for "known not to contradict" the log-probability of the other two classes together."""
    logs = logits.log_softmax(-1)
    others = logs[:, 1:].logsumexp(-1)
    exact = logs.gather(1, labels.clamp(max=2).unsqueeze(1)).squeeze(1)
    chosen = torch.where(labels == NOT_CONTRADICTION, others, exact)
    # Smoothing on the one question that matters: contradiction, or not.
    opposite = torch.where(labels == CONTRADICTION, others, logs[:, 0])
    return -((1 - smoothing) * chosen + smoothing * opposite).mean()


def batches(lengths: npt.NDArray[np.int64], size: int, rng: random.Random) -> Iterator[list[int]]:
    """Indices of one shuffled pass, each batch of pairs of about one length."""
    order = list(range(len(lengths)))
    rng.shuffle(order)
    pools: list[list[int]] = []
    for start in range(0, len(order), size * 40):
        pool = sorted(order[start : start + size * 40], key=lambda i: int(lengths[i]))
        pools.extend(pool[i : i + size] for i in range(0, len(pool), size))
    rng.shuffle(pools)
    yield from pools


def train(model: CrossEncoder, examples: Sequence[Example], stage: Stage, runtime: Runtime) -> None:
    """Train ``model`` in place. An interrupted stage goes on from its last checkpoint; a finished one is loaded.

    Raises:
        ValueError: a checkpoint of this name was made from other examples.
    """
    checkpoint = runtime.work / f"{stage.name}.pt"
    tokenizer = PairTokenizer(96)
    encoded = tokenizer.pairs([(e.first, e.second) for e in examples])
    labels = torch.tensor([e.label for e in examples])
    lengths = np.array([len(pair.tokens) for pair in encoded])
    steps = math.ceil(len(examples) * stage.epochs / stage.batch)
    model.to(runtime.device)
    trained = _trainable(model, stage.frozen)
    marks = [p for p in trained if p is model.flags.weight]
    matrices = [p for p in trained if p.ndim >= 2 and p is not model.flags.weight]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": stage.decay, "faster": 1},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0, "faster": 1},
            {"params": marks, "weight_decay": 0.0, "faster": FASTER_MARKS},
        ],
        lr=stage.rate,
        betas=(0.9, 0.98),
    )
    of, done = digest(examples), 0
    if checkpoint.is_file():
        saved = torch.load(checkpoint, map_location=runtime.device, weights_only=True)
        if (saved["examples"], saved["steps"]) != (of, steps):
            raise ValueError(f"{checkpoint} was made from other examples; remove it or use another --work")
        load_trained(model, saved["model"])
        done = saved["done"]
        if done < steps:
            optimizer.load_state_dict(saved["optimizer"])
    if done >= steps:
        return
    torch.manual_seed(runtime.seed)
    if done:
        _set_random_state(saved["random"], runtime.device)

    def save() -> None:
        parts = {"model": trained_state(model), "done": done, "steps": steps, "examples": of}
        if done < steps:
            parts["optimizer"] = optimizer.state_dict()
            parts["random"] = _random_state(runtime.device)  # what dropout draws next
        partial = checkpoint.with_suffix(".part")
        torch.save(parts, partial)
        partial.replace(checkpoint)

    model.train()
    running, logged = 0.0, done
    started = last_save = last_log = time.monotonic()
    console = Console(width=110)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    ) as progress:
        task = progress.add_task(stage.name, total=steps, completed=done)
        for at, batch in enumerate(_endless(lengths, stage.batch, runtime.seed)):
            if at >= steps:
                break
            if at < done:
                continue  # the order is a function of the seed: a resumed stage skips what it has seen
            spent = 0.0 if runtime.minutes is None else (time.monotonic() - started) / (60 * runtime.minutes)
            if spent >= 1:
                break
            scale = min(stage.scale(at, steps), (1 - spent) / stage.settle)
            for group in optimizer.param_groups:
                group["lr"] = stage.rate * scale * group["faster"]
            loss = _step(model, [encoded[i] for i in batch], labels[batch], stage, runtime)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done = at + 1
            value = float(loss.detach())
            running = value if running == 0.0 else 0.98 * running + 0.02 * value
            progress.update(task, completed=done, description=f"{stage.name} loss {running:.3f}")
            now = time.monotonic()
            if not console.is_terminal and now - last_log > 20:
                rate = (done - logged) * stage.batch / (now - last_log)
                console.print(f"{stage.name} {done}/{steps} loss {running:.4f} (about {rate:.0f} pairs/s)")
                logged, last_log = done, now
            if now - last_save > runtime.checkpoint_every:
                save()
                last_save = time.monotonic()
    save()
    model.eval()


def digest(examples: Sequence[Example]) -> str:
    """Names these examples in this order: a checkpoint goes on with no others."""
    told = hashlib.blake2b(digest_size=16)
    for e in examples:
        told.update(json.dumps([e.first, e.second, e.label]).encode())
    return told.hexdigest()


def _random_state(device: str) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if device == "cuda" else states


def _set_random_state(states: Sequence[Tensor], device: str) -> None:
    torch.set_rng_state(states[0].cpu())
    if device == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1].cpu())


def _trainable(model: CrossEncoder, frozen: int) -> list[torch.nn.Parameter]:
    """The parameters to train; gradients of the ``frozen`` lowest layers and of the embeddings are not even computed."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    still = [model.words]
    if frozen:
        still += [model.positions, model.segments, model.norm, *model.layers[:frozen]]
    for module in still:
        module.requires_grad_(False)
    # The flags stay trainable only where the layers above the embeddings are.
    model.flags.requires_grad_(not frozen)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _endless(lengths: npt.NDArray[np.int64], size: int, seed: int) -> Iterator[list[int]]:
    epoch = 0
    while True:
        yield from batches(lengths, size, random.Random(f"{seed}:{epoch}"))
        epoch += 1


def _step(model: CrossEncoder, pairs: Sequence[EncodedPair], labels: Tensor, stage: Stage, runtime: Runtime) -> Tensor:
    inputs = collate(pairs, runtime.device)
    with torch.autocast(runtime.device, torch.bfloat16, enabled=runtime.half):
        logits = model(*inputs)
    return loss_of(logits.float(), labels.to(runtime.device), stage.smoothing)


@torch.inference_mode()
def predict(model: CrossEncoder, texts: Sequence[tuple[str, str]], *, batch: int = 32) -> npt.NDArray[np.float32]:
    """Logits, shape (len(texts), 3), as a server with the same device computes them."""
    model.eval()
    device = next(model.parameters()).device
    half = fast_half(device.type)
    encoded = PairTokenizer(128).pairs(texts)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].tokens))
    logits = np.zeros((len(texts), 3), dtype=np.float32)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            logits[chosen] = model(*collate([encoded[i] for i in chosen], device)).float().cpu().numpy()
    return logits


def probabilities(
    model: CrossEncoder, calibration: Calibration, texts: Sequence[tuple[str, str]]
) -> npt.NDArray[np.float64]:
    """Calibrated probability of contradiction, shape (len(texts),), as a server says it: of both orders where one is in doubt."""

    def turned(doubtful: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        return calibration(predict(model, [texts[i][::-1] for i in doubtful.tolist()]))

    return twice_read(calibration(predict(model, texts)), turned).astype(np.float64)
