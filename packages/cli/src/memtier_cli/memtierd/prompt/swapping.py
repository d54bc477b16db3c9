"""Command `swap`: page processes out and in, and show how much of them is in swap."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Protocol

from memtier_cli.flags import Flag, Parsed
from memtier_cli.memtierd.prompt.asked import asked_for, memory_of
from memtier_cli.memtierd.prompt.command import Command, Console, Machine
from memtier_cli.memtierd.prompt.errors import CommandError
from memtier_cli.memtierd.prompt.gotext import go_list, share
from memtier_cli.memtierd.prompt.moving import HasMover
from memtier_cli.memtierd.prompt.moving import start as start_mover
from memtier_cli.memtierd.prompt.ranges import page_count, range_lines
from memtier_engine.hostfs.cgroup import Cgroup
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.pagemap import Pagemap, swapped
from memtier_engine.model import PAGE_BYTES, SWAP_NODE, MoveOutcome, MoveTask, ProcessId, Spans
from memtier_engine.mover.backends import ProcessHandle, page_out
from memtier_engine.mover.mover import BY_HAND, take
from memtier_engine.trackers.pageruns import runs_where

_MIB = 1 << 20
_OUT_BYTES = 256 << 20
"""Paged out in one go: a signal can end the command in between."""
_READ_BYTES = 64 * PAGE_BYTES


class SwapNeeds(Console, Machine, HasMover, Protocol):
    """What `swap` needs of a prompt."""


def _swap(prompt: SwapNeeds, flags: Parsed) -> None:
    pids = _pids(prompt, flags)
    if not pids:
        raise CommandError("missing pids, add -pid=PID, -pids=PID,PID or -pid-cgroups=PATH")
    for pid in pids:
        process, spans = memory_of(prompt.host, pid)
        spans = asked_for(prompt, spans, flags.text("ranges"))
        if flags.boolean("in"):
            _swap_in(prompt.host, process, spans)
        if flags.boolean("out"):
            _swap_out(prompt, process, spans, by_mover=flags.boolean("mover"))
        if flags.boolean("status") or flags.boolean("vaddrs"):
            _status(prompt, process, spans, addresses=flags.boolean("vaddrs"))


def _pids(prompt: SwapNeeds, flags: Parsed) -> list[int]:
    """Target pids in the order cgroups, -pid, -pids."""
    pids: list[int] = []
    if flags.text("pid-cgroups"):
        pids += _cgroup_pids(prompt, flags.text("pid-cgroups").split(","))
    if flags.integer("pid", -1) != -1:
        pids.append(flags.integer("pid", -1))
    for text in flags.text("pids").split(",") if flags.text("pids") else ():
        if not text.isdecimal() or len(text) > 9:
            raise CommandError(f'invalid pid "{text}": not a process id')
        pids.append(int(text))
    return pids


def _cgroup_pids(prompt: SwapNeeds, patterns: list[str]) -> list[int]:
    roots = [Path(path) for pattern in patterns for path in sorted(glob.glob(pattern)) if Path(path).is_dir()]
    if not roots:
        raise CommandError("could not find any matching cgroups")
    found: dict[int, None] = {}
    for root in roots:
        found |= dict.fromkeys(sorted(Cgroup(root, prompt.host).pids()))
    if not found:
        raise CommandError(f"could not find any pids from cgroups {go_list(roots)}")
    prompt.say(f"pidwatcher: AddPids({go_list(found)})")
    return list(found)


def _swap_out(prompt: SwapNeeds, process: ProcessId, spans: Spans, *, by_mover: bool) -> None:
    if by_mover:
        mover = prompt.mover
        start_mover(mover)
        prompt.statistics.event("mover.AddTask")
        mover.add(MoveTask(process, spans, SWAP_NODE, BY_HAND))
        return
    handle = ProcessHandle(prompt.host, process)
    try:
        while len(spans):
            part, spans = take(spans, _OUT_BYTES)
            result = page_out(handle, part)
            size = part.total_bytes
            prompt.statistics.moved(
                MoveOutcome(process, part, SWAP_NODE, size, result.moved_bytes, 0.0, result.stuck, result.error)
            )
            if result.error:
                prompt.say(f"swap error: {result.error}")
    finally:
        handle.close()


def _swapped_runs(host: Host, process: ProcessId, spans: Spans) -> Spans:
    """The pages of `spans` that are in swap, runs ending where mappings do."""
    with Pagemap(host, process.pid) as pagemap:
        return runs_where(pagemap, spans, swapped)


def _swap_in(host: Host, process: ProcessId, spans: Spans) -> None:
    """Read every page that is in swap: the kernel brings it back. What is read is not looked at."""
    runs = _swapped_runs(host, process, spans)
    buffer = bytearray(_READ_BYTES)
    path = host.proc(process.pid, "mem")
    fd = host.open(path)
    try:
        for start, end in zip(runs.starts.tolist(), runs.ends.tolist(), strict=True):
            for first in range(start, end, _READ_BYTES):
                view = memoryview(buffer)[: min(_READ_BYTES, end - first)]
                if os.preadv(fd, [view], first) != len(view):
                    raise CommandError(f"swap error: {first:x} of process {process.pid} is not mapped any more")
    except OSError as failure:
        raise host.error(path, failure) from None
    finally:
        os.close(fd)


def _status(prompt: SwapNeeds, process: ProcessId, spans: Spans, *, addresses: bool) -> None:
    runs = _swapped_runs(prompt.host, process, spans)
    if addresses:
        prompt.say_all(range_lines(runs))
    prompt.say(status_text(process.pid, page_count(runs), page_count(spans)))


def status_text(pid: int, out_pages: int, pages: int) -> str:
    """How much of a process is swapped out, as the reference prints it."""
    out_mib, mib = (count * PAGE_BYTES // _MIB for count in (out_pages, pages))
    percent = share(out_pages, pages, 1)
    return f"{pid} {out_pages} / {pages} pages, {out_mib} / {mib} MB ({percent} %) swapped out"


SWAP = Command(
    "swap",
    _swap,
    (
        Flag("pid", "this process", "int", "-1"),
        Flag("pids", "these processes, separated by commas", "string"),
        Flag("pid-cgroups", "processes in these cgroups and below, separated by commas; wildcards allowed", "string"),
        Flag("ranges", "only these ranges: START, START-END or START+SIZE in hex, separated by commas", "string"),
        Flag("in", "bring back what is swapped out"),
        Flag("out", "page out"),
        Flag("mover", "with -out: let the mover do it, at its pace"),
        Flag("status", "print how much is swapped out"),
        Flag("vaddrs", "print the address ranges that are swapped out, and how much that is"),
    ),
)
