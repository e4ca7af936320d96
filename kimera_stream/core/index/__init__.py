"""All live geoids in memory, in the form that the scoring kernel scans.

    put ──> signature.py (text, symbols) ──> slot in a chunk (storage.py) ──> live bit
    scan ─> pin (private copy of the live bits, slots freed meanwhile are not reused) ──> kernel in a worker thread

``FlatIndex`` is the service. A server fills it from the vault (``api.services.load_index``); ``restore_index`` can also start from a
snapshot and the tail of the log.
"""

from kimera_stream.core.index.flat import FlatIndex, IndexStatistics
from kimera_stream.core.index.restore import Restored, restore_index
from kimera_stream.core.index.snapshot import SnapshotError, SnapshotInfo

__all__ = ["FlatIndex", "IndexStatistics", "Restored", "SnapshotError", "SnapshotInfo", "restore_index"]
