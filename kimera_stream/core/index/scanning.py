"""Which way a block of queries is scanned: by group, on a device, through the sieve, or all rows by the kernel."""

from collections.abc import Sequence
from typing import NamedTuple

import structlog

from kimera_stream.core.index.device import DeviceScan
from kimera_stream.core.index.groups import scan_groups
from kimera_stream.core.index.probe import Scope, scan_rows
from kimera_stream.core.index.sifting import Sifted, sift_and_check
from kimera_stream.core.index.written import Written
from kimera_stream.core.interfaces import Threads
from kimera_stream.kernels import Hits, Queries, Weights
from kimera_stream.kernels.layout import U64

log = structlog.get_logger(__name__)


class Ways(NamedTuple):
    """By what to scan.

    Attributes:
        device: None: by the kernel.
        sifted, written: The sieve in use, and what was written since it was begun.
        numbers: The group of each slot.
    """

    device: DeviceScan | None
    sifted: Sifted | None
    written: Written | None
    numbers: U64


async def scan_block(
    threads: Threads, scope: Scope, ways: Ways, groups: Sequence[int] | None, block: Queries, weights: Weights, k: int
) -> Hits:
    """Scan in a worker thread.

    Args:
        scope: Pinned until this returns.
        groups: The group of each query; None: all rows are looked at.
    """
    device, sifted, written, numbers = ways
    scan = scan_rows if device is None else device.scan_rows
    if groups is not None:
        return await threads.run("score", scan_groups, scan, scope, numbers, groups, block, weights, k)
    if device is not None or sifted is None or written is None or not sifted.answers(len(block), k):
        return await threads.run("score", scan, scope, block, weights, k)
    fresh, due = written.copy(len(scope.live)), sifted.due(len(block))
    hits, read, recalls = await threads.run("score", sift_and_check, scope, sifted, fresh, block, weights, k, due)
    sifted.read += read
    for recall in recalls:
        if sifted.measured(recall):
            log.warning("recall fell short: the sieve lets more through", slack=round(sifted.row_slack, 3))
    return hits
