"""Runs every sample configuration on a process of the guest; one JSON line each."""

from __future__ import annotations

import tempfile
import time
from contextlib import closing
from pathlib import Path

from saying import say
from scene import cgroup, main

from memtier_engine.errors import MemtierError
from memtier_engine.hostfs.host import Host
from memtier_engine.mover.backends import ProcessHandle, move_to_node
from support.samples import run_sample, samples
from support.toucher import toucher

PAGES = 2048
SCANS = {"auto": 45, "reclaim": 45}


def run_all() -> None:
    """Each on the same idle process, all of whose pages were just written."""
    host = Host()
    folder = Path(tempfile.mkdtemp())
    with cgroup("e2e-samples") as path, toucher("anonymous", PAGES, folder) as process:
        (path / "cgroup.procs").write_text(str(process.process.pid))
        time.sleep(1.1)
        for sample in samples():
            process.write(range(PAGES))
            with closing(ProcessHandle(host, process.process)) as handle:  # the sample before may have moved it
                move_to_node(handle, process.spans, 0)
            scans = 3 if sample.spec.target.name == "filter" else SCANS.get(sample.policy, 30)
            began_s = time.monotonic()
            try:
                run = run_sample(sample, path, folder, host, scans=scans)
            except MemtierError as failure:
                say(kind="sample", name=sample.name, lacking=str(failure), hint=failure.hint)
                continue
            last = run.reports[-1]
            nodes: dict[int, int] = {}
            for counts in run.statistics.moves.values():
                for node, pages in counts.moved_by_node.items():
                    nodes[node] = nodes.get(node, 0) + pages
            say(
                kind="sample",
                name=sample.name,
                policy=sample.policy,
                tracker=last.tracker,
                scans=len(run.reports),
                wanted_scans=scans,
                processes=last.processes,
                swaps=sample.spec.swaps,
                pages=PAGES,
                out_pages=run.paged_out_bytes // 4096,
                to_nodes=nodes,
                errors=run.errors,
                seconds=time.monotonic() - began_s,
            )
        process.popen.kill()
        process.popen.wait()
    say(kind="samples", done=True)


if __name__ == "__main__":
    main({"samples": run_all})
