"""Transformers of the BERT family on the CPU, in C with 16-bit integer products (``ext/transformer.h`` says how).

Loading one takes a fraction of a second and needs no torch. Where the extension was not built, or the processor has no
AVX2, ``variants()`` is empty and callers take torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kimera_stream.kernels.layout import F32, I64, check, check_finite

try:
    import kimera_stream.kernels._transformer as _transformer
except ImportError:
    _compiled: Any = None
else:
    _compiled = _transformer

TABLES = 4
"""Tables of embeddings at most; their rows are added up per token."""
_PANEL = 32
"""Output widths are multiples of this (``XF_PANEL``)."""


def variants() -> tuple[str, ...]:
    """The instruction sets that this machine can run, best first; empty: no transformer in C here."""
    return () if _compiled is None else _compiled.variants()


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Weights of one post-norm layer, float32. Projections are (weight (out, in), bias (out,)), norms (weight, bias).

    ``attend`` gives query, key and value behind each other: (3 width, width).
    """

    attend: tuple[F32, F32]
    output: tuple[F32, F32]
    attention_norm: tuple[F32, F32]
    widen: tuple[F32, F32]
    narrow: tuple[F32, F32]
    output_norm: tuple[F32, F32]


class Transformer:
    """A network ready to run. ``forward`` may be called from any thread, and releases the GIL.

    Args:
        tables: Up to four float32 (rows, width); kept, not copied.
        norm: Of the sum of the embeddings.
        layers: Quantised once, here; may be dropped afterwards.
        heads: Divides the width into heads of a multiple of 32.
        threads: That carry runs of sequences, the caller's included.
        variant: One of ``variants()``; None takes the best.

    Raises:
        ImportError: there is no transformer in C here.
        TypeError, ValueError: weights of a wrong dtype or shape.
    """

    def __init__(
        self,
        tables: Sequence[F32],
        norm: tuple[F32, F32],
        layers: Sequence[LayerWeights],
        *,
        heads: int,
        epsilon: float = 1e-12,
        threads: int = 1,
        variant: str | None = None,
    ) -> None:
        if not variants():
            raise ImportError("the transformer in C is not there, or not for this processor")
        if not 1 <= len(tables) <= TABLES or not layers or threads < 1:
            raise ValueError(f"tables, layers, threads: expected 1 to {TABLES}, at least 1, at least 1")
        width = tables[0].shape[-1]
        inner = layers[0].widen[0].shape[0]
        if width % _PANEL or inner % _PANEL or width % heads or (width // heads) % _PANEL:
            raise ValueError(f"width {width}, inner {inner}, {heads} heads: expected multiples of {_PANEL} per head")
        self.width = width
        self.variant = variants()[0] if variant is None else variant
        self._rows = [len(table) for table in tables]
        self._network = _compiled.Network(width, heads, inner, len(layers), epsilon, self.variant, threads)
        for number, table in enumerate(tables):
            check("tables", table, np.float32, (None, width))
            self._network.table(number, table)
        self._norm(-1, 0, norm)
        for number, layer in enumerate(layers):
            self._norm(number, 0, layer.attention_norm)
            self._norm(number, 1, layer.output_norm)
            for which, (projection, out, into) in enumerate(
                (
                    (layer.attend, 3 * width, width),
                    (layer.output, width, width),
                    (layer.widen, inner, width),
                    (layer.narrow, width, inner),
                )
            ):
                check("weight", projection[0], np.float32, (out, into))
                check("bias", projection[1], np.float32, (out,))
                check_finite("weight", projection[0])
                self._network.linear(number, which, *projection)

    def _norm(self, layer: int, which: int, norm: tuple[F32, F32]) -> None:
        for part in norm:
            check("norm", part, np.float32, (self.width,))
        self._network.norm(layer, which, *norm)

    def forward(
        self, ids: Sequence[np.ndarray], lengths: Sequence[int], *, first: bool = False
    ) -> tuple[F32, F32 | None]:
        """Carry sequences through all layers.

        Args:
            ids: Per table the rows of all tokens, those of one sequence behind the other; integers (tokens,).
            lengths: Tokens of each sequence, at least 1 each.
            first: Also give the state of each sequence's first token.

        Returns:
            float32 (sequences, width): the mean over each sequence's tokens; and the states asked for, or None.

        Raises:
            ValueError: lengths and ids do not fit each other or the tables.
        """
        starts: I64 = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=starts[1:])
        total = int(starts[-1])
        if len(ids) != len(self._rows) or any(len(each) != total for each in ids) or (np.diff(starts) < 1).any():
            raise ValueError("ids, lengths: expected an index per token and table, and no empty sequence")
        block = np.zeros((TABLES, total), dtype=np.int32)
        for row, given, rows in zip(block, ids, self._rows, strict=False):
            row[:] = given
            if total and (int(row.min()) < 0 or int(row.max()) >= rows):
                raise ValueError(f"ids: expected rows of a table of {rows}")
        mean = np.empty((len(lengths), self.width), dtype=np.float32)
        states = np.empty_like(mean) if first else None
        self._network.forward(block, starts, mean, states)
        return mean, states
