"""`nri-memtierd --healthy` and `--ready`: what the running program's status file says, for probes. Imports little."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

STATUS_NAME = "status.json"
FRESH_S = 20.0
"""The program writes every 5 s."""


def boot_s() -> float:
    """Seconds since the machine started, sleep included: the same clock in every process."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def probe(run_directory: Path, *, ready: bool, now_s: float | None = None) -> tuple[bool, str]:
    """Whether the program that uses the run directory is well, and a line about it.

    Args:
        run_directory: as the program was given it.
        ready: also that the runtime is there; otherwise the program may be trying to reach it.
        now_s: on the clock of `boot_s`; None: now.
    """
    path = run_directory / STATUS_NAME
    try:
        status: dict[str, Any] = json.loads(path.read_text())
        age_s = (boot_s() if now_s is None else now_s) - float(status["boot_s"])
        well = bool(status["ready" if ready else "healthy"])
        words = "; ".join(map(str, status["problems"])) or f"{status['connection']}, {status['engines']} engines"
    except OSError as error:
        return False, f"{path}: {error.strerror}: the program does not run, or has just started"
    except (ValueError, KeyError, TypeError) as error:
        return False, f"{path} is no status: {type(error).__name__}"
    if not -FRESH_S < age_s < FRESH_S:
        return False, f"the status is {age_s:.0f} s old: the program is stuck or dead; it last said: {words}"
    return well, words
