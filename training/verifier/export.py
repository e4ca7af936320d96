"""Half-precision weights and their card, as the package ships them."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from kimera_stream.engines.verifier_model import CrossEncoder, trained_state

MOST_BYTES = 25_000_000


def export(model: CrossEncoder, card: Mapping[str, object], target: Path) -> int:
    """Write ``target`` (.safetensors, float16) and its ``.json``; returns the bytes of the weights.

    Raises:
        ValueError: a weight does not survive half precision, or the file would be too large to ship.
    """
    state = {name: value.detach().cpu().half().contiguous() for name, value in trained_state(model).items()}
    broken = [name for name, value in state.items() if not torch.isfinite(value).all()]
    if broken:
        raise ValueError(f"not finite in half precision: {', '.join(broken)}")
    partial = target.with_suffix(".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, partial)
    size = partial.stat().st_size
    if size > MOST_BYTES:
        partial.unlink()
        raise ValueError(f"{size} bytes of weights; at most {MOST_BYTES} ship")
    partial.replace(target)
    target.with_suffix(".json").write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return size
