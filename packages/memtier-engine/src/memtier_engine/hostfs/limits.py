"""How many files this process may have open."""

from __future__ import annotations

import resource


def raise_open_files() -> tuple[int, int]:
    """Raise the soft limit of open files to the hard one. Returns the soft limit (before, now).

    For programs, at their start: 1024 is what shells and service managers give to programs that may use select(2),
    which we do not. Children inherit it. Source: getrlimit(2); "File Descriptor Limits" by the author of systemd.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # -1 is RLIM_INFINITY, which the kernel does not give for files (fs.nr_open is the most), but sandboxes do.
    if soft == resource.RLIM_INFINITY or (hard != resource.RLIM_INFINITY and soft >= hard):
        return soft, soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # a seccomp filter, or a hard limit above a lowered fs.nr_open
        return soft, soft
    return soft, hard
