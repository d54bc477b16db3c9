"""A swap area on a zram device of our own, given back afterwards."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from memtier_engine.errors import Unavailable
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.proc import read_swaps

CONTROL = Path("/sys/class/zram-control")


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
        subprocess.run(["modprobe", "zram", "num_devices=0"], check=False, capture_output=True)
    try:
        number = int((CONTROL / "hot_add").read_text())
    except OSError as error:
        raise Unavailable(f"no swap, and no zram device can be added: {error}", hint=hint) from None
    device = f"/dev/zram{number}"
    try:
        Path(f"/sys/block/zram{number}/disksize").write_text(str(size_bytes))
        for command in (["mkswap", device], ["swapon", device]):
            subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        _remove(device)
        detail = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        raise Unavailable(f"{device} cannot be made swap: {detail}", hint=hint) from None
    return device


def _remove(device: str) -> None:
    subprocess.run(["swapoff", device], check=False, capture_output=True)
    with suppress(OSError):
        (CONTROL / "hot_remove").write_text(device.removeprefix("/dev/zram"))
