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
    sieved: int = 0
    """Rows in the sieve; 0: every scan is exact."""
    sieve_bytes: int = 0
    cells: int = 0
    """Cells of the sieve."""
    device: str = "kernel"
    """Where vectors are scanned: by the ``kernel``, or the torch device asked for."""
    device_bytes: int = 0
    device_trouble: str | None = None
    """Why the kernel scans instead of the device."""
    recall: float | None = None
    """Of the exact result, over the queries last checked; None without a sieve or before the first."""
    read: float | None = None
    """Share of the rows that a query through the sieve read in full, on average."""
