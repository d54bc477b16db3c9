"""A running VM: start it, run commands in it one after the other, get rid of it whatever happens.

Every wait has a deadline. QEMU gets a parent-death signal, so that it goes even when this process is killed
with SIGKILL; the run folder it leaves then is removed by the next run.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import os
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from vm.harness.build import Parts, with_distribution_kernel
from vm.harness.disks import make_swap
from vm.harness.errors import VmError, VmTimeout
from vm.harness.qemu import (
    DISTRIBUTION_ARGUMENTS,
    KERNEL_ARGUMENTS,
    Machine,
    Writes,
    default_nodes,
    parse_nodes,
)

BOOT_TIMEOUT_S = 180.0
"""A boot takes 5 s under emulation on an idle machine; this is for one that is busy with something else."""

OFF_TIMEOUT_S = 5.0
_RUN_PREFIX = "memtier-vm."

Sink = Callable[[bytes], object]
Command = str | Sequence[str]


@dataclass(frozen=True, slots=True)
class Result:
    """What a guest command gave: exit status as a shell sees it, all output bytes, host seconds it took."""

    status: int
    output: bytes
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The shape of the machine."""

    smp: int = 2
    nodes: str | None = None
    """NUMA nodes as "MIB:CPUS ..."; None: four nodes, two of them with CPUs."""
    swap_mib: int = 1024
    """Size of the swap disk; 0: no swap."""
    scratch: bool = True
    """A disk for containerd's state under /var/lib/containerd, thrown away afterwards."""
    append: str = ""
    """More kernel arguments."""
    distribution: bool = False
    """Boot the kernel that Debian ships, as it comes: randomized addresses and all. Ours: fixed addresses."""
    out: Path | None = None
    """A host folder that the guest sees, writable, as /out; None: /out is in the guest's memory."""


