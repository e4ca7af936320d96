"""Weights as the file holds them, mapped and not read: two models that share a table share its memory."""

import json
from pathlib import Path

import numpy as np

from kimera_stream.core.interfaces import Matrix

_HEADER = 8
_MOST = 1 << 24


def mapped_table(path: Path, name: str) -> Matrix:
    """A float32 tensor of two dimensions of a ``.safetensors`` file, read-only.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file, or holds no such tensor.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(_HEADER), "little")
        if not 2 <= size <= _MOST:
            raise ValueError(f"{path.name} is not a safetensors file")
        entry = json.loads(file.read(size)).get(name)
    if entry is None or entry["dtype"] != "F32" or len(entry["shape"]) != 2:
        raise ValueError(f"{path.name} holds no float32 table {name!r}")
    offset = _HEADER + size + int(entry["data_offsets"][0])
    return np.memmap(path, dtype=np.float32, mode="r", offset=offset, shape=tuple(entry["shape"]))
