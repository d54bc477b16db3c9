"""What needs an idle page bitmap, DAMON or soft-dirty bits, measured in the test VM, where all trackers work.

An emulated machine has no absolute times worth a word; the ratios compare the same work in the same guest. A Go
`memtierd` on this machine's PATH takes part.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from bench.go_memtierd import go_memtierd
from support.vm import VmSession

NODES = "3072:0-1"
LIMIT_S = 1800
# 32 MiB: with as little, a unit of work is as short here as one of 256 MiB on a machine.
_PROGRAM = """
import sys
from bench import bench_bpf
results = [bench_bpf.against_idlepage(), bench_bpf.losses(32 << 20), bench_bpf.against_go()]
sys.exit(not all(results))
"""


def run() -> bool:
    """Print all lines; True if all limits hold."""
    with ExitStack() as stack:
        session = stack.enter_context(VmSession())
        out = None
        if program := go_memtierd():
            out = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            shutil.copy(program, out / "memtierd")
        result = session.run(
            ["env", "PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/out", "python3", "-u", "-c", _PROGRAM],
            timeout_s=LIMIT_S,
            nodes=NODES,
            env={"PYTHONPATH": "/host/tests", "PYTHONDONTWRITEBYTECODE": "1"},
            out=out,
        )
    for line in result.output.splitlines():
        print(f"VM: {line}", flush=True)
    if result.status not in (0, 1):
        print(f"the VM ended with status {result.status}", file=sys.stderr)
    return result.status == 0
