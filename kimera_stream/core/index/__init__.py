"""All live geoids in memory, in the form that the scoring kernel scans.

    put ──> records.py, rows.py ──> slot in a chunk (storage.py) ──> live bit
    scan ─> pin (private copy of the live bits, slots freed meanwhile are not reused) ──> kernel in a worker thread
             └─ through a sieve (sifting.py) where the index is large: short codes pick the rows worth reading

``FlatIndex`` is the service. ``SnapshotKeeper`` fills it at the start, from a snapshot and the tail of the log or from the vault,
and writes snapshots while the server runs and when it stops.
"""

from kimera_stream.core.index.flat import FlatIndex
from kimera_stream.core.index.keeper import SnapshotKeeper, SnapshotStatistics
from kimera_stream.core.index.sliced import SlicedIndex
from kimera_stream.core.index.snapshot import LogPoint, SnapshotError, SnapshotInfo
from kimera_stream.core.index.statistics import IndexStatistics

__all__ = [
    "FlatIndex",
    "IndexStatistics",
    "LogPoint",
    "SlicedIndex",
    "SnapshotError",
    "SnapshotInfo",
    "SnapshotKeeper",
    "SnapshotStatistics",
]
