"""Programs this host must have: found, or installed with apt when we are root, or a clear error."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from vm.harness.errors import VmError


def say(message: str) -> None:
    """Progress of long steps; standard output belongs to the guest's command."""
    print(f"vm: {message}", file=sys.stderr, flush=True)


def which(program: str) -> str | None:
    """Like shutil.which, but looks into the sbin folders too: they are not on everybody's PATH."""
    path = os.environ.get("PATH", os.defpath)
    return shutil.which(program, path=f"{path}:/usr/local/sbin:/usr/sbin:/sbin")


def run(
    command: Sequence[str | Path], *, log: Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> None:
    """Run a build step with its output in `log`.

    Raises: VmError with the end of the log when the step fails.
    """
    with log.open("ab") as file:
        file.write(f"+ {' '.join(map(str, command))}\n".encode())
        file.flush()
        done = subprocess.run(
            [str(word) for word in command],
            cwd=cwd,
            env=None if env is None else {**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode != 0:
        tail = log.read_text(errors="replace").splitlines()[-25:]
        raise VmError(f"`{command[0]}` failed with status {done.returncode}:\n" + "\n".join(tail))


def apt_install(packages: Iterable[str]) -> None:
    """Install Debian packages on this host.

    Raises: VmError when this is not root or not an apt system, with the command to type instead.
    """
    names = sorted(set(packages))
    hint = f"as root: apt-get install {' '.join(names)}"
    if os.geteuid() != 0 or which("apt-get") is None:
        raise VmError(f"the test VM needs {', '.join(names)}", hint=hint)
    say(f"installing {' '.join(names)}")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        ["apt-get", "update", "-qq"],
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *names],
    ):
        done = subprocess.run(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if done.returncode != 0 and "install" in command:
            tail = done.stdout.decode(errors="replace")[-2000:]
            raise VmError(f"apt-get could not install {', '.join(names)}:\n{tail}", hint=hint)


def require(programs: Mapping[str, str]) -> None:
    """Make sure that every program (key) is there; the value names the Debian package that brings it."""
    if missing := {package for program, package in programs.items() if which(program) is None}:
        apt_install(missing)
        if still := [program for program in programs if which(program) is None]:
            raise VmError(f"still not found after the installation: {', '.join(still)}")
