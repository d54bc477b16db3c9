"""Entry point of `nri-memtierd`: signals are heard before the rest is imported, which takes a while."""

from __future__ import annotations

import os
import sys
import threading

from memtier_cli.nri_memtierd.orders import Orders


def main() -> int:
    """Run the program; returns the exit status. See `memtier_cli.nri_memtierd.program`."""
    orders = Orders()
    orders.listen()
    from memtier_cli.nri_memtierd.program import main as program

    status = program(orders)
    orders.close()
    if threading.active_count() > 1:
        # A thread that waits for the kernel, or is in the middle of a step: the interpreter would wait for the one,
        # and end the other where it stands, with the locks that it holds, which what is cleaned up then may need.
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
