"""The engine's error tree. Each error says what is wrong, where, and (as `hint`) what to do.

MemtierError
├── ConfigError              a value in a configuration: carries file, line and key path
├── Unavailable              this kernel or these rights do not offer it: carries a hint
│   └── TrackerUnavailable
└── KernelCallError          a system call or kernel file failed: carries errno
    ├── ProcessGone          ESRCH, or ENOENT under /proc/PID
    └── AccessDenied         EPERM, EACCES
"""

from __future__ import annotations

import errno as errno_numbers
import os


class MemtierError(Exception):
    """Base of everything the engine raises on purpose."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(MemtierError):
    """A value that cannot be used. `str()` is one line: `FILE:LINE: KEY.PATH: message (hint)`."""

    def __init__(
        self,
        message: str,
        *,
        key_path: str | None = None,
        file: str | None = None,
        line: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.key_path = key_path
        self.file = file
        self.line = line

    def __str__(self) -> str:
        where = ""
        if self.file:
            where += f"{self.file}:{self.line}: " if self.line else f"{self.file}: "
        elif self.line:
            where += f"line {self.line}: "
        if self.key_path:
            where += f"{self.key_path}: "
        return where + super().__str__()


class Unavailable(MemtierError):
    """Something this kernel, or this process's rights, do not offer."""


class TrackerUnavailable(Unavailable):
    """A tracker cannot work here; the hint names the CONFIG_ option, mount, capability or sysctl."""


class KernelCallError(MemtierError):
    """A system call or a kernel file failed. `errno` is the kernel's number."""

    def __init__(self, message: str, errno: int, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.errno = errno

    @classmethod
    def from_errno(cls, what: str, errno: int) -> KernelCallError:
        """The subclass that fits `errno`, with the kernel's name and text for it in the message."""
        kind = {
            errno_numbers.ESRCH: ProcessGone,
            errno_numbers.EPERM: AccessDenied,
            errno_numbers.EACCES: AccessDenied,
        }.get(errno, KernelCallError)
        name = errno_numbers.errorcode.get(errno, str(errno))
        return kind(f"{what}: {os.strerror(errno)} [{name}]", errno, hint=_HINTS.get(errno))


_HINTS = {
    errno_numbers.EMFILE: "this program may open too few files: raise its limit (ulimit -n, LimitNOFILE=)",
    errno_numbers.ENFILE: "the machine has too many files open: raise /proc/sys/fs/file-max",
}


class ProcessGone(KernelCallError):
    """The process exited: not an error to report, only data to drop."""


class AccessDenied(KernelCallError):
    """The kernel refused for lack of rights."""
