"""Which containers that run have other memory values than their class and annotations say. Reads cgroup files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from loguru import logger

from memtier_cli.nri_memtierd.classify import ContainerRefused
from memtier_cli.nri_memtierd.container_cgroup import CgroupNotFound, CgroupTree
from memtier_cli.nri_memtierd.events import ContainerInfo
from memtier_engine.model import PAGE_BYTES
from nri_core import Update


@dataclass(frozen=True, slots=True)
class Lack:
    """What one container should have and has not."""

    container: ContainerInfo
    cgroup: Path
    values: Mapping[str, str]

    def update(self) -> Update:
        """To ask the runtime for.

        A failure is ignored: containerd answers otherwise with an error for all of a request, of which it carried out
        the rest. What came of it says the cgroup.
        """
        update = Update(self.container.id, ignore_failure=True)
        for key, value in self.values.items():
            update = update.unified(key, value)
        return update

    def persists(self) -> bool:
        """Whether it lacks something of it still."""
        return not all(_holds(self.cgroup / key, value) for key, value in self.values.items())


def lacks(
    running: Iterable[ContainerInfo], wanted: Callable[[ContainerInfo], Mapping[str, str]], cgroup_root: Path
) -> list[Lack]:
    """Of all containers. `wanted`: the values of one; may raise ContainerRefused."""
    found = []
    tree = CgroupTree(cgroup_root)
    for info in running:
        try:
            values = wanted(info)
            if not values:
                continue
            cgroup = tree.find(container_id=info.id, cgroups_path=info.cgroups_path, pid=info.pid).path
        except ContainerRefused as error:
            logger.bind(container=str(info)).debug("{}", error)
            continue
        except CgroupNotFound:
            continue
        missing = {key: value for key, value in values.items() if not _holds(cgroup / key, value)}
        if missing:
            found.append(Lack(info, cgroup, missing))
    return found


def _holds(path: Path, value: str) -> bool:
    """Whether a cgroup file holds the value; also if it cannot be read: then an update would not help."""
    try:
        text = path.read_text().strip()
    except OSError:
        return True
    if text == value:
        return True
    # The kernel rounds down to whole pages.
    return text.isdecimal() and value.isdecimal() and int(text) == int(value) // PAGE_BYTES * PAGE_BYTES
