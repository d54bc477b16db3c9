"""What a scenario in the guest tells the test on the host."""

from __future__ import annotations

import json
import sys
import threading

_writing = threading.Lock()


def say(**values: object) -> None:
    """One JSON line for the test on the host.

    Scenarios run side by side: `print` writes a line and its end apart, so two lines became one that nobody could read.
    """
    line = json.dumps(values) + "\n"
    with _writing:
        sys.stdout.write(line)
        sys.stdout.flush()
