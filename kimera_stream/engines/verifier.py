"""The verifier: a cross-encoder that reads two statements together and says how likely it is that they cannot both hold."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt


@runtime_checkable
class Verifier(Protocol):
    """Judges pairs of statements by reading them side by side."""

    @property
    def name(self) -> str:
        """Name and version of the model, as given in ``Contradiction.model``."""

    async def judge(self, pairs: Sequence[tuple[str, str]]) -> npt.NDArray[np.float32]:
        """Calibrated probability of contradiction per (older, newer) pair, shape (len(pairs),), in [0, 1].

        Raises:
            UnavailableError: the model cannot run at present.
        """