class Vm:
    """One guest. Use as a context manager: it is booted inside, and gone after."""

    def __init__(
        self,
        parts: Parts,
        options: Options | None = None,
        *,
        terminal: bool = False,
        boot_timeout_s: float = BOOT_TIMEOUT_S,
    ) -> None:
        self._parts = parts
        self._options = options or Options()
        self._terminal = terminal
        self._boot_timeout_s = min(boot_timeout_s, BOOT_TIMEOUT_S)
        self._qemu: subprocess.Popen[bytes] | None = None
        self._stack = contextlib.ExitStack()
        self._control_buffer = b""
        self.boot_seconds = 0.0
        """From the start of QEMU until the guest took commands."""

    def __enter__(self) -> Vm:
        try:
            self.boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def boot(self) -> None:
        """Start QEMU and wait until the guest takes commands.

        Raises: VmTimeout, or VmError with the end of the guest's console if it died.
        """
        started = time.monotonic()
        options, parts = self._options, self._parts
        nodes = parse_nodes(options.nodes or default_nodes(options.smp), options.smp)
        self._folder = self._make_run_folder()
        if options.distribution:
            parts = with_distribution_kernel(parts, self._folder)
        shares = {"host": (parts.repo, False)}
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            shares["out"] = (options.out.absolute(), True)
        disks = {"root": (parts.rootfs, Writes.REFUSED), "layer": (parts.layer, Writes.REFUSED)}
        if options.swap_mib:
            make_swap(self._folder / "swap.img", options.swap_mib)
            disks["swap"] = (self._folder / "swap.img", Writes.KEPT)
        if options.scratch:
            disks["scratch"] = (parts.scratch, Writes.DROPPED)
        self._control, control_end = self._socket_pair()
        self._output, output_end = self._socket_pair()
        machine = Machine(
            qemu=parts.qemu,
            accelerator=parts.accelerator,
            kernel=parts.kernel,
            initramfs=parts.initramfs,
            console_log=self._folder / "console.log",
            smp=options.smp,
            nodes=nodes,
            control_fd=control_end.fileno(),
            output_fd=output_end.fileno(),
            shares=shares,
            disks=disks,
            arguments=DISTRIBUTION_ARGUMENTS if options.distribution else KERNEL_ARGUMENTS,
            append=options.append,
            terminal=self._terminal,
        )
        self._start(machine.command(), [control_end, output_end])
        self._control.setblocking(False)
        self._output.setblocking(False)
        self._wait_for("ready", started + self._boot_timeout_s, lambda data: None, what="boot")
        self.boot_seconds = time.monotonic() - started

    def run(self, command: Command, timeout_s: float, sink: Sink | None = None) -> Result:
        """Run a shell command (or an argument list) in the guest, in /host, with no standard input.

        Args:
            timeout_s: host seconds; the whole VM is killed when they are over.
            sink: gets the output as it comes; it is collected in the result in any case.
        Raises:
            VmTimeout: time is over; carries the output so far.
            VmError: the guest died; the message ends with its last console lines.
        """
        script = command if isinstance(command, str) else shlex.join(command)
        started = time.monotonic()
        collected = bytearray()

        def take(data: bytes) -> None:
            collected.extend(data)
            if sink is not None:
                sink(data)

        deadline = started + timeout_s
        self._send(f"run {base64.b64encode(script.encode()).decode()}", deadline)
        try:
            fields = self._wait_for("exit", deadline, take, what=f"command `{script[:60]}`")
        except VmTimeout as error:
            raise VmTimeout(str(error), output=bytes(collected)) from None
        return Result(int(fields[1]), bytes(collected), time.monotonic() - started)

    def shell(self) -> int:
        """An interactive shell on this process's terminal, until it exits. Returns its status."""
        columns, rows = shutil.get_terminal_size()
        term = os.environ.get("TERM", "dumb")
        self._send(f"shell {rows} {columns} {term}", time.monotonic() + 10)
        return int(self._wait_for("exit", None, lambda data: None, what="shell")[1])

    def close(self) -> None:
        """Switch the guest off and remove all that the run left. Safe to call twice."""
        if self._qemu is not None and self._qemu.poll() is None:
            with contextlib.suppress(VmError, OSError, subprocess.TimeoutExpired):
                self._send("off", time.monotonic() + 1)
                self._qemu.wait(OFF_TIMEOUT_S)
        self.kill()
        self._stack.close()

    def kill(self) -> None:
        """End QEMU now."""
        if self._qemu is not None:
            self._qemu.kill()
            self._qemu.wait()

    # -- the parts of a run ----------------------------------------------------------------------

    def _make_run_folder(self) -> Path:
        sweep_run_folders()
        folder = Path(tempfile.mkdtemp(prefix=_RUN_PREFIX))
        self._stack.callback(shutil.rmtree, folder, ignore_errors=True)
        lock = self._stack.enter_context((folder / "lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        return folder

    def _socket_pair(self) -> tuple[socket.socket, socket.socket]:
        ours, theirs = socket.socketpair()
        self._stack.enter_context(ours)
        return ours, theirs

    def _start(self, command: list[str], inherited: Sequence[socket.socket]) -> None:
        """Start QEMU, which dies with us and holds `inherited`; our copies of those are closed."""
        with (self._folder / "qemu.log").open("wb") as log:
            self._qemu = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=None if self._terminal else subprocess.DEVNULL,
                stdout=None if self._terminal else log,
                stderr=log,
                pass_fds=[end.fileno() for end in inherited],
                start_new_session=not self._terminal,  # Ctrl-C is for us only
            )
        for end in inherited:
            end.close()

    def _send(self, line: str, deadline: float) -> None:
        data = f"{line}\n".encode()
        try:
            while data:
                if time.monotonic() > deadline:
                    raise VmTimeout("the guest does not take commands")
                try:
                    data = data[self._control.send(data) :]
                except BlockingIOError:
                    time.sleep(0.01)
        except OSError as error:
            raise self._died(f"sending a command: {error}") from None

    def _wait_for(self, verb: str, deadline: float | None, take: Sink, *, what: str) -> list[str]:
        """Hand output to `take` until the guest says `verb`. Returns the words of its line."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(self._output, selectors.EVENT_READ)
            while True:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    self.kill()
                    raise VmTimeout(f"{what}: time is over, the VM was killed")
                ready = {key.fileobj for key, _ in selector.select(left)}
                if self._output in ready:
                    self._drain(take, once=True)
                if self._control in ready:
                    data = self._control.recv(65536)
                    if not data:
                        self._drain(take)
                        raise self._died(f"{what}: the guest went away")
                    self._control_buffer += data
                while b"\n" in self._control_buffer:
                    line, _, self._control_buffer = self._control_buffer.partition(b"\n")
                    words = line.decode(errors="replace").split()
                    if words and words[0] == verb:
                        # The guest's write to `out` ended after QEMU had passed it on: all bytes are here.
                        self._drain(take)
                        return words

    def _drain(self, take: Sink, *, once: bool = False) -> None:
        while True:
            try:
                data = self._output.recv(1 << 20)
            except BlockingIOError:
                return
            if data:
                take(data)
            if once or not data:
                return

    def _died(self, what: str) -> VmError:
        self.kill()
        logs = []
        for name in ("qemu.log", "console.log"):
            path = self._folder / name
            if path.exists() and (text := path.read_text(errors="replace").strip()):
                logs.append(f"--- {name}\n" + "\n".join(text.splitlines()[-20:]))
        return VmError("\n".join([what, *logs]))


def sweep_run_folders(base: Path | None = None) -> list[Path]:
    """Remove the run folders of owners that went without cleaning up, by SIGKILL. Returns those removed."""
    removed = []
    for folder in (base or Path(tempfile.gettempdir())).glob(f"{_RUN_PREFIX}*"):
        try:
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
                continue
            with (folder / "lock").open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: it is in use
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder)
        except OSError:
            continue
    return removed


def exit_on_signals(signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGHUP)) -> None:
    """Make these signals raise SystemExit(128 + number), so that context managers clean up."""

    def leave(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    for each in signals:
        signal.signal(each, leave)
