"""Processes of odd shapes, made by plain Python without a compiler: shared memory maps, a first thread that ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_HEAD = """
import ctypes, mmap, os, signal, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing is left behind

def clone(flags):
    # The child calls sleep(3) on a stack of its own and never comes back to Python. It cannot ask to die with us.
    stack = libc.mmap(None, 1 << 16, 3, 0x22, -1, 0)
    return libc.clone(ctypes.cast(libc.sleep, ctypes.c_void_p), ctypes.c_void_p(stack + (1 << 16)), flags | 17, 200)

def say(*numbers):
    print(*numbers, flush=True)
"""
CLONE_VM, CLONE_VFORK = 0x100, 0x4000

SHARED_MM = _HEAD + f"say(os.getpid(), clone({CLONE_VM}))\ntime.sleep(1000)\n"
"""Prints two pids of one address space."""
FORKS = (
    _HEAD
    + """
kids, parent = [], os.getpid()
for _ in range(int(sys.argv[1])):
    kid = os.fork()
    if not kid:
        libc.prctl(1, signal.SIGKILL)
        if os.getppid() != parent: os._exit(0)  # it was gone before that
        time.sleep(1000)
    kids.append(kid)
say(os.getpid(), *kids)
time.sleep(1000)
"""
)
"""Prints the pids of a process and of as many forks of it as its argument says."""
VFORK = (
    _HEAD
    + f"""
def wait_for_child():
    clone({CLONE_VM | CLONE_VFORK})
threading.Thread(target=wait_for_child, daemon=True).start()
while not (kids := open(f"/proc/self/task/{{os.listdir('/proc/self/task')[-1]}}/children").read().split()):
    time.sleep(0.01)
say(os.getpid(), *map(int, kids))
time.sleep(1000)
"""
)
"""Prints the pids of a process and of its child of vfork(2) that has not executed anything yet."""
LEADER_ENDED = (
    _HEAD
    + """
memory = libc.mmap(None, 8 << 20, 3, 0x22, -1, 0)
ctypes.memset(memory, 1, 8 << 20)
def stay():
    while open("/proc/self/stat").read().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    say(os.getpid(), memory, threading.get_native_id())
    for line in sys.stdin:
        ctypes.memset(memory, 1, 8 << 20)
        say(0)
    time.sleep(1000)
threading.Thread(target=stay).start()
libc.syscall(60 if os.uname().machine == "x86_64" else 93, 0)  # exit(2): of this thread only
"""
)
"""Prints its pid, the address of 8 MiB, and the thread that lives; each line it is sent has it touch all and answer."""


@contextmanager
def running(
    program: str, *arguments: str, setup: tuple[str, ...] = ()
) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """The running program, and the numbers that it printed first. `setup`: what starts it, as `setarch -R`."""
    command = [*setup, sys.executable, "-c", program, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, [int(word) for word in process.stdout.readline().split()]
        finally:
            # A child of clone(2) that shares the memory cannot ask to die with its parent.
            kids = _children(process.pid)
            process.kill()
            for kid in kids:
                with suppress(ProcessLookupError):
                    os.kill(kid, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        # A thread may end between the listing and the reading; its children are another thread's then.
        with suppress(FileNotFoundError, ProcessLookupError):
            found += [int(kid) for kid in file.read_text().split()]
    return found
