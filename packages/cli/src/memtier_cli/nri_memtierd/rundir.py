"""Per-container files below one directory: `RUN_DIR/NAMESPACE/POD/CONTAINER/memtierd.*`.

The directory is used if it was empty, or if it has our marker: whoever gives one that others use loses nothing. The
names come from whoever created the pod, and the directory may be on a host where others have accounts: every
step is taken from a directory file descriptor, no symbolic link is ever followed, directories are made 0700, files
are made under a temporary name and renamed, the outputs are bounded, each and together.
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

from memtier_cli.nri_memtierd.health import STATUS_NAME
from memtier_cli.nri_memtierd.runpath import RunDirError, checked_path, make_parents
from memtier_cli.nri_memtierd.safefiles import (
    DIRECTORY,
    FILE,
    cut,
    directories,
    is_private,
    make_file,
    plain,
    remove_files,
    replace_file,
    write_all,
)

CONFIG_NAME = "memtierd.config.yaml"
OUTPUT_NAME = "memtierd.output"
OLD_OUTPUT_NAME = "memtierd.output.1"
PID_NAME = "memtierd.pid"
STATS_NAME = "memtierd.stats"
MARKER_NAME = ".nri-memtierd"
MARKER_TEXT = "This directory is nri-memtierd's: it removes its files of containers that are gone.\n"
OUTPUT_BYTES_MAX = 512 << 10
"""When the output is longer it becomes memtierd.output.1; so a container takes at most twice this."""
OUTPUTS_BYTES_MAX = 64 << 20
"""For the outputs of all containers; on a small volume half of that. In the DaemonSet it is memory of the pod."""
OUTPUT_BYTES_LEAST = 4 << 10
NAME_BYTES_MAX = 255
_NAMES = (CONFIG_NAME, OUTPUT_NAME, OLD_OUTPUT_NAME, PID_NAME, STATS_NAME)
OUR_FILES = frozenset((*_NAMES, *(f"{name}.tmp" for name in _NAMES)))
"""All that is ever removed from a container's directory."""
_OF_FILE_SYSTEMS = frozenset(("lost+found",))
"""What a new file system has at its root."""
_OF_THE_PROGRAM = frozenset((MARKER_NAME, STATUS_NAME, f"{STATUS_NAME}.tmp")) | _OF_FILE_SYSTEMS
"""No namespaces, whoever calls them so: the status could not be written any more."""


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A container's names, checked: none can lead out of its directory."""

    namespace: str
    pod: str
    container: str

    def __post_init__(self) -> None:
        for what, name in zip(("namespace", "pod", "container"), self.names, strict=True):
            check_name(name, what)
        if self.namespace in _OF_THE_PROGRAM:
            raise RunDirError(f"namespace {self.namespace!r} has a name that the run directory has other use for")

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
    """The directory of all containers. One thread uses it; the outputs may be written from others.

    Nothing in it is changed before `claim`. What is not known to be ours is never removed, and no mode is changed but
    that of directories made here.
    """

    def __init__(self, path: Path) -> None:
        """Open `path`, made if it is not there: a real directory of our user.

        Raises:
            RunDirError: it is a symbolic link, no directory, another user's, or a directory of the system.
        """
        self.path = path
        self.output_bytes_max = OUTPUT_BYTES_MAX
        """For one output file from now on; see `share_outputs`."""
        self._claimed = False
        try:
            self.path = checked_path(path)  # absolute: engines in processes of their own may stand elsewhere
            make_parents(self.path)
            with contextlib.suppress(FileExistsError):
                self.path.mkdir(mode=0o700)
            self._fd = os.open(self.path, DIRECTORY)
        except OSError as error:
            raise _failure(self.path, error, "use") from None
        owner = os.fstat(self._fd).st_uid
        if owner != os.geteuid():
            self.close()
            raise RunDirError(
                f"run directory {self.path} belongs to user {owner}", hint="remove it, or choose another with -run-dir"
            )

    def close(self) -> None:
        """Give the file descriptor, and with it the claim, back. Safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def claim(self) -> None:
        """Keep other processes of the program out until this one ends, whatever way it does, and mark it as ours.

        Raises:
            RunDirError: another one is in; or it has no marker of ours and is not empty: then nothing was touched.
        """
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunDirError(
                f"run directory {self.path} is in use by another process", hint="stop it, or give another -run-dir"
            ) from None
        try:
            marked = self._is_marked()
            others = [] if marked else sorted(set(os.listdir(self._fd)) - _OF_FILE_SYSTEMS)
            if not others:
                if not marked:
                    make_file(self._fd, MARKER_NAME, MARKER_TEXT, 0o600)
                self._claimed = True
                return
        except OSError as error:
            raise _failure(self.path, error, "mark") from None
        raise RunDirError(
            f"run directory {self.path} is not empty (it has {others[0][:80]!r}) and not ours (no {MARKER_NAME})",
            hint="give -run-dir one of its own; what the Go plugin left in it is yours to remove",
        )

    def release(self) -> None:
        """At the end: without containers it is left as empty as it was found. Other people's files stay."""
        with contextlib.suppress(OSError):
            for name in (STATUS_NAME, f"{STATUS_NAME}.tmp"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=self._fd)
            if set(os.listdir(self._fd)) - _OF_FILE_SYSTEMS == {MARKER_NAME}:
                os.unlink(MARKER_NAME, dir_fd=self._fd)
        self.close()

    def write_status(self, text: str) -> None:
        """Replace the program's status file. Raises: RunDirError."""
        try:
            replace_file(self._fd, STATUS_NAME, text, 0o600)
        except OSError as error:
            raise _failure(self.path / STATUS_NAME, error, "write") from None

    def share_outputs(self, containers: int) -> None:
        """Divide the room for outputs by the containers there are: a part of the volume, at most a fixed total."""
        try:
            volume = os.fstatvfs(self._fd)
        except OSError:
            return
        total = min(OUTPUTS_BYTES_MAX, volume.f_blocks * volume.f_frsize // 2)
        share = total // (2 * max(1, containers))  # each has the output and the one before
        self.output_bytes_max = max(OUTPUT_BYTES_LEAST, min(OUTPUT_BYTES_MAX, share))

    def directory(self, place: Place) -> Path:
        """Where a container's files are, whether it exists or not."""
        return self.path.joinpath(*place.names)

    def create(self, place: Place) -> ContainerDirectory:
        """The container's directory, without the files of an earlier container. What is made is 0700.

        Raises:
            RunDirError: a part of the path is no directory, or another user's, or others can write to it, or the file
                system refuses.
        """
        fd = os.dup(self._fd)
        try:
            for name in place.names:
                made = True
                try:
                    os.mkdir(name, 0o700, dir_fd=fd)
                except FileExistsError:
                    made = False
                inner = os.open(name, DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = inner
                if made:
                    os.fchmod(fd, 0o700)  # whatever the umask is
                elif not is_private(fd):
                    raise RunDirError(
                        f"{name!r} of {self.directory(place)} is another user's, or others can write to it",
                        hint="remove it",
                    )
            remove_files(fd, OUR_FILES)
        except OSError as error:
            raise _failure(self.directory(place), error, "make") from None
        finally:
            os.close(fd)
        return ContainerDirectory(self, place)

    def remove(self, place: Place) -> None:
        """Remove the container's files and its directory, and its parents if that leaves them empty.

        A directory with something else in it stays. One that is not there is removed already.

        Raises:
            RunDirError: the file system refuses.
        """
        fds = [os.dup(self._fd)]
        try:
            for name in place.names:
                try:
                    fds.append(os.open(name, DIRECTORY, dir_fd=fds[-1]))
                except FileNotFoundError:
                    break
            else:
                remove_files(fds[-1], OUR_FILES)
            for depth in range(len(fds) - 2, -1, -1):
                os.rmdir(place.names[depth], dir_fd=fds[depth])
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                raise _failure(self.directory(place), error, "remove") from None
        finally:
            for fd in fds:
                os.close(fd)

    def move(self, files: ContainerDirectory, place: Place) -> None:
        """Rename a container's directory within its pod's; whoever has `files` goes on with them.

        Raises:
            RunDirError: the file system refuses, such as for a directory of that name with something in it.
        """
        old, fds = files.place, [os.dup(self._fd)]
        try:
            for name in old.names[:2]:
                fds.append(os.open(name, DIRECTORY, dir_fd=fds[-1]))
            files.place = place  # first: what is written meanwhile is lost, and not in another container's file
            os.rename(old.container, place.container, src_dir_fd=fds[-1], dst_dir_fd=fds[-1])
        except OSError as error:
            files.place = old
            raise _failure(self.directory(place), error, "rename") from None
        finally:
            for fd in fds:
                os.close(fd)

    def leftovers(self) -> list[Place]:
        """Containers with files of ours, or with a directory that is as we make it and empty. None without the claim.

        After the claim and before anything is made, all of them are of an earlier run.
        """
        found: list[Place] = []
        if not self._claimed:
            return found
        for namespace in directories(self._fd):
            for pod in directories(self._fd, namespace):
                found += [
                    Place(namespace, pod, name)
                    for name in directories(self._fd, namespace, pod)
                    if self._is_ours(namespace, pod, name)
                ]
        return sorted(found)

    def open_container(self, place: Place) -> int:
        """A file descriptor of the container's directory; the caller closes it. Raises: OSError."""
        fd = os.dup(self._fd)
        for name in place.names:
            try:
                inner = os.open(name, DIRECTORY, dir_fd=fd)
            finally:
                os.close(fd)
            fd = inner
        return fd

    def _is_marked(self) -> bool:
        try:
            file = os.open(MARKER_NAME, os.O_RDONLY | os.O_NONBLOCK | FILE, dir_fd=self._fd)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP):
                return False
            raise
        try:
            begins = os.read(file, len(MARKER_TEXT)) if stat.S_ISREG(os.fstat(file).st_mode) else b""
            return is_private(file) and begins == MARKER_TEXT.encode()
        finally:
            os.close(file)

    def _is_ours(self, *names: str) -> bool:
        try:
            fd = self.open_container(Place(*names))
        except (OSError, RunDirError):
            return False
        try:
            content = os.listdir(fd)
            empty = not content and is_private(fd) and not os.fstat(fd).st_mode & 0o077
            return empty or any(name in OUR_FILES for name in content)
        except OSError:
            return False
        finally:
            os.close(fd)


class ContainerDirectory:
    """One container's files. Holds no file descriptor: a node has many containers."""

    def __init__(self, run_directory: RunDirectory, place: Place) -> None:
        self._run_directory = run_directory
        self.place = place

    @property
    def path(self) -> Path:
        """The directory."""
        return self._run_directory.directory(self.place)

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
            replace_file(fd, name, text, mode)

    def read(self, name: str, bytes_max: int = 1 << 16) -> bytes | None:
        """The last `bytes_max` bytes of a plain file; None if there is none."""
        try:
            with self._opened("read") as fd:
                file = os.open(name, os.O_RDONLY | os.O_NONBLOCK | FILE, dir_fd=fd)
                try:
                    size = plain(file).st_size
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

    def append_output(self, text: str, bytes_max: int | None = None) -> None:
        """Append to memtierd.output; a full one becomes memtierd.output.1.

        Raises:
            RunDirError: also when the directory has been removed meanwhile.
        """
        bytes_max = self._run_directory.output_bytes_max if bytes_max is None else bytes_max
        data = text.encode(errors="replace")[-bytes_max:]
        with self._opened("write") as fd:
            file = _open_output(fd)
            try:
                if os.fstat(file).st_size + len(data) > bytes_max:
                    os.rename(OUTPUT_NAME, OLD_OUTPUT_NAME, src_dir_fd=fd, dst_dir_fd=fd)
                    os.close(file)
                    file = _open_output(fd)
                write_all(file, data)
            finally:
                os.close(file)

    def trim_output(self, bytes_max: int | None = None) -> bool:
        """For an output that a child process appends to: copy a full one's end aside and empty it. True if it did.

        What the child writes between the two steps is lost; it needs no signal and no new file descriptor. The one
        before is cut too, if there is less room than there was. Without room for the copy there is none.
        """
        bytes_max = self._run_directory.output_bytes_max if bytes_max is None else bytes_max
        with self._opened("trim") as fd:
            cut(fd, OLD_OUTPUT_NAME, bytes_max)
            try:
                file = os.open(OUTPUT_NAME, os.O_RDWR | os.O_NONBLOCK | FILE, dir_fd=fd)
            except FileNotFoundError:
                return False
            try:
                size = plain(file).st_size
                if size <= bytes_max:
                    return False
                end = os.pread(file, bytes_max, size - bytes_max)
                try:
                    replace_file(fd, OLD_OUTPUT_NAME, end, 0o600)
                finally:
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
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | FILE
    file = os.open(OUTPUT_NAME, flags, 0o600, dir_fd=fd)
    try:
        plain(file)
        os.fchmod(file, 0o600)
        os.set_blocking(file, True)
    except BaseException:
        os.close(file)
        raise
    return file


def _failure(path: Path, error: OSError, action: str) -> RunDirError:
    hint = None
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        hint = "a part of it is a symbolic link or no directory: remove that"
    return RunDirError(f"cannot {action} {path}: {os.strerror(error.errno or errno.EIO)}", hint=hint)
