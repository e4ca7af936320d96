"""Which slots were written since a moment: a bit per slot. On the writer's thread."""

import numpy as np

from kimera_stream.kernels.layout import U64


class Written:
    """Starts empty; grows with the slots."""

    def __init__(self) -> None:
        self._bits = np.zeros(1024, np.uint64)
        self._words = self._bits.data
        self.marks = 0

    def mark(self, slot: int) -> None:
        """The slot holds another row now."""
        at = slot >> 6
        if at >= len(self._bits):
            self._bits = np.concatenate([self._bits, np.zeros(max(len(self._bits), at + 1), np.uint64)])
            self._words = self._bits.data
        self._words[at] |= 1 << (slot & 63)
        self.marks += 1

    def copy(self, words: int) -> U64:
        """Its bits now, as so many words."""
        bits = np.zeros(words, np.uint64)
        n = min(words, len(self._bits))
        bits[:n] = self._bits[:n]
        return bits
