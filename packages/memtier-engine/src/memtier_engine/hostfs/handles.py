"""Open files of processes that can never be another's: a bounded number of them, the least recently used closed first.

A pid is given to another process as soon as its owner is gone. An open directory /proc/PID is not: it stands for the
process that had the pid when it was opened, and after its end every file below it says ESRCH or ENOENT. So the start
time is compared once, when the directory is open, and all files are opened below it. Source: fs/proc/base.c, which
keeps the `struct pid` in the inode; pidfd_open(2).
"""

from __future__ import annotations

import errno
import os
import resource
import select
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

from memtier_engine.abi import syscalls
from memtier_engine.closing import Closing
from memtier_engine.errors import KernelCallError, ProcessGone
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.longlines import gathered
from memtier_engine.hostfs.maps import live_thread, start_ticks_of
from memtier_engine.hostfs.pagemap import Pagemap
from memtier_engine.model import ProcessId

_T = TypeVar("_T")
_OF_MEMORY = frozenset({"maps", "smaps", "smaps_rollup", "numa_maps", "pagemap", "clear_refs", "mem"})
"""Files that say nothing once the first thread has ended; another thread's say it."""
THREADS_TRIED = 16
"""Where they come and go, the one that is found may have ended when its file is opened."""
FILES_EACH = 3
"""The directory, the pidfd and pagemap."""
SHARE_OF_LIMIT = 0.5
"""Of the files that this process may have open; the others are for everybody else in it."""
KEPT_LEAST, KEPT_MOST = 4, 1024
_READ_BYTES = 1 << 12
"""More than the kernel gives at once of what it writes as text: a page. Source: fs/seq_file.c, seq_read_iter."""


class ProcessFiles(Closing):
    """One process: its directory in /proc, and what is asked for below it, opened when first needed."""

    def __init__(self, host: Host, process: ProcessId) -> None:
        """Open the directory.

        Raises:
            ProcessGone: it exited, or the pid is another's by now.
        """
        self.process = process
        self._host = host
        self._pidfd = -1
        self._pagemap: Pagemap | None = None
        self._thread: int | None = None
        """Whose files of memory to take, when the first thread has ended: see `maps.leader_ended`."""
        self._directory = host.open(host.proc(process.pid), os.O_RDONLY | os.O_DIRECTORY)
        try:
            if start_ticks_of(self.read("stat"), process.pid) != process.start_ticks:
                raise ProcessGone(f"pid {process.pid} is a new process", errno.ESRCH)
        except BaseException:
            self.close()
            raise

    def open(self, name: str, flags: int = os.O_RDONLY) -> int:
        """A file below its directory, as a file descriptor that the caller closes.

        Raises:
            ProcessGone: it exited.
            AccessDenied, KernelCallError: what the kernel said.
        """
        return self._of_memory(name, "open", lambda: self._open(name, flags))

    def read(self, name: str) -> bytes:
        """The whole file; errors as `open`."""
        for _ in range(THREADS_TRIED):
            text = self._of_memory(name, "read", lambda: self._read(name))
            # maps of an ended thread can be opened: empty. The next one may have ended by then too.
            if text or name not in _OF_MEMORY or not self._find_thread():
                break
        return text

    def write(self, name: str, text: str) -> None:
        """Write in one write(2), as kernel files want it; errors as `open`."""
        if name in _OF_MEMORY and self._thread is None:
            self._find_thread()  # clear_refs of an ended first thread takes everything, and does nothing
        self._of_memory(name, f"write {text.strip()[:40]!r} to", lambda: self._write(name, text))

    def _of_memory(self, name: str, action: str, do: Callable[[], _T]) -> _T:
        """Do it; if it is about memory, again by another thread, when the one that we went by has ended."""
        tries = THREADS_TRIED if name in _OF_MEMORY else 1
        while True:
            try:
                return do()
            except OSError as error:
                tries -= 1
                over = error.errno in (errno.ESRCH, errno.ENOENT)
                if not (over and tries and self._find_thread()):
                    raise self._error(name, error, action) from None

    def _find_thread(self) -> bool:
        """Whether the first thread has ended and another one, that is to be gone by, has not."""
        self._thread = live_thread(self._host, self.process.pid)
        return self._thread is not None

    def _open(self, name: str, flags: int) -> int:
        where = f"task/{self._thread}/{name}" if self._thread is not None and name in _OF_MEMORY else name
        return os.open(where, flags | os.O_CLOEXEC, dir_fd=self._directory)

    def _read(self, name: str) -> bytes:
        fd = self._open(name, os.O_RDONLY)
        try:
            parts = iter(lambda: os.read(fd, _READ_BYTES), b"")
            return gathered(parts, f"/proc/{self.process.pid}/{name}")
        finally:
            os.close(fd)

    def _write(self, name: str, text: str) -> None:
        fd = self._open(name, os.O_WRONLY)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)

    @property
    def pagemap(self) -> Pagemap:
        """Its pagemap. Do not close it."""
        if self._pagemap is None:
            self._pagemap = Pagemap(self._host, self.process.pid, files=self)
        return self._pagemap

    @property
    def pidfd(self) -> int:
        """For process_madvise and the like. Do not close it.

        Raises:
            ProcessGone: it exited.
        """
        if self._pidfd < 0:
            pidfd = syscalls.pidfd_open(self.process.pid)
            # Opened by number: whose it is, only a look at the directory afterwards tells. While the process lives,
            # the number cannot be another's.
            try:
                self.check()
            except BaseException:
                os.close(pidfd)
                raise
            self._pidfd = pidfd
        return self._pidfd

    def check(self) -> None:
        """Raises ProcessGone if it exited: what is done by number around two checks was done to this process."""
        start_ticks_of(self.read("stat"), self.process.pid)

    @property
    def headless(self) -> bool:
        """Whether its first thread had ended when its memory was last asked for."""
        return self._thread is not None

    def why_not_by_pidfd(self) -> str | None:
        """Why process_madvise(2) says ESRCH of it; None: because it is over, for all that is known.

        That call goes by the first thread, and takes no pidfd of another one. Source: kernel/pid.c, pidfd_get_task.
        """
        return "its first thread has ended, and the kernel goes by that one" if self._find_thread() else None

    def exited(self) -> bool:
        """Whether the pidfd says that it is over: one system call, no text to read."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Close all. Safe to call twice."""
        if self._pagemap is not None:
            self._pagemap.close()
            self._pagemap = None
        for name in ("_pidfd", "_directory"):
            fd = getattr(self, name)
            if fd >= 0:
                setattr(self, name, -1)
                os.close(fd)

    def _error(self, name: str, error: OSError, action: str) -> KernelCallError:
        number = error.errno or errno.EIO
        what = f"{action} /proc/{self.process.pid}/{name}"
        if number in (errno.ENOENT, errno.ESRCH):
            return ProcessGone(f"{what}: process {self.process.pid} exited", number)
        return KernelCallError.from_errno(what, number)


