"""Which processes are stopped while it is decided what goes out of them.

Nothing of a stopped process is in use, so all of it goes out, and what it needs comes back at once when it goes on.
"""

from __future__ import annotations

from collections.abc import Iterable

from memtier_engine.errors import KernelCallError
from memtier_engine.hostfs.handles import OpenProcesses
from memtier_engine.hostfs.maps import stat_fields_of
from memtier_engine.model import SWAP_NODE, MoveTask, ProcessId
from memtier_engine.pages.space import Spaces

_STOPPED = frozenset((b"T", b"t"))
"""Letters of the state: by a signal, and by a tracer. Source: proc_pid_stat(5)."""


def note_stopped(spaces: Spaces, tasks: Iterable[MoveTask], files: OpenProcesses) -> None:
    """Find out of each space that `tasks` page out whether all of its processes are stopped."""
    for process in {task.process for task in tasks if task.to_node == SWAP_NODE}:
        space = spaces.get(process)
        if space is not None:
            space.stopped = all(_is_stopped(member, files) for member in space.members)


def _is_stopped(process: ProcessId, files: OpenProcesses) -> bool:
    try:
        with files.of(process) as own:
            return stat_fields_of(own.read("stat"), process.pid)[0] in _STOPPED
    except KernelCallError:
        return False
