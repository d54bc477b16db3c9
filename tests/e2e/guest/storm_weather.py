"""What happens to the node during the storm, one thing at a time, at random by a seed."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

from nri_node import CGROUPS, CriError
from storm_node import VARIANTS, Configs, Keeper, Runtime, Volume, pick

from vm.guest import cri_pb2 as cri

SPOILS = ("invalid", "half", "empty", "bomb", "binary")


class Weather:
    """Disturbances. `calm` ends all that last."""

    def __init__(self, runtime: Runtime, keeper: Keeper, configs: Configs, volume: Volume, rng: Random) -> None:
        self.done: Counter[str] = Counter()
        self._runtime, self._keeper, self._configs, self._volume = runtime, keeper, configs, volume
        self._rng = rng
        self._frozen: list[Path] = []
        self._stopped: list[int] = []
        self._kinds: dict[str, tuple[float, Callable[[], None]]] = {
            "plugin killed": (3, lambda: self._strike(signal.SIGKILL)),
            "plugin ended": (3, lambda: self._strike(signal.SIGTERM)),
            "plugin stopped for a while": (1, self._stall),
            "upgrade": (3, self._upgrade),
            "runtime killed": (1, lambda: self._restart(signal.SIGKILL)),
            "runtime ended": (1, lambda: self._restart(signal.SIGTERM)),
            "both killed": (1, self._restart_both),
            "good configuration": (3, self._configure),
            "bad configuration": (3, self._spoil),
            "SIGHUP": (2, self._hup),
            "volume full": (2, self._fill),
            "volume free": (2, self._volume.free),
            "frozen": (2, self._freeze),
            "stopped": (2, self._stop),
            "thawed": (2, self.thaw),
            "processes killed": (3, self._kill),
        }

    def blow(self) -> str:
        """One disturbance; returns which."""
        kind = pick(self._rng, {name: weight for name, (weight, _) in self._kinds.items()})
        self.done[kind] += 1
        self._kinds[kind][1]()
        return kind

    def calm(self) -> None:
        """Room on the volume, a good configuration, one plugin. What is frozen stays so until `thaw`."""
        self._volume.free()
        self._configure()
        for _ in self._keeper.instances[:-1]:
            self._end(instance_number=0)
        self._configs.settle()

    def thaw(self) -> None:
        """All processes go on."""
        for directory in self._frozen:
            with contextlib.suppress(OSError):
                (directory / "cgroup.freeze").write_text("0")
        for pid in self._stopped:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGCONT)
        self._frozen, self._stopped = [], []

    def _strike(self, number: signal.Signals) -> None:
        self._keeper.strike(self._rng.choice(self._keeper.instances), number)

    def _stall(self) -> None:
        process = self._keeper.newest().process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGSTOP)
            time.sleep(self._rng.uniform(1, 6))
            process.send_signal(signal.SIGCONT)

    def _upgrade(self) -> None:
        self._keeper.add(own_directory=self._rng.random() < 0.5)
        time.sleep(self._rng.uniform(0, 12))
        if self._rng.random() < 0.9 or len(self._keeper.instances) > 2:
            self._end(instance_number=0)  # the old one; sometimes both go on for a while

    def _end(self, *, instance_number: int) -> None:
        number = self._rng.choice((signal.SIGTERM, signal.SIGTERM, signal.SIGKILL))
        self._keeper.end(self._keeper.instances[instance_number], number)

    def _restart(self, number: signal.Signals) -> None:
        self._runtime.stop(number)
        time.sleep(self._rng.uniform(0, 4))
        self._runtime.start()

    def _restart_both(self) -> None:
        self._runtime.stop(signal.SIGKILL)
        self._strike(signal.SIGKILL)
        time.sleep(self._rng.uniform(0, 4))
        self._runtime.start()

    def _configure(self) -> None:
        self._configs.put(self._rng.choice(list(VARIANTS)), self._rng.choice(("renamed", "in two steps")))

    def _spoil(self) -> None:
        self._configs.spoil(self._rng.choice(SPOILS))
        if self._rng.random() < 0.5:
            self._hup()

    def _hup(self) -> None:
        process = self._keeper.newest().process
        if process is not None and process.poll() is None and self._listens(process.pid):
            process.send_signal(signal.SIGHUP)

    def _listens(self, pid: int) -> bool:
        """Whether it handles SIGHUP yet: before its first line the kernel's default ends any program."""
        with contextlib.suppress(OSError, StopIteration):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            caught = next(line for line in lines if line.startswith("SigCgt:"))
            return bool(int(caught.split()[1], 16) >> (signal.SIGHUP - 1) & 1)
        return False

    def _fill(self) -> None:
        self._volume.fill()
        time.sleep(self._rng.uniform(0, 10))
        if self._rng.random() < 0.6:
            self._volume.free()

    def _container(self) -> Path | None:
        """The cgroup of one that runs."""
        try:
            listed = self._runtime.call("ListContainers", cri.ListContainersRequest()).containers
        except CriError:
            return None
        ids = {each.id for each in listed if each.state == cri.CONTAINER_RUNNING}
        found = sorted(path for path in (CGROUPS / "kubepods").rglob("*") if path.name in ids)
        return self._rng.choice(found) if found else None

    def _freeze(self) -> None:
        directory = self._container()
        if directory is not None:
            with contextlib.suppress(OSError):
                (directory / "cgroup.freeze").write_text("1")
                self._frozen.append(directory)

    def _stop(self) -> None:
        directory = self._container()
        if directory is not None:
            with contextlib.suppress(OSError):
                for pid in map(int, (directory / "cgroup.procs").read_text().split()):
                    os.kill(pid, signal.SIGSTOP)
                    self._stopped.append(pid)

    def _kill(self) -> None:
        directory = self._container()
        if directory is not None:
            with contextlib.suppress(OSError):
                (directory / "cgroup.kill").write_text("1")
