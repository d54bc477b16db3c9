"""Run the benchmarks: all, or those named on the command line (`engine`, `nri`, ...).

Every module `bench_NAME.py` has `run() -> bool`: it prints its lines and says whether all limits hold.
Exit status: 0 all limits hold, 1 some do not, 2 no such benchmark.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def main(names: list[str]) -> int:
    """Run the benchmarks named, or all."""
    known = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"no benchmark {', '.join(unknown)}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    failed = []
    for name in names or known:
        print(f"== {name}", flush=True)
        if not importlib.import_module(f"bench.bench_{name}").run():
            failed.append(name)
    print(f"limits not held in: {', '.join(failed)}" if failed else "all limits hold", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
