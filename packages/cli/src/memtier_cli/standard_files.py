"""Standard input, output and error of a program whose caller has closed some of them."""

from __future__ import annotations

import os
import sys


def occupy() -> None:
    """Open those that are closed: else the next file that is opened gets what is meant for them."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
            setattr(sys, name, os.fdopen(number, mode))
