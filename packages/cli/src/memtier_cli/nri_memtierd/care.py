"""What is known of each container, what it should have and what it has; and directories that are still to go."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field

from loguru import logger

from memtier_cli.nri_memtierd.config import WorkloadClass
from memtier_cli.nri_memtierd.container_cgroup import CgroupNotFound, CgroupTree, ContainerCgroup
from memtier_cli.nri_memtierd.events import ContainerInfo
from memtier_cli.nri_memtierd.launch.base import Job, RunningEngine
from memtier_cli.nri_memtierd.rundir import Place, RunDirectory
from memtier_engine.errors import MemtierError

RETRY_FIRST_S = 1.0
RETRY_MOST_S = 300.0
HEALTHY_S = 600.0
"""An engine that worked for so long before it ended begins with short waits again."""


def retry_s(failures: int) -> float:
    """How long to wait after so many failures before this one."""
    return min(RETRY_MOST_S, RETRY_FIRST_S * 2.0 ** min(failures, 20))


@dataclass(slots=True, eq=False)
class Care:
    """A container that runs."""

    container: ContainerInfo
    order: int
    """In which it became known."""
    wanted: WorkloadClass | None = None
    """The class with an engine that it should have."""
    cgroup: ContainerCgroup | None = None
    """As it was seen last; None: never, so far."""
    looked_for: bool = False
    """Once for its cgroup, without being about to start an engine."""
    job: Job | None = None
    """Its cgroup and files, from just before its first engine on."""
    workload_class: WorkloadClass | None = None
    """Of the job."""
    engine: RunningEngine | None = None
    launched_s: float = 0.0
    failures: int = 0
    due_s: float = 0.0
    """When to try next, without an engine."""
    why: str = ""
    """Why there is no engine."""

    @property
    def names(self) -> tuple[str, str, str]:
        """Namespace, pod, container."""
        return self.container.namespace, self.container.pod, self.container.name

    @property
    def age_order(self) -> tuple[float, int]:
        """Greater is younger."""
        return self.container.started_at_s or 0.0, self.order

    def failed(self, now_s: float, why: str) -> float:
        """Note a failure; returns after how many seconds to try again."""
        wait_s = retry_s(self.failures)
        self.failures += 1
        self.due_s, self.why = now_s + wait_s, why
        return wait_s

    def forget_failures(self, now_s: float) -> None:
        """After a long healthy while an engine that ends is nothing but unlucky."""
        if now_s - self.launched_s >= HEALTHY_S:
            self.failures = 0

    def is_gone(self, tree: CgroupTree) -> bool:
        """Whether the container has ended, though nobody said so: runtimes lose events while a plugin connects."""
        if self.cgroup is None and not self.looked_for:
            self.looked_for = True
            with contextlib.suppress(CgroupNotFound):
                self.cgroup = tree.find(
                    container_id=self.container.id, cgroups_path=self.container.cgroups_path, pid=self.container.pid
                )
        if self.cgroup is not None:
            return not self.cgroup.is_there()
        return tree.has_ended(self.container.pid)

    def status(self, now_s: float) -> dict[str, object]:
        """For people and probes."""
        found: dict[str, object] = {"container": str(self.container), "id": self.container.id}
        if self.wanted is not None:
            found["class"] = self.wanted.name
        if self.engine is not None:
            return {**found, "engine": "running"}
        if self.wanted is None:
            return {**found, "engine": "none", "why": self.why}
        left_s = max(0, round(self.due_s - now_s))
        return {**found, "engine": "waiting", "why": self.why or "left alone after its start", "next_try_s": left_s}


class Cares:
    """All of them. Changed by one thread; `all` and `ids` may be called by any."""

    def __init__(self) -> None:
        self.soonest_s = math.inf
        """When the first of them is due, or earlier."""
        self._by_id: dict[str, Care] = {}
        self._by_names: dict[tuple[str, str, str], list[Care]] = {}
        self._order = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def all(self) -> list[Care]:
        """In no order that matters."""
        return list(self._by_id.values())

    def ids(self) -> frozenset[str]:
        """Of the containers."""
        return frozenset(self._by_id)

    def add(self, container: ContainerInfo) -> Care:
        """A container that runs, not known yet."""
        self._order += 1
        care = self._by_id[container.id] = Care(container, self._order)
        self._by_names.setdefault(care.names, []).append(care)
        return care

    def pop(self, container_id: str) -> Care | None:
        """It does not run any more."""
        care = self._by_id.pop(container_id, None)
        if care is not None:
            same = self._by_names[care.names]
            same.remove(care)
            if not same:
                del self._by_names[care.names]
        return care

    def has(self, care: Care) -> bool:
        """Whether this very one is still cared for."""
        return self._by_id.get(care.container.id) is care

    def due(self, due_s: float) -> None:
        """Something is to be done then."""
        self.soonest_s = min(self.soonest_s, due_s)

    def in_the_way(self, care: Care) -> list[Care]:
        """Older ones of the same names that have the directory which `care` gets."""
        place = self.place(care)
        return [
            other
            for other in self._by_names[care.names]
            if other is not care and other.job is not None and other.job.files.place == place
        ]

    def place(self, care: Care) -> Place:
        """Of several live containers of the same names, the youngest has the plain path, others their id in it.

        Raises:
            RunDirError: its names cannot be those of directories.
        """
        namespace, pod, name = care.names
        younger = any(other.age_order > care.age_order for other in self._by_names[care.names])
        return Place(namespace, pod, f"{name}.{care.container.id}" if younger else name)


@dataclass(slots=True)
class _Left:
    due_s: float
    failures: int = 0


@dataclass(slots=True)
class Litter:
    """Directories that are to go; the file system may refuse for a while."""

    run_directory: RunDirectory
    soonest_s: float = math.inf
    _left: dict[Place, _Left] = field(default_factory=dict)

    def remove(self, place: Place, now_s: float) -> None:
        """Remove it now, or keep trying."""
        self._try(place, _Left(now_s), now_s)

    def taken(self, place: Place) -> None:
        """It is used again."""
        self._left.pop(place, None)

    def retry(self, now_s: float) -> None:
        """Those whose time has come."""
        if now_s < self.soonest_s:
            return
        for place, left in list(self._left.items()):
            if left.due_s <= now_s:
                del self._left[place]
                self._try(place, left, now_s)
        self.soonest_s = min((left.due_s for left in self._left.values()), default=math.inf)

    def _try(self, place: Place, left: _Left, now_s: float) -> None:
        try:
            self.run_directory.remove(place)
        except MemtierError as error:
            wait_s = retry_s(left.failures)
            log = logger.bind(container=str(place))
            log.log("WARNING" if left.failures == 0 else "DEBUG", "{}; next try in {:.0f} s", error, wait_s)
            self._left[place] = _Left(now_s + wait_s, left.failures + 1)
            self.soonest_s = min(self.soonest_s, now_s + wait_s)
