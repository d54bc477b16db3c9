"""Command lines of tests/vm/run and tests/vm/build."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vm.harness import distribution, host, kernel, rootfs
from vm.harness.build import REPO, prepare
from vm.harness.cache import Cache, default_root
from vm.harness.errors import VmError, VmTimeout
from vm.harness.machine import Options, Vm, exit_on_signals

TIMED_OUT = 124
VM_FAILED = 125
"""Exit statuses of our own, as `timeout` and `docker run` use them."""


def run_main(arguments: Sequence[str] | None = None) -> int:
    """tests/vm/run: a command in the guest; its output and exit status are ours."""
    parser = argparse.ArgumentParser(
        prog="tests/vm/run",
        description="Boots the test VM, runs a command in its /host (the checkout), exits with its status.",
        epilog=f"Exits {TIMED_OUT} when the time is over and {VM_FAILED} when the VM itself failed.",
    )
    parser.add_argument("--timeout", type=float, default=600, metavar="S", help="for boot and command; default 600")
    parser.add_argument("--nodes", metavar="SPEC", help='NUMA nodes as MIB:CPUS, default "1024:0 512:1 512: 512:"')
    parser.add_argument("--smp", type=int, default=2, metavar="N", help="number of CPUs, default 2")
    parser.add_argument("--swap", type=int, default=1024, metavar="MIB", help="size of the swap disk, 0 for none")
    parser.add_argument("--append", default="", metavar="ARGS", help="more kernel arguments")
    parser.add_argument("--distribution", action="store_true", help="boot the kernel that Debian ships instead of ours")
    parser.add_argument("--out", type=Path, metavar="DIR", help="host folder that the guest sees writable as /out")
    parser.add_argument("--shell", action="store_true", help="an interactive shell instead of a command")
    parser.add_argument("--verbose", action="store_true", help="say how long the boot and the command took")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="CMD", help="one word is a shell script")
    given = parser.parse_args(arguments)
    if given.command[:1] == ["--"]:
        del given.command[0]
    if given.shell == bool(given.command):
        parser.error("give either a command or --shell")
    if given.shell and not sys.stdin.isatty():
        parser.error("--shell needs a terminal")
    options = Options(
        smp=given.smp,
        nodes=given.nodes,
        swap_mib=given.swap,
        append=given.append,
        distribution=given.distribution,
        out=given.out,
        scratch=True,
    )
    exit_on_signals()
    try:
        return _run(given, options)
    except VmTimeout as error:
        host.say(f"error: {error}")
        return TIMED_OUT
    except VmError as error:
        host.say(f"error: {error}")
        return VM_FAILED
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at exit
        return 141


def _run(given: argparse.Namespace, options: Options) -> int:
    parts = prepare()
    started = time.monotonic()  # building the parts is not on the clock of --timeout
    with Vm(parts, options, terminal=given.shell, boot_timeout_s=given.timeout) as vm:
        if given.shell:
            host.say(f"a shell in the test VM ({parts.accelerator}); /host is the checkout; leave with `exit`")
            return vm.shell()
        command = given.command[0] if len(given.command) == 1 else given.command
        left = given.timeout - (time.monotonic() - started)
        result = vm.run(command, left, sink=_write_all)
        if given.verbose:
            host.say(f"{parts.accelerator}: boot {vm.boot_seconds:.1f} s, command {result.seconds:.1f} s")
        return result.status


def _write_all(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def build_main(arguments: Sequence[str] | None = None) -> int:
    """tests/vm/build: make what a boot needs, and say where it is."""
    parser = argparse.ArgumentParser(
        prog="tests/vm/build",
        description="Builds what the cache lacks of the test VM: kernel, root filesystem, our packages.",
        epilog="The cache is $MEMTIER_VM_CACHE, else ~/.cache/memtier/vm.",
    )
    parser.add_argument("--fresh", action="store_true", help="take today's packages of Debian")
    parser.add_argument("--no-seed", action="store_true", help="compile the kernel even if a ready one is at hand")
    given = parser.parse_args(arguments)
    exit_on_signals()
    try:
        cache = Cache(default_root())
        if given.fresh:
            for kind in ("rootimage", "rootfs"):
                cache.drop(kind, rootfs.rootfs_key())
            cache.drop("distribution", distribution.distribution_key())
        if given.no_seed:
            fragment = REPO / "tests/vm/kernel.config"
            cache.drop("kernel", kernel.options_key(kernel.parse_fragment(fragment.read_text())))
            os.environ["MEMTIER_VM_SEED"] = os.devnull
        parts = prepare(cache=cache)
    except VmError as error:
        host.say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    for name in ("kernel", "rootfs", "layer", "scratch", "qemu", "accelerator"):
        print(f"{name:13}{getattr(parts, name)}")
    return 0
