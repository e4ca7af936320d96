"""All live geoids in memory, in the form that the scoring kernel scans.

    put ──> signature.py (text, symbols) ──> slot in a chunk (storage.py) ──> live bit
    scan ─> pin (private copy of the live bits, slots freed meanwhile are not reused) ──> kernel in a worker thread

``FlatIndex`` is the service; ``SnapshotError`` is what ``load`` raises when the caller has to rebuild.
"""

from kimera_stream.core.index.flat import FlatIndex, IndexStatistics
from kimera_stream.core.index.snapshot import SnapshotError, SnapshotInfo

__all__ = ["FlatIndex", "IndexStatistics", "SnapshotError", "SnapshotInfo"]
