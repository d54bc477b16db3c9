"""Which mappings of a process hold memory of its own, in RAM or in swap."""

from __future__ import annotations

import numpy as np

from memtier_engine.distinct import among
from memtier_engine.errors import Unavailable
from memtier_engine.hostfs.held import by_smaps, held
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import read_mappings
from memtier_engine.hostfs.pagemap import Pagemap
from memtier_engine.hostfs.proc import read_smaps
from memtier_engine.model import Spans


def occupied(host: Host, pid: int) -> Spans:
    """Whole mappings that can be tiered and have been touched: anonymous pages or swap entries, and the heap.

    Of mappings that are huge and nearly empty (terabytes that a sanitizer or a garbage collector reserves) only the
    2 MiB blocks that hold something. Empty for a kernel thread or a zombie. The kernel walks all page tables for it,
    some 10 ms per GiB.

    Raises:
        ProcessGone: it exited.
        AccessDenied: needs the same user, or CAP_SYS_PTRACE.
    """
    tierable = read_mappings(host, pid).tierable()
    table = read_smaps(host, pid)
    heap = np.fromiter((name == "[heap]" for name in table.names), np.bool_, len(table))
    used = (table.anonymous_bytes > 0) | (table.swap_bytes > 0) | heap
    keep = among(tierable.starts, table.starts[used])
    found = Spans(tierable.starts[keep], tierable.ends[keep])
    _, sparse = by_smaps(found, table)
    if not len(sparse):
        return found
    dense = ~among(found.starts, sparse.starts)
    with Pagemap(host, pid) as pagemap:
        try:
            blocks = held(pagemap, sparse, 0).spans
        except Unavailable:  # before Linux 6.7 there is no cheap way through them
            blocks = Spans.empty()
    starts = np.concatenate((found.starts[dense], blocks.starts))
    ends = np.concatenate((found.ends[dense], blocks.ends))
    order = np.argsort(starts, kind="stable")
    return Spans(starts[order], ends[order])
