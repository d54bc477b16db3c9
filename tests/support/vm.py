"""For tests in tests/e2e: run commands and guest-side test scripts in the test VM.

A boot costs about five seconds under emulation, so scenarios that leave the guest as they found it share one:
`VmSession` boots on first use, and again only for another machine shape or after a command ran out of time.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from vm.harness.build import Parts, prepare
from vm.harness.errors import VmTimeout
from vm.harness.machine import Options, Vm

GUEST_SCRIPTS = "/host/tests/e2e/guest"
TIMED_OUT = 124

Command = str | Sequence[str]


@dataclass(frozen=True, slots=True)
class VmResult:
    """What a guest command gave."""

    status: int
    """Exit status as a shell sees it; 124 when it ran out of time."""
    output: str
    seconds: float
    """Host seconds, without the boot."""

    @property
    def timed_out(self) -> bool:
        """Whether the VM was killed because the time was over."""
        return self.status == TIMED_OUT

    def check(self) -> VmResult:
        """Itself, when the command succeeded. Raises: AssertionError with the output otherwise."""
        if self.status != 0:
            raise AssertionError(f"guest command ended with status {self.status}:\n{self.output[-8000:]}")
        return self

    def records(self) -> list[dict[str, Any]]:
        """The output's lines that are JSON objects, in order; other lines are a script's free text.

        Raises:
            AssertionError: a line begins as a scenario's record and is none: two were written into each other.
        """
        found = []
        for line in self.output.splitlines():
            if line.startswith("{"):
                try:
                    value = json.loads(line)
                except ValueError as error:
                    if line.startswith('{"kind":'):
                        raise AssertionError(f"a record that cannot be read ({error}):\n{line}") from None
                    continue
                found.append(value)
        return found

    def record(self, kind: str) -> dict[str, Any]:
        """The one record whose "kind" is `kind`. Raises: AssertionError if there is not one."""
        found = [each for each in self.records() if each.get("kind") == kind]
        if len(found) != 1:
            raise AssertionError(f"{len(found)} records of kind {kind!r} in:\n{self.output[-8000:]}")
        return found[0]


class VmSession:
    """Runs commands in a guest that stays up between them."""

    def __init__(self, parts: Parts | None = None) -> None:
        self._parts = parts
        self._vm: Vm | None = None
        self._options: Options | None = None
        self.boots = 0
        """How often a guest was started so far."""

    def __enter__(self) -> VmSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(
        self,
        command: Command,
        *,
        timeout_s: float = 120,
        nodes: str | None = None,
        smp: int = 2,
        swap_mib: int = 1024,
        append: str = "",
        distribution: bool = False,
        out: Path | None = None,
        env: Mapping[str, str] | None = None,
        fresh: bool = False,
    ) -> VmResult:
        """Run a shell command, or an argument list, in the guest's /host (the checkout, read-only).

        Args:
            timeout_s: host seconds for the command; a boot has a time limit of its own.
            nodes: NUMA nodes as "MIB:CPUS ..."; None: 1024:0 512:1 and two of 512 without CPUs.
            append: more kernel arguments.
            distribution: boot the kernel that Debian ships instead of ours.
            out: a folder of this machine that the guest sees, writable, as /out.
            env: more environment variables.
            fresh: boot a new guest even if one of this shape is up.
        Raises:
            VmError: the guest could not be built or booted, or it died; the message has its last words.
        """
        options = Options(smp=smp, nodes=nodes, swap_mib=swap_mib, append=append, distribution=distribution, out=out)
        vm = self._booted(options, fresh)
        started = time.monotonic()
        try:
            result = vm.run(_script(command, env), timeout_s)
        except VmTimeout as timeout:
            self.close()
            text = timeout.output.decode(errors="replace")
            return VmResult(TIMED_OUT, f"{text}\n{timeout}\n", time.monotonic() - started)
        except BaseException:
            self.close()
            raise
        return VmResult(result.status, result.output.decode(errors="replace"), result.seconds)

    def run_script(
        self,
        name: str,
        *arguments: str,
        timeout_s: float = 120,
        nodes: str | None = None,
        smp: int = 2,
        swap_mib: int = 1024,
        append: str = "",
        distribution: bool = False,
        fresh: bool = False,
    ) -> VmResult:
        """Run tests/e2e/guest/NAME in the guest's Python; it prints a JSON object per result line.

        The script can import our packages as installed, and `support` and `vm` from the checkout's tests.
        """
        return self.run(
            ["python3", "-u", f"{GUEST_SCRIPTS}/{name}", *arguments],
            timeout_s=timeout_s,
            nodes=nodes,
            smp=smp,
            swap_mib=swap_mib,
            append=append,
            distribution=distribution,
            env={"PYTHONPATH": "/host/tests", "PYTHONDONTWRITEBYTECODE": "1"},
            fresh=fresh,
        )

    def close(self) -> None:
        """Switch the guest off. The next command boots another."""
        if self._vm is not None:
            self._vm.close()
        self._vm = None

    def _booted(self, options: Options, fresh: bool) -> Vm:
        if self._vm is not None and not fresh and options == self._options:
            return self._vm
        self.close()
        if self._parts is None:
            self._parts = prepare()
        vm = Vm(self._parts, options)
        vm.__enter__()
        self._vm, self._options = vm, options
        self.boots += 1
        return vm


def run_in_vm(
    command: Command,
    *,
    timeout_s: float = 120,
    nodes: str | None = None,
    smp: int = 2,
    swap_mib: int = 1024,
    append: str = "",
) -> VmResult:
    """Boot a guest for this one command. For what it takes and raises see VmSession.run."""
    with VmSession() as session:
        return session.run(command, timeout_s=timeout_s, nodes=nodes, smp=smp, swap_mib=swap_mib, append=append)


def run_guest_script(name: str, *arguments: str, timeout_s: float = 120, **shape: Any) -> list[dict[str, Any]]:
    """Boot a guest for tests/e2e/guest/NAME. Returns its records; fails with its output if it failed."""
    with VmSession() as session:
        return session.run_script(name, *arguments, timeout_s=timeout_s, **shape).check().records()


def _script(command: Command, env: Mapping[str, str] | None) -> str:
    text = command if isinstance(command, str) else shlex.join(command)
    exports: Iterable[str] = (f"export {name}={shlex.quote(value)}" for name, value in (env or {}).items())
    return "\n".join([*exports, text])
