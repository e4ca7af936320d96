"""The index in numbers."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class IndexStatistics:
    """The index in numbers, for the ``stats`` channel and the metrics."""

    geoids: int
    capacity: int
    bytes: int
    mapped_bytes: int
    tombstones: int
    evicted: int
    refused: int
    policy: str
    full: bool
    """Whether one more new geoid meets the policy."""
    live_bytes: int
    """Bytes of the live geoids: what ``max_bytes`` bounds. Freed rows that wait for reuse are not among them."""
    max_bytes: int
    """0: as many as ``capacity`` geoids take."""
    kernel: str
    threads: int
    cells: int = 0
    """Cells of the partition; 0: every scan is over all rows."""
    probes: int = 0
    device: str = "kernel"
    """Where vectors are scanned: by the ``kernel``, or the torch device asked for."""
    device_bytes: int = 0
    device_trouble: str | None = None
    """Why the kernel scans instead of the device."""
    recall: float | None = None
    """Of the exact result, over the queries last measured; None without cells or before the first."""
    proved: float | None = None
    """Share of the queries whose result the bounds prove exact."""
