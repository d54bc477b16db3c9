"""Entry point of `nri-memtierd`: signals are heard before the rest is imported, which takes a while."""

from __future__ import annotations

import os
import sys
import threading

from memtier_cli.nri_memtierd.orders import EndedAtStart, Orders


def main() -> int:
    """Run the program; returns the exit status. See `memtier_cli.nri_memtierd.program`."""
    orders = Orders()
    orders.listen()
    try:
        from memtier_cli.nri_memtierd.program import main as program

        status = program(orders)
    except EndedAtStart:
        status = 0
    orders.close()
    if any(thread is not threading.main_thread() and not thread.daemon for thread in threading.enumerate()):
        os._exit(status)  # a hook's or a reader's thread that waits for the kernel: the interpreter would wait for it
    return status


if __name__ == "__main__":
    sys.exit(main())
