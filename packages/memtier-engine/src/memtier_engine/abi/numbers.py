"""System call numbers of this machine's architecture, by name.

Source: arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h (aarch64 uses the generic
table). Numbers from 424 on are the same on every architecture.
"""

from __future__ import annotations

import platform

from memtier_engine.errors import Unavailable

_COMMON = {
    "pidfd_send_signal": 424,
    "pidfd_open": 434,
    "process_madvise": 440,
}

TABLES: dict[str, dict[str, int]] = {
    "x86_64": {
        **_COMMON,
        "mbind": 237,
        "set_mempolicy": 238,
        "get_mempolicy": 239,
        "move_pages": 279,
        "kcmp": 312,
        "perf_event_open": 298,
        "bpf": 321,
        "userfaultfd": 323,
    },
    "aarch64": {
        **_COMMON,
        "mbind": 235,
        "get_mempolicy": 236,
        "set_mempolicy": 237,
        "move_pages": 239,
        "kcmp": 272,
        "perf_event_open": 241,
        "bpf": 280,
        "userfaultfd": 282,
    },
}

MACHINE = platform.machine()


def syscall_number(name: str, machine: str = MACHINE) -> int:
    """The number of system call `name`.

    Raises:
        Unavailable: this architecture's table is not known here.
    """
    table = TABLES.get(machine)
    if table is None:
        raise Unavailable(
            f"system call {name}: numbers of architecture {machine!r} are not known",
            hint=f"run on one of {', '.join(sorted(TABLES))}",
        )
    return table[name]
