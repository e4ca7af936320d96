from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kimera_stream.kernels.layout import F32, I8, I32, I64, U8, U32, U64, Segment, Weights

def variants() -> tuple[str, ...]: ...
def steps() -> list[float]: ...
def quantize(vectors: F32, codes: U8, grades: U8, lost: F32) -> None: ...
def write_row(vector: F32, codes: U8 | None, grades: U8 | None, exact: F32 | None, row: int) -> float: ...
def write_rows(vectors: F32, codes: U8 | None, grades: U8 | None, exact: F32 | None, row: int) -> float: ...
def text_signatures(texts: list[str | None], out: U32) -> list[int]: ...
def text_overlaps(texts: list[str], ignored: U32, out: F32) -> None: ...
def read_all(data: npt.NDArray[np.uint8]) -> int: ...

class View:
    owners: tuple[object, ...]
    def __init__(self, segments: Sequence[Segment]) -> None: ...

class Backend:
    def __init__(self, variant: str | None, threads: int) -> None: ...
    @property
    def variant(self) -> str: ...
    @property
    def threads(self) -> int: ...
    def scan(
        self,
        view: View,
        live: U64,
        vectors: F32,
        has_vector: U8,
        text: U32,
        keys: U64,
        subjects: U64,
        layers: U64,
        record: I64,
        pool: U64,
        exclude: I64,
        weights: Weights,
        stride: int,
        margin: float,
        rescore: bool,
        select: U8 | None,
        slots: I64,
        fused: F32,
        cosine: F32,
        opposed: I32,
        counts: I64,
    ) -> float: ...
    def sift(
        self,
        view: View,
        live: U64,
        vectors: F32,
        has_vector: U8,
        text: U32,
        exclude: I64,
        short_codes: I8,
        short_steps: F32,
        short_rest: F32,
        centres: I8,
        spread: F32,
        kinds: U8,
        starts: I64,
        codes: I8,
        rest: U8,
        row_slots: U32,
        weights: Weights,
        stride: int,
        margin: float,
        row_slack: float,
        cell_slack: float,
        rescore: bool,
        slots: I64,
        fused: F32,
        cosine: F32,
        counts: I64,
        read: I64,
    ) -> None: ...
    def pair_head(self, query: F32, rows: F32, extra: F32, w1: F32, b1: F32, w2: F32, b2: float, out: F32) -> None: ...
    def match(self, vector: F32, rows: F32, thresholds: F32, indices: I64, cosines: F32) -> int: ...
