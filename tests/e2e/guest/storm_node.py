"""The node of the storm: a runtime that can be killed, plugins that are started again when they end, configurations.

Whoever keeps the plugins here does what a kubelet does for the pods of a DaemonSet: starts what ended, later each
time; of an upgrade, both pods for a while.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import yaml
from nri_node import CGROUPS, Containerd, quick_config

BASE = Path("/run/storm")
VOLUME = BASE / "volume"
VOLUME_BYTES = 2 << 20
AGAIN_MOST_S = 8.0
STACKS = {**os.environ, "PYTHONFAULTHANDLER": "1"}
"""SIGABRT writes the stacks of all threads to the log."""
SHARED = VOLUME / "run"
"""The run directory of all plugins that are not given one of their own: on the host, or in a DaemonSet's pod."""


class Runtime(Containerd):
    """containerd, and how often it was started."""

    def __init__(self) -> None:
        super().__init__()
        self.epoch = 0
        """Odd: it is up."""

    def start(self) -> None:
        """See `Containerd.start`."""
        super().start()
        self.epoch += 1

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """See `Containerd.stop`."""
        self.epoch += 1
        super().stop(number)


@dataclass
class Instance:
    """One pod with the plugin."""

    index: str
    runs: Path
    log_path: Path
    process: subprocess.Popen[bytes] | None = None
    failures: int = 0
    due_s: float = 0.0
    read_bytes: int = 0
    """Of the log, by `Keeper.new_log`."""

    def start(self, config: Path) -> None:
        """Start the program."""
        words = ["nri-memtierd", "-idx", self.index, "-config", str(config), "-run-dir", str(self.runs)]
        words += ["-cgroups-dir", str(CGROUPS), "-vv"]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=log, env=STACKS)

    def alive(self) -> bool:
        """Whether the program runs."""
        return self.process is not None and self.process.poll() is None

    def status(self) -> Mapping[str, Any] | None:
        """What it says of itself; None: nothing that can be read."""
        try:
            found: dict[str, Any] = json.loads((self.runs / "status.json").read_text())
        except (OSError, ValueError):
            return None
        return found


class Keeper:
    """Keeps plugins running. A thread of its own starts them again."""

    def __init__(self, config: Path) -> None:
        self.config = config
        self.instances: list[Instance] = []
        self.complaints: list[str] = []
        self.ends: Counter[str] = Counter()
        """How programs ended: by whom, or the last line of the log."""
        self._next = 40
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def add(self, *, own_directory: bool = False) -> Instance:
        """One more; it is started soon. Without a directory of its own it shares the host's."""
        with self._lock:
            index = f"{self._next}"
            self._next = 40 + (self._next - 39) % 50
            runs = VOLUME / f"own-{index}" if own_directory else SHARED
            made = Instance(index, runs, BASE / f"log-{index}")
            self.instances.append(made)
            return made

    def newest(self) -> Instance:
        """The one that is to stay."""
        return self.instances[-1]

    def end(self, instance: Instance, number: signal.Signals) -> None:
        """End one for good; the directory of its own goes with its pod."""
        with self._lock:
            self.instances.remove(instance)
        self.strike(instance, number)
        if instance.runs != SHARED:
            left = sorted(path.name for path in instance.runs.rglob("*")) if instance.runs.exists() else []
            if left and number == signal.SIGTERM and instance.process is not None:
                self.complaints.append(f"{instance.index} ended in order and left {left[:5]}")
            shutil.rmtree(instance.runs, ignore_errors=True)

    def strike(self, instance: Instance, number: signal.Signals) -> None:
        """Send a signal that ends it, and wait for that."""
        process = instance.process
        if process is None or process.poll() is not None:
            return
        process.send_signal(number)
        try:
            status = process.wait(40)
        except subprocess.TimeoutExpired:
            before = instance.log_path.stat().st_size
            process.send_signal(signal.SIGABRT)
            process.wait()
            log = instance.log_path.read_bytes().decode(errors="replace")
            where = {"before": log[:before][-1500:], "stacks": log[before:][-6000:]}
            self.complaints.append(f"{instance.index} did not end within 40 s after {number.name}: {where}")
            return
        self.ends[number.name] += 1
        # 1: a wrong configuration, just found; -15: before its first line.
        if number == signal.SIGTERM and status not in (0, 1, -signal.SIGTERM):
            self.complaints.append(f"{instance.index} ended with status {status} after SIGTERM")

    def new_log(self, instance: Instance) -> str:
        """What it wrote since the last call."""
        with instance.log_path.open("rb") as log:
            log.seek(instance.read_bytes)
            data = log.read()
        instance.read_bytes += len(data)
        return data.decode(errors="replace")

    def close(self) -> None:
        """End all."""
        self._ended.set()
        self._thread.join()
        for instance in list(self.instances):
            self.end(instance, signal.SIGKILL)

    def _work(self) -> None:
        while not self._ended.wait(0.5):
            with self._lock:
                for instance in self.instances:
                    self._tend(instance)

    def _tend(self, instance: Instance) -> None:
        if instance.alive():
            return
        now_s = time.monotonic()
        process, instance.process = instance.process, None
        if process is not None:
            self._note_end(instance, process.returncode)
            instance.due_s = now_s + min(AGAIN_MOST_S, 2.0**instance.failures)
            instance.failures += 1
        if now_s >= instance.due_s:
            instance.start(self.config)

    def _note_end(self, instance: Instance, status: int) -> None:
        if status in (-signal.SIGKILL, -signal.SIGTERM, 0):
            return
        lines = instance.log_path.read_text(errors="replace").splitlines()
        last = lines[-1] if lines else "nothing"
        if status != 1 or not last.startswith("nri-memtierd: "):
            self.complaints.append(f"{instance.index} ended by itself with status {status}: {last}")
        for why in ("already connected", "in use by another process", "No space left"):
            if why in last:
                self.ends[why] += 1
                return
        self.ends["wrong configuration" if str(self.config) in last else last] += 1