@dataclass(slots=True)
class _Entry:
    files: ProcessFiles
    users: int = 0


class OpenProcesses(Closing):
    """The files of many processes, at most so many open at once. Methods may be called from any thread."""

    def __init__(
        self, host: Host, *, most: int | None = None, opening: Callable[[Host, ProcessId], ProcessFiles] | None = None
    ) -> None:
        """`most`: processes whose files stay open; None: half of what this process's limit of open files allows.

        `opening`: how they are opened; None: as `ProcessFiles`.
        """
        self._host = host
        self._opening = opening or ProcessFiles
        self._most = most
        self._lock = threading.Lock()
        self._entries: OrderedDict[ProcessId, _Entry] = OrderedDict()

    @property
    def most(self) -> int:
        """Processes whose files stay open."""
        return self._most if self._most is not None else files_allowed()

    def __len__(self) -> int:
        return len(self._entries)

    @contextmanager
    def of(self, process: ProcessId) -> Iterator[ProcessFiles]:
        """The files of `process`, which stay open for as long as the block lasts, and after it while there is room.

        Raises:
            ProcessGone: it exited, or the pid is another's by now.
        """
        with self._lock:
            entry = self._entries.get(process)
            if entry is None:
                self._shrink(self.most - 1)
                entry = self._entries[process] = _Entry(self._opening(self._host, process))
            self._entries.move_to_end(process)
            entry.users += 1
        try:
            yield entry.files
        except ProcessGone:
            self.drop(process)
            raise
        finally:
            with self._lock:
                entry.users -= 1
                if not entry.users and self._entries.get(process) is not entry:
                    entry.files.close()  # dropped meanwhile

    def drop(self, process: ProcessId) -> None:
        """It is not wanted any more: close its files, or have its last user do so."""
        with self._lock:
            entry = self._entries.pop(process, None)
            if entry is not None and not entry.users:
                entry.files.close()

    def keep(self, processes: frozenset[ProcessId]) -> None:
        """Drop all others."""
        for process in self._entries.keys() - processes:
            self.drop(process)

    def close(self) -> None:
        """Close all. Safe to call twice."""
        for process in list(self._entries):
            self.drop(process)

    def _shrink(self, most: int) -> None:
        if len(self._entries) <= most:
            return
        for process, entry in list(self._entries.items()):
            if not entry.users:
                del self._entries[process]
                entry.files.close()
                if len(self._entries) <= most:
                    return


def files_allowed() -> int:
    """How many processes' files may be open at once, by the soft limit of open files as it is now."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return KEPT_MOST
    return max(KEPT_LEAST, min(KEPT_MOST, int(soft * SHARE_OF_LIMIT) // FILES_EACH))


@runtime_checkable
class FileSharingTracker(Protocol):
    """A tracker that takes open files of processes from outside."""

    def use_files(self, files: OpenProcesses) -> None:
        """From now on these, which their owner closes."""
