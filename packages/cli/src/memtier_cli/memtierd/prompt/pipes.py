"""`command | shell command`: the output of a command into a program.

The shell is the operator's own: lines reach this only from a terminal, standard input, -c or -f of the program.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

from memtier_cli.memtierd.prompt.output import Output

_READ_BYTES = 1 << 16


class Redirected(Protocol):
    """Output that may go elsewhere for a while."""

    output: Output
    sink: Callable[[str], None] | None
    """Takes it; None: `output` does."""


class PipeFailed(Exception):
    """The shell could not be started."""


@contextlib.contextmanager
def shell_pipe(prompt: Redirected, shell_command: str) -> Iterator[None]:
    """While the block lasts, the prompt's output goes to the standard input of `sh -c shell_command`.

    What the program prints, errors too, becomes the prompt's output; its exit status means nothing here. Waits
    for it. A program that ends early takes no more: the rest is dropped.

    Raises:
        PipeFailed: there is no shell, or no process to be had.
    """
    try:
        child = subprocess.Popen(
            ["sh", "-c", shell_command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except OSError as failure:
        raise PipeFailed(f"cannot run sh: {failure.strerror}") from None
    assert child.stdin is not None
    assert child.stdout is not None
    stdin, stdout, before = child.stdin, child.stdout, prompt.sink
    write = prompt.output.write if before is None else before

    decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def copy() -> None:
        while part := os.read(stdout.fileno(), _READ_BYTES):
            write(decoder.decode(part))
        write(decoder.decode(b"", final=True))

    def feed(text: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            stdin.write(text.encode("utf-8", "surrogateescape"))
            stdin.flush()

    reader = threading.Thread(target=copy, name="memtier-pipe", daemon=True)
    reader.start()
    prompt.sink = feed
    try:
        yield
        prompt.sink = before
        with contextlib.suppress(BrokenPipeError):
            stdin.close()
        child.wait()
        reader.join()
    finally:
        prompt.sink = before
        if child.poll() is None:  # a signal came
            child.kill()
            child.wait()
        with contextlib.suppress(OSError):
            stdin.close()
        reader.join(1.0)
        stdout.close()
