"""Cells as snapshots of earlier versions may hold them. Nothing is scanned by them any more: see ``sifting.py``."""

from dataclasses import dataclass

from kimera_stream.kernels.layout import F32


@dataclass(slots=True, eq=False)
class Cells:
    """Unit centroids, float32 (cells, dim), the smallest cosine to each, float32 (cells,), and how many a query probed."""

    centroids: F32
    closest: F32
    probes: int
