"""Take capabilities and system calls away from this process, for good; or run a program without them.

    python -m support.confine --capabilities CAP_SYS_PTRACE,CAP_SYS_NICE --seccomp PROFILE.json -- PROGRAM ...

A seccomp profile is one in the form of container runtimes, loaded by libseccomp as they do it.
"""

from __future__ import annotations

import argparse
import ctypes
import ctypes.util
import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from memtier_engine.abi.constants import Capability

_PR_CAPBSET_DROP = 24
_CAPABILITY_VERSION_3 = 0x20080522
_CAP_LAST = Path("/proc/sys/kernel/cap_last_cap")
_ACT_ALLOW = 0x7FFF0000
_ACT_ERRNO = 0x00050000
_OPERATORS = {"SCMP_CMP_NE": 1, "SCMP_CMP_EQ": 4, "SCMP_CMP_MASKED_EQ": 7}
_UNKNOWN = -1


class _Comparison(ctypes.Structure):
    """struct scmp_arg_cmp of seccomp.h."""

    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    )


def keep_capabilities(kept: Iterable[Capability]) -> None:
    """This process, and what it executes, has no capability but `kept` from now on. Call it before threads start."""
    libc = ctypes.CDLL(None, use_errno=True)
    mask = sum(1 << each for each in set(kept))
    for number in range(int(_CAP_LAST.read_text()) + 1):
        if not mask >> number & 1 and libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl(PR_CAPBSET_DROP)")
    low, high = mask & 0xFFFFFFFF, mask >> 32
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)  # effective, permitted, inheritable
    if libc.capset(header, data):
        raise OSError(ctypes.get_errno(), f"capset: not all of {sorted(each.name for each in set(kept))} are ours")


def seccomp_is_here() -> bool:
    """Whether `load_seccomp` can work."""
    return ctypes.util.find_library("seccomp") is not None


def load_seccomp(profile: dict[str, Any]) -> None:
    """Filter the system calls of this process, and of what it executes."""
    library = ctypes.CDLL(ctypes.util.find_library("seccomp"), use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    default = _action(profile["defaultAction"], profile.get("defaultErrnoRet", 1))
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(default)))
    if not context:
        raise OSError("seccomp_init failed")
    for rule in profile["syscalls"]:
        if not _is_for_this_machine(rule):
            continue
        action = _action(rule["action"], rule.get("errnoRet", 1))
        comparisons = [
            _Comparison(each["index"], _OPERATORS[each["op"]], each["value"], each.get("valueTwo", 0))
            for each in rule.get("args", [])
        ]
        array = (_Comparison * len(comparisons))(*comparisons)
        for name in rule["names"]:
            number = library.seccomp_syscall_resolve_name(name.encode())
            if number == _UNKNOWN:  # a newer call than this library knows, as runtimes do
                continue
            status = library.seccomp_rule_add_array(
                context, ctypes.c_uint32(action), number, ctypes.c_uint(len(comparisons)), array
            )
            if status:
                raise OSError(-status, f"seccomp_rule_add {name}")
    status = library.seccomp_load(context)
    library.seccomp_release(context)
    if status:
        raise OSError(-status, "seccomp_load")


def _action(name: str, number: int) -> int:
    return _ACT_ALLOW if name == "SCMP_ACT_ALLOW" else {"SCMP_ACT_ERRNO": _ACT_ERRNO | number}[name]


def _is_for_this_machine(rule: dict[str, Any]) -> bool:
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    wanted = rule.get("includes", {}).get("arches", [])
    return not wanted or machine in wanted


def main() -> None:
    """Run a program confined."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--capabilities", type=lambda text: [Capability[name] for name in text.split(",") if name])
    parser.add_argument("--seccomp", type=Path)
    parser.add_argument("command", nargs="+")
    given = parser.parse_args()
    if given.capabilities is not None:
        keep_capabilities(given.capabilities)
    if given.seccomp is not None:  # libseccomp sets NO_NEW_PRIVS with it, as allowPrivilegeEscalation: false does
        load_seccomp(json.loads(given.seccomp.read_text()))
    os.execvp(given.command[0], given.command)


if __name__ == "__main__":
    main()
