"""Which mappings of a process hold memory of its own, in RAM or in swap."""

from __future__ import annotations

import numpy as np

from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import read_mappings
from memtier_engine.hostfs.proc import read_smaps
from memtier_engine.model import Spans


def occupied(host: Host, pid: int) -> Spans:
    """Whole mappings that can be tiered and have been touched: anonymous pages or swap entries, and the heap.

    Empty for a kernel thread or a zombie. The kernel walks all page tables for it, some 10 ms per GiB.

    Raises:
        ProcessGone: it exited.
        AccessDenied: needs the same user, or CAP_SYS_PTRACE.
    """
    tierable = read_mappings(host, pid).tierable()
    table = read_smaps(host, pid)
    heap = np.fromiter((name == "[heap]" for name in table.names), np.bool_, len(table))
    used = (table.anonymous_bytes > 0) | (table.swap_bytes > 0) | heap
    keep = np.isin(tierable.starts, table.starts[used])
    return Spans(tierable.starts[keep], tierable.ends[keep])
