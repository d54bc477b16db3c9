"""A policy of one's own: let each process keep so many MiB in RAM, and page out the longest idle beyond that.

Run it: python new_policy.py PID MIB [SECONDS]
"""

import sys

from memtier_engine import Engine, EngineConfig
from memtier_engine.guards.config import GuardsConfig
from memtier_engine.hostfs.host import Host
from memtier_engine.model import PAGE_BYTES, MoveTask
from memtier_engine.pages.ages import AGE_MAX
from memtier_engine.policies.base import BasePolicy
from memtier_engine.targets.pids import PidsTarget


class KeepPolicy(BasePolicy):
    """Lowers the age limit until the rest fits."""

    name = "keep"

    def __init__(self, keep_bytes: int) -> None:
        self.keep_pages = keep_bytes // PAGE_BYTES

    def decide(self, pages, clock, budget_bytes):  # type: ignore[no-untyped-def]
        tasks = []
        for process, own in pages.items():
            resident = own.histogram()[: AGE_MAX + 1]
            too_many = int(resident.sum()) - self.keep_pages
            if too_many <= 0:
                continue
            oldest_first = resident[:0:-1].cumsum()  # pages of age AGE_MAX, AGE_MAX and the next, ..., down to 1
            age = AGE_MAX - int((oldest_first < too_many).sum())
            spans = own.select(age_from=max(1, age), limit_pages=too_many)
            if len(spans):
                tasks.append(MoveTask(process, spans))
        return tasks


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: new_policy.py PID MIB [SECONDS]")
    host, pid, mib = Host(), int(sys.argv[1]), float(sys.argv[2])
    config = EngineConfig(scan_interval_ms=1000, guards=GuardsConfig(memory_psi_node=None, io_psi_node=None))
    engine = Engine(PidsTarget(host, [pid]), config, host=host, policy=KeepPolicy(int(mib * 2**20)))
    for report in engine.run(duration_s=float(sys.argv[3]) if len(sys.argv) > 3 else None):
        print(f"{report.resident_bytes >> 20} MiB in RAM, {report.paged_out_bytes >> 20} MiB out", flush=True)
