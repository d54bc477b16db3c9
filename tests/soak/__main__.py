"""`python -m soak MINUTES`: exit status 0 if nothing grew and nothing is left, 1 otherwise."""

from __future__ import annotations

import sys

from soak.churn import Run, soak
from soak.verdict import judge


def report(run: Run) -> list[str]:
    """What is wrong with a run; prints what it showed."""
    before, after = run.idle
    verdict = judge(run.samples, (before, after))
    print(f"{run.containers} containers, {run.births} processes; {verdict}")
    print(
        f"without containers, before and after: {before.fds} and {after.fds} fds, {before.threads} and "
        f"{after.threads} threads, {before.memory_bytes / 2**20:.1f} and {after.memory_bytes / 2**20:.1f} MiB"
    )
    complaints = list(verdict.complaints)
    if not run.paged_out:
        complaints.append("nothing was paged out: the engines did not work")
    if run.leftovers:
        complaints.append(f"left in the run directory: {', '.join(run.leftovers)}")
    return complaints + [f"logged: {line}" for line in run.log_errors[:10]]


def main() -> int:
    """Soak and judge."""
    complaints = report(soak(float(sys.argv[1]) if sys.argv[1:] else 60.0, lambda line: print(line, flush=True)))
    for each in complaints:
        print(f"FAILED: {each}")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
