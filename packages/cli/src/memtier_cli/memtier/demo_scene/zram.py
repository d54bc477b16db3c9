"""A swap area on a zram device of our own, given back afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from memtier_engine.errors import Unavailable
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.proc import read_swaps

CONTROL = Path("/sys/class/zram-control")
REMOVE_TRIES = 100
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # a root shell made by su may lack them


@contextmanager
def swap_for_now(needed_bytes: int) -> Iterator[str]:
    """Makes sure there is swap; yields how. A device made here is removed at the end.

    Raises:
        Unavailable: no swap, and none can be made.
    """
    areas = read_swaps(Host())
    if sum(area.free_bytes for area in areas) >= needed_bytes:
        yield f"{', '.join(area.path for area in areas)} (the machine's own)"
        return
    device = _make(needed_bytes * 2)
    try:
        yield f"{device} (made for this demo)"
    finally:
        _remove(device)


def _make(size_bytes: int) -> str:
    hint = "turn on some swap (swapon), or use a kernel with CONFIG_ZRAM"
    if os.geteuid() != 0:
        raise Unavailable("there is not enough swap, and making some needs root", hint="run as root")
    if not CONTROL.exists():
        with suppress(OSError):
            _call("modprobe", "zram", "num_devices=0")
    try:
        number = int((CONTROL / "hot_add").read_text())
    except OSError as error:
        raise Unavailable(f"no swap, and no zram device can be added: {error}", hint=hint) from None
    device = f"/dev/zram{number}"
    try:
        Path(f"/sys/block/zram{number}/disksize").write_text(str(size_bytes))
        for program in ("mkswap", "swapon"):
            done = _call(program, device)
            if done.returncode != 0:
                raise OSError(f"{program}: {done.stderr.strip()}")
    except OSError as error:
        _remove(device)
        raise Unavailable(f"{device} cannot be made swap: {error}", hint=hint) from None
    return device


def _call(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # A session of its own: Ctrl-C must not end it half way.
    return subprocess.run(
        [program, *arguments],
        check=False,
        capture_output=True,
        text=True,
        start_new_session=True,
        env={**os.environ, "PATH": _PATH},
    )


def _remove(device: str) -> None:
    failure: object = None
    for _ in range(REMOVE_TRIES):
        if any(area.path == device for area in read_swaps(Host())):
            failure = _call("swapoff", device).stderr.strip()
        try:
            (CONTROL / "hot_remove").write_text(device.removeprefix("/dev/zram"))
        except OSError as error:  # EBUSY while udev looks at a device that has changed
            failure = failure or error
            time.sleep(0.05)
        else:
            return
    print(f"{device} could not be removed: {failure}", file=sys.stderr)
