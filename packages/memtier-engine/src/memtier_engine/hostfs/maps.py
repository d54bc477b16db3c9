"""/proc/PID/maps into columns, and which of the mappings hold memory that can be tiered."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from memtier_engine.errors import KernelCallError, ProcessGone
from memtier_engine.hostfs.host import Host
from memtier_engine.model import U8, U64, Bools, ProcessId, Spans

_THREADS_FIELD = 20
_START_TICKS_FIELD = 22
_DEAD = (b"Z", b"X")
_LISTED_TIMES = 16
_NEWLINE, _BLANK, _DASH = b"\n -"
_PAD = 32
"""Bytes before and behind the text, so that what is looked at around a number is always there."""
_NAME_COLUMN = 73
_FEW_BYTES = 1 << 15
"""Some 400 mappings; a text of this length takes either way 1 ms."""
_LINE = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) (....) [0-9a-f]+ [0-9a-f]+:[0-9a-f]+ ([0-9]+) *(.*)$", re.M)
_HEAD_BYTES = 16
"""As much of a name as tells whether its mapping is tierable."""

_Places = NDArray[np.int64]


@dataclass(frozen=True, eq=False)  # no slots: what is asked for is kept
class Mappings:
    """The mappings [n] of a process, ascending, disjoint; some may be empty."""

    starts: U64
    ends: U64  # exclusive
    readable: Bools
    writable: Bools
    shared: Bools
    inodes: U64  # 0: no file
    name_lines: bytes
    """The names as the kernel writes them, each followed by a newline. Long ones are cut if they are many."""

    def __len__(self) -> int:
        return len(self.starts)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """[n]: path, [heap], [anon:NAME], ... or "". Text only for who asks: most only want `tierable`."""
        return tuple(self.name_lines.decode("utf-8", "surrogateescape").split("\n")[:-1])

    def tierable(self) -> Spans:
        """The spans of mappings whose pages can be paged out or moved on their owner's account.

        In: private anonymous memory ([heap], [stack], [anon:NAME], no name) and private writable mappings of
        files. Out: shared mappings, what the kernel maps itself ([vdso], [vvar], [vsyscall], [uprobes]),
        device memory and huge pages of hugetlbfs (not on any LRU list), and memory that can be neither read
        nor written: reservations and guard pages, which would cost metadata and never hold data in use.
        Asked again, it is the same object.
        """
        return self._tierable

    @cached_property
    def _tierable(self) -> Spans:
        anonymous = self.inodes == 0
        keep = (self.starts < self.ends) & ~self.shared & (self.readable | self.writable) & (anonymous | self.writable)
        rows = np.flatnonzero(keep)
        if len(self) < _FEW_BYTES >> 7:
            names = self.name_lines.split(b"\n")
            keep[rows] = [_name_is_tierable(names[row]) for row in rows.tolist()]
        elif len(self.name_lines) > len(self):  # else none has a name
            keep[rows] = _names_are_tierable(self.name_lines, rows)
        return Spans(self.starts[keep], self.ends[keep])


def _name_is_tierable(name: bytes) -> bool:
    if not name:
        return True
    if name[:1] == b"[":
        return name in (b"[heap]", b"[stack]") or name.startswith((b"[anon:", b"[stack:"))
    if name.startswith(b"/dev/"):
        return name.startswith((b"/dev/shm/", b"/dev/zero"))
    return not name.startswith(b"/anon_hugepage")


def _names_are_tierable(name_lines: bytes, rows: _Places) -> Bools:
    """As `_name_is_tierable`, for the names of many `rows` at once."""
    text = np.frombuffer(name_lines + bytes(_HEAD_BYTES), np.uint8)
    after = np.flatnonzero(text == _NEWLINE)
    begins = np.concatenate(([0], after[:-1] + 1))[rows]
    heads = text[begins[:, None] + np.arange(_HEAD_BYTES)]

    def begin(*with_: bytes) -> Bools:  # none of them goes on behind a newline, so the next name does not matter
        found = np.zeros(len(heads), np.bool_)
        for head in with_:
            found |= (heads[:, : len(head)] == np.frombuffer(head, np.uint8)).all(axis=1)
        return found

    own = begin(b"[heap]\n", b"[stack]\n", b"[anon:", b"[stack:")
    device = begin(b"/dev/") & ~begin(b"/dev/shm/", b"/dev/zero")
    return np.where(begin(b"["), own, ~(device | begin(b"/anon_hugepage")))


def parse_mappings(text: bytes) -> Mappings:
    """Columns of the text of /proc/PID/maps (or of the header lines of smaps). Linear; some 0.3 us a mapping."""
    # Format: "%08lx-%08lx %c%c%c%c %08llx %02x:%02x %lu " and, if it has a name, blanks up to column 73 and the name,
    # in which a newline is written as \\012. Source: fs/proc/task_mmu.c, show_vma_header_prefix and show_map_vma.
    if len(text) < _FEW_BYTES:
        return _parse_few(text)
    padded = bytes(_PAD) + text + (b"" if text.endswith(b"\n") else b"\n") + bytes(_PAD)
    body = np.frombuffer(padded, np.uint8)
    ends = np.flatnonzero(body == _NEWLINE)
    begins = np.concatenate(([_PAD], ends[:-1] + 1))
    # Lines of smaps that are no header begin with a capital letter, those of maps are all of this kind.
    header = (body[begins] < ord("A")) | (body[begins] >= ord("a"))
    header &= body[begins] != _NEWLINE
    begins, ends = begins[header], ends[header]
    if not len(begins):
        return _parse_few(b"")
    dash = _find(body, begins + 8, _DASH, ends)
    second_end = _find(body, dash + 9, _BLANK, ends)
    modes = second_end + 1
    offset_end = _find(body, modes + 5 + 8, _BLANK, ends)
    device_end = _find(body, offset_end + 1 + 5, _BLANK, ends)
    inode_end = _find(body, device_end + 2, _BLANK, ends)
    well_formed = (body[dash] == _DASH) & (body[second_end] == _BLANK) & (body[device_end] == _BLANK)
    if not well_formed.all():
        return _parse_few(text)
    # Not all the blanks one by one: where the second blank is there too, the name begins at column 73.
    column = np.minimum(begins + _NAME_COLUMN, ends)
    name_at = np.where(body[np.minimum(inode_end + 1, ends)] == _BLANK, np.maximum(column, inode_end), inode_end)
    name_at = _skip_blanks(body, name_at, ends)
    words = _words(padded)
    return Mappings(
        *_in_order(_hex_numbers(words, begins, dash), _hex_numbers(words, dash + 1, second_end)),
        readable=body[modes] == ord("r"),
        writable=body[modes + 1] == ord("w"),
        shared=body[modes + 3] == ord("s"),
        inodes=_decimal_numbers(body, device_end + 1, inode_end),
        name_lines=_gathered(body, name_at, ends + 1),
    )


def _parse_few(text: bytes) -> Mappings:
    """The same line by line: for few lines, numpy's price per call is more than Python's per line."""
    rows = _LINE.findall(text)
    if not rows:
        none, no = np.zeros(0, np.uint64), np.zeros(0, np.bool_)
        return Mappings(none, none, no, no, no, none, b"")
    starts, ends, modes, inodes, names = zip(*rows, strict=True)
    flags = np.frombuffer(b"".join(modes), np.uint8).reshape(-1, 4)
    return Mappings(
        *_in_order(
            np.array([int(start, 16) for start in starts], np.uint64),
            np.array([int(end, 16) for end in ends], np.uint64),
        ),
        readable=flags[:, 0] == ord("r"),
        writable=flags[:, 1] == ord("w"),
        shared=flags[:, 3] == ord("s"),
        inodes=np.array([int(inode) for inode in inodes], np.uint64),
        name_lines=b"\n".join(names) + b"\n",
    )


def _in_order(starts: U64, ends: U64) -> tuple[U64, U64]:
    """The same, without overlaps: what was said first holds, and a row that says nothing new is empty."""
    # The kernel gives maps in pieces of a page, and goes on at the address where it was: mappings that have merged
    # meanwhile are told again, from their beginning. Source: fs/proc/task_mmu.c, m_start.
    if (starts[1:] >= ends[:-1]).all():
        return starts, ends
    ends = np.maximum.accumulate(ends)
    starts[1:] = np.maximum(starts[1:], ends[:-1])
    return starts, ends


def _find(body: U8, at: _Places, what: int, ends: _Places) -> _Places:
    """From each of `at` on, the first byte that is `what`; at most where the line ends."""
    at = np.minimum(at, ends)
    left = np.flatnonzero((body[at] != what) & (at < ends))
    while len(left):  # numbers have 16 digits at most, most of them as few as where the search began
        at[left] += 1
        left = left[(body[at[left]] != what) & (at[left] < ends[left])]
    return at


def _skip_blanks(body: U8, at: _Places, ends: _Places) -> _Places:
    """From each of `at` on, the first byte that is no blank; at most where the line ends."""
    left = np.flatnonzero((body[at] == _BLANK) & (at < ends))
    while len(left):
        at[left] += 1
        left = left[(body[at[left]] == _BLANK) & (at[left] < ends[left])]
    return at


def _words(padded: bytes) -> U64:
    """The eight bytes from each byte of the text on, as a little-endian number: a view, not aligned."""
    whole = np.frombuffer(padded, np.dtype("<u8"), len(padded) // 8)
    return as_strided(whole, shape=(len(padded) - 8,), strides=(1,), writeable=False)


def _hex_numbers(words: U64, begins: _Places, ends: _Places) -> U64:
    """uint64[n]: the hexadecimal numbers at [begins, ends), of 16 digits at most."""
    digits = np.minimum(ends - begins, 16)
    low = _hex_digits(words[ends - 8], np.minimum(digits, 8))
    high = _hex_digits(words[ends - 16], np.maximum(digits - 8, 0))
    return (high << np.uint64(32)) | low


def _hex_digits(word: U64, digits: _Places) -> U64:
    """uint64[n]: the number that the last so many of eight characters are, all eight at once within a register."""
    unwanted = (8 * np.minimum(8 - digits, 7)).astype(np.uint64)  # bits; a shift by 64 would do nothing
    word = (word >> unwanted) << unwanted
    word[digits == 0] = 0
    # A letter is 0x61 to 0x66, a digit 0x30 to 0x39.
    word = (word & np.uint64(0x0F0F0F0F0F0F0F0F)) + (
        (word >> np.uint64(6)) & np.uint64(0x0101010101010101)
    ) * np.uint64(9)
    word = ((word << np.uint64(4)) | (word >> np.uint64(8))) & np.uint64(0x00FF00FF00FF00FF)
    word = ((word << np.uint64(8)) | (word >> np.uint64(16))) & np.uint64(0x0000FFFF0000FFFF)
    return ((word << np.uint64(16)) | (word >> np.uint64(32))) & np.uint64(0xFFFFFFFF)


def _decimal_numbers(body: U8, begins: _Places, ends: _Places) -> U64:
    """uint64[n]: the numbers at [begins, ends)."""
    value = np.zeros(len(begins), np.uint64)
    digit = body[begins] - np.uint8(ord("0"))
    rows = np.flatnonzero((ends - begins > 1) | (digit != 0))  # most mappings have no file, and "0"
    begins, ends = begins[rows], ends[rows]
    found = value[rows]
    for place in range(int((ends - begins).max(initial=0)), 0, -1):
        at = ends - place
        digit = body[np.maximum(at, 0)] - np.uint8(ord("0"))
        digit[at < begins] = 0
        found = found * np.uint64(10) + digit
    value[rows] = found
    return value


def _gathered(body: U8, begins: _Places, ends: _Places) -> bytes:
    """The pieces [begins, ends), none of them empty, one after the other."""
    lengths = ends - begins
    if (lengths == 1).all():
        return bytes(body[begins])
    after = np.cumsum(lengths)
    return bytes(body[np.repeat(begins - (after - lengths), lengths) + np.arange(after[-1])])


def read_mappings(host: Host, pid: int) -> Mappings:
    """The mappings of `pid`: none for a kernel thread or a zombie.

    Raises:
        ProcessGone: it exited.
        AccessDenied: needs the same user, or CAP_SYS_PTRACE.
    """
    return parse_mappings(_read_maps(host, pid))


def _read_maps(host: Host, pid: int) -> bytes:
    text = host.read_proc(pid, "maps")
    if not text and (thread := live_thread(host, pid)) is not None:
        return host.read_proc(pid, f"task/{thread}/maps")
    return text


class MappingsCache:
    """The mappings of many processes: the same object for as long as a process's maps say the same.

    So whoever keeps what he made of them finds out by `is` that it still holds. Not for several threads at once.
    """

    def __init__(self) -> None:
        self._known: dict[ProcessId, tuple[int, int, Mappings]] = {}

    def __len__(self) -> int:
        return len(self._known)

    def read(self, host: Host, process: ProcessId) -> Mappings:
        """The mappings that `process` has now; errors as `read_mappings`."""
        return self.parse(process, _read_maps(host, process.pid))

    def parse(self, process: ProcessId, text: bytes) -> Mappings:
        """The same from the text of its maps, however it was read."""
        # The text itself would take 100 bytes a mapping. Python's hash of it (SipHash with a random key, 0.5 ms per
        # MiB) takes two texts for one with a chance of 2**-64.
        digest = hash(text)
        known = self._known.get(process)
        if known is not None and known[0] == digest and known[1] == len(text):
            return known[2]
        found = parse_mappings(text)
        self._known[process] = (digest, len(text), found)
        return found

    def retain(self, processes: Collection[ProcessId]) -> None:
        """Forget all but these."""
        if len(self._known) > len(processes) or any(process not in processes for process in self._known):
            self._known = {process: known for process, known in self._known.items() if process in processes}


def read_stat_fields(host: Host, pid: int) -> list[bytes]:
    """Fields of /proc/PID/stat from the third (state) on: the second may hold blanks and parentheses.

    Raises:
        ProcessGone: it exited.
    """
    return stat_fields_of(host.read_proc(pid, "stat"), pid)


def stat_fields_of(text: bytes, pid: int) -> list[bytes]:
    """As `read_stat_fields`, from the text of /proc/PID/stat."""
    _, found, rest = text.rpartition(b")")
    if not found:
        raise KernelCallError(f"read /proc/{pid}/stat: not in the kernel's format", errno.EINVAL)
    return rest.split()


def read_start_ticks(host: Host, pid: int) -> int:
    """When `pid` started, in clock ticks since boot.

    Raises:
        ProcessGone: it exited, or is a zombie that only waits for its parent.
    """
    return start_ticks_of(host.read_proc(pid, "stat"), pid)


def start_ticks_of(stat: bytes, pid: int) -> int:
    """As `read_start_ticks`, from the text of /proc/PID/stat."""
    fields = stat_fields_of(stat, pid)
    if has_exited(fields):
        raise ProcessGone(f"process {pid} exited", errno.ESRCH)
    return int(fields[_START_TICKS_FIELD - 3])


def process_id(host: Host, pid: int) -> ProcessId:
    """The identity of the process that has `pid` now.

    Raises:
        ProcessGone: nobody has.
    """
    return ProcessId(pid, read_start_ticks(host, pid))


def has_exited(stat_fields: list[bytes]) -> bool:
    """Whether a process is over, by its fields of `read_stat_fields`: a zombie whose threads have all ended."""
    return stat_fields[0] in _DEAD and not leader_ended(stat_fields)


def leader_ended(stat_fields: list[bytes]) -> bool:
    """Whether the first thread of a process is over, by its fields of `read_stat_fields`, while others live.

    A program may end its main thread by pthread_exit(3). /proc/PID then says "zombie", and its files about memory are
    empty or say ESRCH: the first thread's `mm` is gone. That of another thread is the same and is there, below
    /proc/PID/task/TID. What goes by the number of a thread (move_pages, kcmp) works with such a TID; process_madvise(2)
    does not (ESRCH on 6.18, with PIDFD_THREAD too: pidfd_get_task() looks for a process), so nothing of it can be
    paged out.
    """
    # A zombie counts as a thread until its parent has waited for it.
    return stat_fields[0] in _DEAD and int(stat_fields[_THREADS_FIELD - 3]) > 1


def live_thread(host: Host, pid: int) -> int | None:
    """The thread that has the memory of a process whose `leader_ended`. None: not such a process, or no more.

    It may end while others go on; then ask again.
    """
    for _ in range(_LISTED_TIMES):  # threads may start the next one and end, faster than they are looked at
        try:
            if not leader_ended(read_stat_fields(host, pid)):
                return None
            threads = sorted(map(int, os.listdir(host.proc(pid, "task"))))
        except (KernelCallError, OSError):
            return None
        for thread in threads:
            try:
                if stat_fields_of(host.read_proc(pid, f"task/{thread}/stat"), pid)[0] not in _DEAD:
                    return thread
            except KernelCallError:
                continue
    return None
