"""The scan on a GPU through torch: dense work there, symbols and the last word here.

    put ──> slot noted ──> next scan copies the noted rows to the device (half precision, in blocks)
    scan ─> device: cosines, text levels, live rows, top k + spare ─┐
            kernel on the processor: oppositions only ─────────────┴─> exact cosines by the float32 rows ──> best k

The device holds half-precision copies of the vectors and the text signatures. What it finds is rescored with the float32 rows, so
the hits are those of the kernel, but for ties within its precision. Symbols, records and rows without vectors stay with the kernel,
which reads only what shares a key with the query. Whatever goes wrong on the device (no memory, no device) ends its use until the
next start: it is told on ``stats``, and the kernel does the whole scan.

Written for any torch device; its tests run on the processor.
"""

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import structlog

from kimera_stream.core.index.probe import Scope, scan_rows
from kimera_stream.core.index.slots import BARE, Slots
from kimera_stream.core.index.storage import CHUNK_BITS, CHUNK_ROWS, Chunk, texts_at
from kimera_stream.infrastructure.compute import limit_memory, on_device
from kimera_stream.kernels import NAMED_MASK, NEGATED_BIT, NUMBERS_MASK, SAME, Hits, Queries, Weights
from kimera_stream.kernels.layout import F32, I64, U64
from kimera_stream.kernels.reference import levels
from kimera_stream.protocol.errors import UnavailableError

BLOCK_CHUNKS = 128
"""Chunks whose rows are one array on the device: 262,144 rows, 192 MiB of 384 numbers."""
_SPARE = 64
"""Further rows taken from the device before the exact cosines decide, besides half of k."""
_LOST = 2.0**-8
"""More than a cosine of unit vectors is off in half precision (both sides and the result rounded, 2**-9)."""
_AT_ONCE = 32
"""Queries multiplied together."""

log = structlog.get_logger(__name__)


class _Block:
    """Rows of ``BLOCK_CHUNKS`` chunks on the device."""

    def __init__(self, torch: Any, device: Any, dimension: int) -> None:
        rows = BLOCK_CHUNKS * CHUNK_ROWS
        self.vectors = torch.zeros((rows, dimension), dtype=torch.float16, device=device)
        self.text = torch.zeros(rows, dtype=torch.int32, device=device)


