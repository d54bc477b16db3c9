"""Per-container files below one directory: `RUN_DIR/NAMESPACE/POD/CONTAINER/memtierd.*`.

The names come from whoever created the pod, and the directory may be on a host where others have accounts: every
step is taken from a directory file descriptor, no symbolic link is ever followed, directories are 0700, files
are made under a temporary name and renamed, the output is bounded.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from memtier_engine.errors import MemtierError

CONFIG_NAME = "memtierd.config.yaml"
OUTPUT_NAME = "memtierd.output"
OLD_OUTPUT_NAME = "memtierd.output.1"
PID_NAME = "memtierd.pid"
STATS_NAME = "memtierd.stats"
OUTPUT_BYTES_MAX = 512 << 10
"""When the output is longer it becomes memtierd.output.1; so a container takes at most twice this."""
NAME_BYTES_MAX = 255

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_NOFOLLOW | os.O_CLOEXEC


class RunDirError(MemtierError):
    """A name, a file or a directory that is not safe to use, or that the file system refuses."""


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A container's names, checked: none can lead out of its directory."""

    namespace: str
    pod: str
    container: str

    def __post_init__(self) -> None:
        for what, name in zip(("namespace", "pod", "container"), self.names, strict=True):
            check_name(name, what)

    @property
    def names(self) -> tuple[str, str, str]:
        """From the outermost in."""
        return (self.namespace, self.pod, self.container)

    def __str__(self) -> str:
        return f"{self.namespace}/{self.pod}:{self.container}"


def check_name(name: str, what: str) -> None:
    """Raise RunDirError unless `name` can only be one entry of a directory."""
    bad = name in ("", ".", "..") or "/" in name or "\0" in name
    try:
        bad = bad or len(os.fsencode(name)) > NAME_BYTES_MAX
    except UnicodeEncodeError:
        bad = True
    if bad:
        raise RunDirError(f"{what} name {name[:80]!r} cannot be the name of a directory")