# class: (allowswap, has an engine)
_Classes = Mapping[str, tuple[bool | None, bool]]
_ALL: _Classes = {"swap": (True, True), "track": (False, True), "plain": (None, True), "bare": (True, False)}
VARIANTS: dict[str, tuple[_Classes, int]] = {
    # classes, interval of the engines in ms
    "all": (_ALL, 2000),
    "slower": (_ALL, 3000),
    "turned": ({**_ALL, "swap": (False, True), "track": (True, True), "bare": (True, True)}, 2000),
    "fewer": ({"swap": (True, True), "bare": (False, False)}, 2000),
}


def text_of(variant: str) -> str:
    """A configuration file."""
    classes, interval_ms = VARIANTS[variant]
    words = {True: "true", False: "false", None: ""}
    made = yaml.safe_load(quick_config(**{name: words[allow] for name, (allow, _) in classes.items()}))
    for each in made["classes"]:
        if not classes[each["name"]][1]:
            del each["memtierdconfig"]
        else:
            each["memtierdconfig"]["policy"]["config"]["intervalms"] = interval_ms
    text: str = yaml.safe_dump({**made, "scancpu": "50%"})
    return text


@dataclass
class Configs:
    """The configuration file, and what it may have said since it was last settled."""

    path: Path
    variant: str = "all"
    """The last valid one."""
    lacking: set[str] = field(default_factory=set)
    """Classes that were not in all of them."""

    def put(self, variant: str, how: str = "renamed") -> None:
        """A valid one: renamed into place, or written over the old one in two steps."""
        text = text_of(variant)
        if how == "renamed":
            fresh = self.path.with_suffix(".new")
            fresh.write_text(text)
            fresh.rename(self.path)
        else:
            with self.path.open("w") as file:
                file.write(text[: len(text) // 2])
                file.flush()
                time.sleep(0.5)
                file.write(text[len(text) // 2 :])
        self.variant = variant
        self.lacking |= _ALL.keys() - VARIANTS[variant][0].keys()

    def spoil(self, how: str) -> None:
        """One that must not be taken."""
        text = text_of("fewer")
        half = text[: len(text) * 2 // 3] + "\n  {"
        rows = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))
        spoilt = {
            "invalid": text.replace("policy:", "policcy:", 1),
            "half": half,
            "empty": "",
            "bomb": f"a0: &a0 [x, x]\n{rows}classes: *a8\n",
            "binary": "\0\1classes",
        }
        self.path.write_text(spoilt[how])
        if how == "empty":  # to start with none is allowed, and means that there are no classes
            self.lacking |= _ALL.keys()

    def settle(self) -> None:
        """From now on only what is in force may be refused."""
        self.lacking = set(_ALL.keys() - VARIANTS[self.variant][0].keys())

    def classes(self) -> _Classes:
        """Those in force."""
        return VARIANTS[self.variant][0]


class Volume:
    """The small volume of the run directories."""

    def __init__(self) -> None:
        shutil.rmtree(BASE, ignore_errors=True)
        VOLUME.mkdir(parents=True)
        options = f"size={VOLUME_BYTES},mode=755"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "storm", str(VOLUME)], check=True)
        self._ballast = VOLUME / "ballast"

    def fill(self) -> None:
        """Until nothing goes in any more."""
        with self._ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    def free(self) -> None:
        """Take that away again."""
        self._ballast.unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount it."""
        subprocess.run(["umount", "-l", str(VOLUME)], check=False)


def plugins() -> list[int]:
    """Processes of the program, whoever started them."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if any(word.endswith(b"/nri-memtierd") for word in words[:2]):
                    found.append(int(entry.name))
    return sorted(found)


def pick(rng: Random, weights: Mapping[str, float]) -> str:
    """A key, by weight."""
    return rng.choices(list(weights), list(weights.values()))[0]
