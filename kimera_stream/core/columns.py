"""Many geoids column by column: what the index and its followers are filled from, without objects for each geoid."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
import numpy.typing as npt

from kimera_stream.protocol.objects import Scalar


@dataclass(frozen=True, slots=True, eq=False)
class GeoidColumns:
    """Of each geoid what it is compared by, and no more.

    Attributes:
        ids: Each of them once.
        texts: None where there is none.
        symbols: Symbolic states.
        layers: Keys of the semantic states.
        has_vector: bool (n,).
        vectors: float32 (m, dimension): of those that have one, in their order.
    """

    ids: Sequence[str]
    texts: Sequence[str | None]
    symbols: Sequence[Mapping[str, Scalar]]
    layers: Sequence[Sequence[str]]
    has_vector: npt.NDArray[np.bool_]
    vectors: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.ids)

    def kept(self, mask: npt.NDArray[np.bool_]) -> "GeoidColumns":
        """Those where ``mask``, bool (n,), is true."""
        chosen = mask.tolist()
        return GeoidColumns(
            list(compress(self.ids, chosen)),
            list(compress(self.texts, chosen)),
            list(compress(self.symbols, chosen)),
            list(compress(self.layers, chosen)),
            self.has_vector[mask],
            self.vectors[mask[self.has_vector]],
        )

    def ids_with_vector(self) -> list[str]:
        """Whose vectors ``vectors`` are."""
        return list(compress(self.ids, self.has_vector.tolist()))

    def ids_without_vector(self) -> list[str]:
        """The others."""
        return list(compress(self.ids, (~self.has_vector).tolist()))


@dataclass(frozen=True, slots=True, eq=False)
class SlicedColumns:
    """Geoids of some slices.

    Attributes:
        numbers: int64 (n,): the slice of each.
        stated: int64 (n,): offset of the entry that last changed what each states.
        groups: What each is compared within (see ``core.groups``); None: nothing.
    """

    columns: GeoidColumns
    numbers: npt.NDArray[np.int64]
    stated: npt.NDArray[np.int64]
    groups: Sequence[str | None]

    def __len__(self) -> int:
        return len(self.columns)

    def kept(self, mask: npt.NDArray[np.bool_]) -> "SlicedColumns":
        """Those where ``mask``, bool (n,), is true."""
        chosen = list(compress(self.groups, mask.tolist()))
        return SlicedColumns(self.columns.kept(mask), self.numbers[mask], self.stated[mask], chosen)