class RunDirectory:
    """The directory of all containers. One thread uses it; the outputs may be written from others."""

    def __init__(self, path: Path) -> None:
        """Make or check `path`: a real directory of ours that nobody else can write to. It becomes 0700.

        Raises:
            RunDirError: it is a symbolic link, no directory, or another user's.
        """
        self.path = path
        try:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o700)
            self._fd = os.open(path, _DIRECTORY)
        except OSError as error:
            raise _failure(path, error, "use") from None
        owner = os.fstat(self._fd).st_uid
        if owner != os.geteuid():
            self.close()
            raise RunDirError(
                f"run directory {path} belongs to user {owner}", hint="remove it, or choose another with -run-dir"
            )
        os.fchmod(self._fd, 0o700)

    def close(self) -> None:
        """Give the file descriptor back. Safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def lock(self) -> None:
        """Keep other processes of the program out, until this one ends, whatever way it does.

        Raises:
            RunDirError: another one is in.
        """
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunDirError(
                f"run directory {self.path} is in use by another process", hint="stop it, or give another -run-dir"
            ) from None

    def directory(self, place: Place) -> Path:
        """Where a container's files are, whether it exists or not."""
        return self.path.joinpath(*place.names)

    def create(self, place: Place) -> ContainerDirectory:
        """The container's directory, made or tightened to 0700, without the files of an earlier container.

        Raises:
            RunDirError: a part of the path is no directory, or the file system refuses.
        """
        fd = os.dup(self._fd)
        try:
            for name in place.names:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=fd)
                inner = os.open(name, _DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = inner
                os.fchmod(fd, 0o700)
            _remove_content(fd)
        except OSError as error:
            raise _failure(self.directory(place), error, "make") from None
        finally:
            os.close(fd)
        return ContainerDirectory(self, place)

    def existing(self, place: Place) -> ContainerDirectory:
        """The container's directory as it is."""
        return ContainerDirectory(self, place)

    def remove(self, place: Place) -> None:
        """Remove the container's directory with all in it, and its parents if that leaves them empty.

        Raises:
            RunDirError: the file system refuses. A directory that is not there is removed already.
        """
        fds = [os.dup(self._fd)]
        try:
            for name in place.names:
                try:
                    fds.append(os.open(name, _DIRECTORY, dir_fd=fds[-1]))
                except FileNotFoundError:
                    break
            else:
                _remove_content(fds[-1])
            for depth in range(len(fds) - 2, -1, -1):
                os.rmdir(place.names[depth], dir_fd=fds[depth])
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                raise _failure(self.directory(place), error, "remove") from None
        finally:
            for fd in fds:
                os.close(fd)

    def places(self) -> list[Place]:
        """All containers that have a directory, also those that an earlier run of the program left."""
        found = []
        for namespace in _directories(self._fd):
            for pod in _directories(self._fd, namespace):
                found += [Place(namespace, pod, name) for name in _directories(self._fd, namespace, pod)]
        return sorted(found)

    def open_container(self, place: Place) -> int:
        """A file descriptor of the container's directory; the caller closes it. Raises: OSError."""
        fd = os.dup(self._fd)
        for name in place.names:
            try:
                inner = os.open(name, _DIRECTORY, dir_fd=fd)
            finally:
                os.close(fd)
            fd = inner
        return fd


class ContainerDirectory:
    """One container's files. Holds no file descriptor: a node has many containers."""

    def __init__(self, run_directory: RunDirectory, place: Place) -> None:
        self._run_directory = run_directory
        self.place = place
        self.path = run_directory.directory(place)

    @property
    def config_path(self) -> Path:
        """The instantiated template."""
        return self.path / CONFIG_NAME

    @property
    def stats_path(self) -> Path:
        """What templates get as $MEMTIERD_SWAP_STATS_PATH."""
        return self.path / STATS_NAME

    def write(self, name: str, text: str, mode: int) -> None:
        """Make or replace a file as a whole.

        Raises:
            RunDirError: the file system refuses.
        """
        with self._opened("write") as fd:
            temporary = f"{name}.tmp"
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=fd)
            file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FILE, mode, dir_fd=fd)
            try:
                os.fchmod(file, mode)  # whatever the umask is
                _write_all(file, text.encode())
            finally:
                os.close(file)
            os.rename(temporary, name, src_dir_fd=fd, dst_dir_fd=fd)

    def read(self, name: str, bytes_max: int = 1 << 16) -> bytes | None:
        """The last `bytes_max` bytes of a plain file; None if there is none."""
        try:
            with self._opened("read") as fd:
                file = os.open(name, os.O_RDONLY | os.O_NONBLOCK | _FILE, dir_fd=fd)
                try:
                    size = _plain(file).st_size
                    return os.pread(file, bytes_max, max(0, size - bytes_max))
                finally:
                    os.close(file)
        except RunDirError:
            return None

    def open_output(self) -> int:
        """memtierd.output for appending, as a file descriptor that the caller closes.

        Raises:
            RunDirError: the file system refuses, or it is not a plain file.
        """
        with self._opened("write") as fd:
            return _open_output(fd)

    def append_output(self, text: str, bytes_max: int = OUTPUT_BYTES_MAX) -> None:
        """Append to memtierd.output; a full one becomes memtierd.output.1.

        Raises:
            RunDirError: also when the directory has been removed meanwhile.
        """
        data = text.encode(errors="replace")[-bytes_max:]
        with self._opened("write") as fd:
            file = _open_output(fd)
            try:
                if os.fstat(file).st_size + len(data) > bytes_max:
                    os.rename(OUTPUT_NAME, OLD_OUTPUT_NAME, src_dir_fd=fd, dst_dir_fd=fd)
                    os.close(file)
                    file = _open_output(fd)
                _write_all(file, data)
            finally:
                os.close(file)

    def trim_output(self, bytes_max: int = OUTPUT_BYTES_MAX) -> bool:
        """For an output that a child process appends to: copy a full one's end aside and empty it. True if it did.

        What the child writes between the two steps is lost; it needs no signal and no new file descriptor.
        """
        with self._opened("trim") as fd:
            try:
                file = os.open(OUTPUT_NAME, os.O_RDWR | os.O_NONBLOCK | _FILE, dir_fd=fd)
            except FileNotFoundError:
                return False
            try:
                size = _plain(file).st_size
                if size <= bytes_max:
                    return False
                end = os.pread(file, bytes_max, size - bytes_max)
                self.write(OLD_OUTPUT_NAME, "", 0o600)
                old = os.open(OLD_OUTPUT_NAME, os.O_WRONLY | _FILE, dir_fd=fd)
                try:
                    _write_all(old, end)
                finally:
                    os.close(old)
                os.ftruncate(file, 0)
                return True
            finally:
                os.close(file)

    @contextlib.contextmanager
    def _opened(self, action: str) -> Iterator[int]:
        fd = -1
        try:
            fd = self._run_directory.open_container(self.place)
            yield fd
        except OSError as error:
            raise _failure(self.path, error, action) from None
        finally:
            if fd >= 0:
                os.close(fd)


def _open_output(fd: int) -> int:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | _FILE
    file = os.open(OUTPUT_NAME, flags, 0o600, dir_fd=fd)
    try:
        _plain(file)
        os.fchmod(file, 0o600)
        os.set_blocking(file, True)
    except BaseException:
        os.close(file)
        raise
    return file


def _plain(file: int) -> os.stat_result:
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a plain file")
    return found


def _directories(fd: int, *names: str) -> list[str]:
    """Names of the real directories in a directory below `fd`; those that vanish are left out."""
    opened = [os.dup(fd)]
    try:
        for name in names:
            opened.append(os.open(name, _DIRECTORY, dir_fd=opened[-1]))
        with os.scandir(opened[-1]) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    finally:
        for each in opened:
            os.close(each)


def _remove_content(fd: int) -> None:
    with os.scandir(fd) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_directory in found:
        if is_directory:
            inner = os.open(name, _DIRECTORY, dir_fd=fd)
            try:
                _remove_content(inner)
            finally:
                os.close(inner)
            os.rmdir(name, dir_fd=fd)
        else:
            os.unlink(name, dir_fd=fd)


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _failure(path: Path, error: OSError, action: str) -> RunDirError:
    hint = None
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        hint = "a part of it is a symbolic link or no directory: remove that"
    return RunDirError(f"cannot {action} {path}: {os.strerror(error.errno or errno.EIO)}", hint=hint)
