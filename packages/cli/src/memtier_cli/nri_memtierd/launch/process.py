"""Engines as processes: one `memtierd -c "" -config FILE` per container, as the reference launches them."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path

from loguru import logger

from memtier_cli.nri_memtierd.config import PluginConfig
from memtier_cli.nri_memtierd.launch.base import Job
from memtier_cli.nri_memtierd.rundir import CONFIG_NAME, OUTPUT_NAME, PID_NAME, ContainerDirectory, RunDirectory
from memtier_engine.config.files import parse
from memtier_engine.config.routines import NOT_ALLOWED
from memtier_engine.errors import ConfigError, MemtierError

PROGRAM = "memtierd"
_ARGUMENTS = ("-c", "", "-config")
_COMMAND_BYTES = 64 << 10
"""Ours are shorter. A process can make its command line terabytes long, by prctl(PR_SET_MM_MAP)."""
TERMINATE_S = 2.0
"""A process that was asked to end has this long."""


def check_template(text: str) -> None:
    """Whether memtierd takes a template with values in it: all that it does, programs too. Raises: ConfigError."""
    try:
        parse(text)
    except ConfigError as failure:
        if failure.hint != NOT_ALLOWED:
            raise
        raise ConfigError(
            "put `allowprograms: true` at the top of the template: a routine runs a program",
            key_path=failure.key_path,
            file=failure.file,
            line=failure.line,
            hint="memtierd runs it as root for every pod that names the class",
        ) from None


class LaunchError(MemtierError):
    """memtierd cannot be started."""


class ProcessLauncher:
    """Makes engines that are processes of their own."""

    def __init__(self, *, debug_output: bool = False, program: str = PROGRAM) -> None:
        self._debug_output = debug_output
        self._program = program
        self._leaving: list[ProcessEngine] = []

    def clean(self, run_directory: RunDirectory) -> None:
        """End the processes that an earlier run left behind, recognized by their command line and root."""
        for pid in find_leftovers(run_directory.path):
            logger.warning("process {}: ended, an earlier run left it behind", pid)
            _kill_leftover(pid, run_directory.path)

    def configure(self, config: PluginConfig) -> None:
        """Processes do not share a budget: say so."""
        if config.bandwidth_mib_per_s is not None:
            logger.warning("bandwidth: a node-wide limit needs --engine=in-process; it has no effect here")

    def launch(self, job: Job) -> ProcessEngine:
        """Start memtierd.

        Raises:
            LaunchError: it is not on PATH or cannot be executed.
        """
        program = shutil.which(self._program)
        if program is None:
            raise LaunchError(f"{self._program} is not on PATH", hint="install it, or use --engine=in-process")
        arguments = [program, *_ARGUMENTS, str(job.files.path / CONFIG_NAME)]
        if self._debug_output:
            arguments.append("-debug")
        output = job.files.open_output()
        try:
            process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        except OSError as error:
            raise LaunchError(f"{program} cannot be started: {error.strerror}") from None
        finally:
            os.close(output)
        with contextlib.suppress(MemtierError):
            job.files.write(PID_NAME, f"{process.pid}\n", 0o400)
        return ProcessEngine(self, process, job.files)

    def leaving(self, engine: ProcessEngine) -> None:
        """It was asked to end: to be reaped."""
        self._leaving.append(engine)

    def tend(self) -> bool:
        """Reap those that have ended; True if some have not."""
        self._reap()
        return bool(self._leaving)

    def close(self, timeout_s: float) -> None:
        """Wait for those that were asked to end; kill the rest."""
        end_s = time.monotonic() + min(timeout_s, TERMINATE_S)
        while self._leaving and time.monotonic() < end_s:
            self._reap()
            time.sleep(0.02)
        for engine in self._leaving:
            engine.kill()
        self._leaving.clear()

    def _reap(self) -> None:
        self._leaving = [engine for engine in self._leaving if not engine.reaped()]


class ProcessEngine:
    """A memtierd process."""

    def __init__(self, launcher: ProcessLauncher, process: subprocess.Popen[bytes], files: ContainerDirectory) -> None:
        self._launcher = launcher
        self._process = process
        self._files = files
        self._kill_s = 0.0

    def ended(self) -> str | None:
        """Its exit status and last words; None while it runs."""
        status = self._process.poll()
        if status is None:
            return None
        words = (self._files.read(OUTPUT_NAME, 2000) or b"").decode(errors="replace").strip().splitlines()
        last = f": {words[-1][:200]}" if words else ""
        what = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return f"memtierd ended with {what}{last}"

    def stop(self) -> None:
        """Ask it to end."""
        self._process.terminate()
        self._kill_s = time.monotonic() + TERMINATE_S
        self._launcher.leaving(self)

    def tend(self) -> None:
        """Bound its output."""
        self._files.trim_output()

    def reaped(self) -> bool:
        """Whether it has ended; one that was asked long ago is killed."""
        if self._process.poll() is not None:
            return True
        if time.monotonic() >= self._kill_s:
            self.kill()
            return True
        return False

    def kill(self) -> None:
        """End it by force and reap it."""
        self._process.kill()
        self._process.wait()


def find_leftovers(run_directory: Path, proc: Path = Path("/proc")) -> list[int]:
    """Processes in our own root whose command line is a memtierd's with a file below `run_directory`."""
    found = []
    for entry in proc.iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid() and _is_ours(entry, run_directory):
            found.append(int(entry.name))
    return sorted(found)


def _is_ours(process: Path, run_directory: Path) -> bool:
    try:
        # In another root, such a path is another file, and the process none of ours. Asked first: a command line lies
        # in the process's own memory, and one in a container may keep who reads it waiting (FUSE).
        if not os.path.samestat((process / "root").stat(), Path("/proc/self/root").stat()):
            return False
        with (process / "cmdline").open("rb", buffering=0) as file:
            words = file.read(_COMMAND_BYTES).split(b"\0")
    except OSError:
        return False
    before = [word.encode() for word in _ARGUMENTS]
    prefix = os.fsencode(run_directory) + b"/"
    for index in range(len(words) - len(before)):
        if words[index : index + len(before)] == before:
            path = words[index + len(before)]
            return path.startswith(prefix) and path.endswith(b"/" + CONFIG_NAME.encode())
    return False


def _kill_leftover(pid: int, run_directory: Path) -> None:
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return
    try:
        if not _is_ours(Path(f"/proc/{pid}"), run_directory):  # the pid may have been given to another meanwhile
            return
        signal.pidfd_send_signal(handle, signal.SIGTERM)
        if not select.select([handle], [], [], TERMINATE_S)[0]:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            select.select([handle], [], [], TERMINATE_S)
    except OSError:
        pass
    finally:
        os.close(handle)