class DeviceScan:
    """Rows on a torch device, kept in step with an index, and the scan over them.

    ``attach`` belongs on the event loop, ``scan_rows`` and ``prepare`` in worker threads.

    Args:
        kind: ``cuda``, or ``torch-cpu`` for the same code on the processor.
        dimension: Length of the vectors.
        most_bytes: Of device memory at most; 0: what there is.
        memory_fraction: Of the device's memory that the process may take.
    """

    def __init__(
        self,
        kind: Literal["cuda", "torch-cpu"],
        dimension: int,
        *,
        most_bytes: int = 0,
        memory_fraction: float = 1.0,
    ) -> None:
        self.kind = kind
        self.trouble: str | None = None
        """Why it is not used; None while it is."""
        self._dimension = dimension
        self._most_bytes = most_bytes
        self._memory_fraction = memory_fraction
        self._torch: Any = None
        self._device: Any = None
        self._lock = threading.Lock()
        self._noted: deque[int] = deque()
        self._slots: Slots | None = None
        self._chunks: Sequence[Chunk] = ()
        self._blocks: list[_Block] = []

    @property
    def bytes(self) -> int:
        """Of device memory that is taken."""
        return len(self._blocks) * self._block_bytes

    @property
    def _block_bytes(self) -> int:
        return BLOCK_CHUNKS * CHUNK_ROWS * (2 * self._dimension + 4)

    def attach(self, slots: Slots, chunks: Sequence[Chunk]) -> None:
        """Follow these slots from now on; what they hold already is copied with the next scan. No scan may be running."""
        self._noted.clear()
        self._slots, self._chunks = slots, chunks
        if self.trouble is None:
            slots.published = self._noted
            for chunk in chunks:
                if chunk.exact is not None:
                    self._noted.extend((np.flatnonzero(slots.chunk_live(chunk.base)) + chunk.base).tolist())

    def scan_rows(self, scope: Scope, block: Queries, weights: Weights, k: int) -> Hits:
        """``probe.scan_rows`` over all rows, with the device where it can be used."""
        if not weights.l1 and not weights.layer and self.prepare():
            try:
                dense = self._dense(scope, block, weights, k)
            except RuntimeError as error:
                self._give_up(error)
            else:
                return self._joined(dense, self._opposed(scope, block, weights, k), block, k)
        return scan_rows(scope, block, weights, k)

    def prepare(self) -> bool:
        """Copy to the device what was put since the last time; whether it can be used."""
        if self.trouble is not None:
            return False
        try:
            with self._lock:
                if self._device is None:
                    self._open()
                while self._noted and self.trouble is None:
                    slots = [self._noted.popleft() for _ in range(min(len(self._noted), CHUNK_ROWS))]
                    self._copy(np.unique(np.array(slots, np.int64)))
        except (UnavailableError, RuntimeError) as error:
            self._give_up(error)
        return self.trouble is None

    def _open(self) -> None:
        import torch

        if self.kind == "cuda" and not torch.cuda.is_available():
            raise UnavailableError("torch sees no CUDA device")
        self._torch = torch
        if self.kind == "cuda":
            with on_device("scan", "cuda"):
                limit_memory("cuda", self._memory_fraction)
        self._device = torch.device("cuda" if self.kind == "cuda" else "cpu")

    def _give_up(self, error: UnavailableError | RuntimeError) -> None:
        """Use it no more if the device is at fault; raises the error if the code is."""
        named = ("OutOfMemoryError", "AcceleratorError")
        kinds = tuple(getattr(self._torch, name) for name in named if hasattr(self._torch, name))
        if not isinstance(error, (UnavailableError, *kinds)):
            raise error
        with self._lock:
            if self.trouble is not None:
                return
            first = str(error).partition("\n")[0]
            self.trouble = error.message if isinstance(error, UnavailableError) else f"{type(error).__name__}: {first}"
            self._blocks = []
            if self._slots is not None:
                self._slots.published = None
            self._noted.clear()
            log.warning("scans go without the device", device=self.kind, reason=self.trouble)
            if self.kind == "cuda" and self._torch is not None:
                self._torch.cuda.empty_cache()

    def _copy(self, slots: I64) -> None:
        """Rows of different chunks, ascending. A row that is freed and written meanwhile was noted again, and no scan sees it."""
        torch = self._torch
        for number in np.unique(slots >> CHUNK_BITS).tolist():
            chunk = self._chunks[number]
            if chunk.exact is None:
                continue
            rows = slots[slots >> CHUNK_BITS == number] - chunk.base
            place = number % BLOCK_CHUNKS * CHUNK_ROWS + rows
            block = self._block(number // BLOCK_CHUNKS)
            at = torch.from_numpy(place).to(self._device)
            block.vectors[at] = torch.from_numpy(chunk.exact[rows]).to(self._device).to(torch.float16)
            block.text[at] = torch.from_numpy(chunk.text[rows].view(np.int32)).to(self._device)

    def _block(self, number: int) -> _Block:
        while len(self._blocks) <= number:
            if self._most_bytes and self.bytes + self._block_bytes > self._most_bytes:
                raise UnavailableError(
                    f"the rows need more than {self._most_bytes} bytes of device memory (KIMERA_SCORING__DEVICE_BYTES)"
                )
            self._blocks.append(_Block(self._torch, self._device, self._dimension))
        return self._blocks[number]

    # -- the device's part ---------------------------------------------------------------------------------------------

    def _dense(self, scope: Scope, block: Queries, weights: Weights, k: int) -> list[tuple[I64, F32, F32]]:
        """Per query the slots of the best rows by relatedness and flag, their exact cosines and fused scores."""
        wanted = np.flatnonzero(block.has_vector)
        found: list[tuple[I64, F32, F32]] = [
            (np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.float32)) for _ in range(len(block))
        ]
        for start in range(0, len(wanted), _AT_ONCE):
            some = wanted[start : start + _AT_ONCE]
            for i, slots in zip(some.tolist(), self._nearest(scope, block, some, weights, k), strict=True):
                found[i] = self._rescored(slots, block, i, weights)
        return found

    def _nearest(self, scope: Scope, block: Queries, some: I64, weights: Weights, k: int) -> list[I64]:
        torch = self._torch
        take = k + max(_SPARE, k // 2)
        with torch.inference_mode():
            queries = torch.from_numpy(block.vectors[some]).to(self._device).to(torch.float16)
            text = torch.from_numpy(block.text[some].view(np.int32)).to(self._device)
            excluded = block.exclude[some]
            scores, places = [], []
            for number, rows in enumerate(list(self._blocks)):
                base = number * BLOCK_CHUNKS * CHUNK_ROWS
                live = self._live(scope.live, scope.kinds, number)
                if live is None:
                    continue
                fused = (queries @ rows.vectors[: len(live)].T).float()
                dead = (fused < weights.min_related - _LOST) | ~live
                if weights.flag:
                    fused += weights.flag * self._levels(text, rows.text[: len(live)])
                fused[dead] = float("-inf")
                for i in np.flatnonzero((excluded >= base) & (excluded < base + len(live))).tolist():
                    fused[i, int(excluded[i]) - base] = float("-inf")
                best, at = fused.topk(min(take, fused.shape[1]), dim=1)
                scores.append(best)
                places.append(at + base)
            if not scores:
                return [np.zeros(0, np.int64) for _ in some]
            best, order = torch.cat(scores, 1).sort(dim=1, descending=True)
            slots = torch.cat(places, 1).gather(1, order)[:, :take].cpu().numpy()
            kept = (best[:, :take] > float("-inf")).cpu().numpy()
        return [slots[i][kept[i]] for i in range(len(some))]

    def _live(self, live: U64, kinds: I64, number: int) -> Any:
        """bool (rows,): which rows of a block the scan sees; None if there are none of it."""
        torch = self._torch
        first, last = number * BLOCK_CHUNKS, min((number + 1) * BLOCK_CHUNKS, len(kinds))
        if first >= last:
            return None
        words = live[first * CHUNK_ROWS // 64 : last * CHUNK_ROWS // 64].copy()
        words.reshape(last - first, -1)[kinds[first:last] <= BARE] = 0
        bits = torch.from_numpy(words.view(np.uint8)).to(self._device)
        shifts = torch.arange(8, dtype=torch.uint8, device=self._device)
        return ((bits[:, None] >> shifts) & 1).flatten().bool()

    @staticmethod
    def _levels(mine: Any, theirs: Any) -> Any:
        """(queries, rows): as ``reference.levels``."""
        mine = mine[:, None]
        both = (mine & theirs) < 0  # the bit that says there is text is the sign
        negated = ((mine ^ theirs) & NEGATED_BIT) != 0
        my_numbers, their_numbers = mine & NUMBERS_MASK, theirs & NUMBERS_MASK
        numbers = (my_numbers != 0) & (their_numbers != 0) & (my_numbers != their_numbers)
        differs = (both & (negated | numbers)).float()
        same = (both & ((mine & NAMED_MASK) != 0) & (((mine ^ theirs) & NAMED_MASK) == 0)).float()
        return differs + SAME * same

    # -- the processor's part ------------------------------------------------------------------------------------------

    def _rescored(self, slots: I64, block: Queries, i: int, weights: Weights) -> tuple[I64, F32, F32]:
        """Exact cosines; rows below the bound are dropped."""
        exact = np.empty((len(slots), self._dimension), np.float32)
        chunks = slots >> CHUNK_BITS
        for number in np.unique(chunks).tolist():
            here = chunks == number
            chunk = self._chunks[number]
            assert chunk.exact is not None
            exact[here] = chunk.exact[slots[here] - chunk.base]
        cosine = exact @ block.vectors[i]
        lifted = levels(int(block.text[i]), texts_at(self._chunks, slots))
        fused = (cosine + np.float32(weights.flag) * lifted).astype(np.float32)
        keep = (cosine >= np.float32(weights.min_related)) & (fused >= np.float32(weights.threshold))
        return slots[keep], cosine[keep], fused[keep]

    @staticmethod
    def _opposed(scope: Scope, block: Queries, weights: Weights, k: int) -> Hits | None:
        """Oppositions alone, by the kernel."""
        if not block.keys.any():
            return None
        select = np.full(len(scope.kinds), 2, np.uint8)
        select[scope.kinds == BARE] = 1
        select[scope.kinds < BARE] = 0
        return scan_rows(scope, block, weights, k, select)

    def _joined(self, dense: list[tuple[I64, F32, F32]], opposed: Hits | None, block: Queries, k: int) -> Hits:
        """The best of both; a row that is in both is an opposition."""
        hits = Hits.empty(len(block), k)
        for i, found in enumerate(dense):
            first = 0 if opposed is None else int(opposed.counts[i])
            parts: list[tuple[Any, ...]] = [(*found, np.zeros(len(found[0]), np.int32))]
            if opposed is not None:
                apart = ~np.isin(found[0], opposed.slots[i, :first])
                columns = opposed.slots, opposed.cosine, opposed.fused, opposed.opposed
                parts = [tuple(column[i, :first] for column in columns), tuple(part[apart] for part in parts[0])]
            slots, cosine, fused, counts = (np.concatenate(column) for column in zip(*parts, strict=True))
            order = np.lexsort((slots, -fused))[:k]
            n = len(order)
            hits.slots[i, :n], hits.cosine[i, :n], hits.fused[i, :n] = slots[order], cosine[order], fused[order]
            hits.opposed[i, :n], hits.counts[i] = counts[order], n
        return hits
