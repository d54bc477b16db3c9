"""The reference's statistics tables, as aligned text or csv. Its formats are kept to the byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from memtier_engine.errors import ConfigError
from memtier_engine.model import PAGE_BYTES
from memtier_engine.stats.recorder import AdviceCounts, MoveCounts, Statistics, error_text

_GIB = 1 << 30


def _gib(pages: int | float) -> float:
    return pages * PAGE_BYTES / _GIB


def _events(statistics: Statistics, csv: bool) -> list[str]:
    now_s = statistics.now_s()
    lines = [
        "table: events",
        "count,timeint[s],latest[s ago],name" if csv else "   count timeint[s] latest[s ago] name",
    ]
    for name, event in sorted(statistics.events.items(), key=lambda item: item[0].encode()):
        interval_s = (event.last_s - event.first_s) / max(1, event.count - 1)
        ago_s = now_s - event.last_s
        if csv:
            lines.append(f"{event.count},{interval_s:.6f},{ago_s:.6f},{name}")
        else:
            lines.append(f"{event.count:8d} {interval_s:10.3f} {ago_s:13.3f} {name}")
    return lines


def _calls(pid: int, own: AdviceCounts | MoveCounts, csv: bool) -> str:
    """The columns that both tables of system calls begin with."""
    counts = (pid, own.calls, own.requested_pages, own.moved_pages)
    return "{},{},{},{},".format(*counts) if csv else "{:8d} {:8d} {:10d} {:10d} ".format(*counts)


def _process_madvise(statistics: Statistics, csv: bool) -> list[str]:
    header = "     pid    calls req[pages]  ok[pages]    ok[G] PAGEOUT[G]"
    lines = ["table: process_madvise syscalls", "pid,calls,req[pages],ok[pages],ok[G],PAGEOUT[G]" if csv else header]
    for pid, own in sorted(statistics.advice.items()):
        done_gib, out_gib = _gib(own.moved_pages), _gib(own.paged_out_pages)
        end = f"{done_gib:8.6f},{out_gib:.6f}" if csv else f"{done_gib:8.3f} {out_gib:.3f}"
        lines.append(_calls(pid, own, csv) + end)
    return lines


def _move_pages(statistics: Statistics, csv: bool) -> list[str]:
    header = "     pid    calls req[pages]  ok[pages] moved[G] targetnode:moved[G]"
    csv_header = "pid,calls,req[pages],ok[pages],moved[G],targetnode:moved[G]"
    lines = ["table: move_pages syscalls", csv_header if csv else header]
    for pid, own in sorted(statistics.moves.items()):
        by_node = ";".join(f"{node}:{_gib(pages):.3f}" for node, pages in sorted(own.moved_by_node.items()))
        end = f"{_gib(own.moved_pages):.6f},{by_node}" if csv else f"{_gib(own.moved_pages):8.3f} {by_node}"
        lines.append(_calls(pid, own, csv) + end)
    return lines


def _move_pages_errors(statistics: Statistics, csv: bool) -> list[str]:
    header = "     pid    pages  size[G]    errno error"
    lines = ["table: move_pages syscall errors in page statuses", "pid,pages,size[G],errno,error" if csv else header]
    for pid, own in sorted(statistics.moves.items()):
        for number, pages in sorted(own.pages_by_errno.items()):
            if csv:
                lines.append(f"{pid},{pages},{_gib(pages):.6f},{number},{error_text(number)}")
            else:
                lines.append(f"{pid:8d} {pages:8d} {_gib(pages):8.3f} {number:8d} {error_text(number)}")
    return lines


def _memory_scans(statistics: Statistics, csv: bool) -> list[str]:
    header = "     pid    scans   tot[pages] avg[s]   last max[s]   avg[G]  last[G] a+w[%]  last"
    csv_header = "pid,scans,tot[pages],avg[s],last,max[s],avg[G],last[G],a+w[%],last"
    lines = ["table: memory scans", csv_header if csv else header, ""]
    for pid, own in sorted(statistics.scans.items()):
        seconds = (own.seconds / own.scans, own.last_seconds, own.max_seconds)
        sizes = (_gib(own.scanned_pages / own.scans), _gib(own.last_scanned_pages))
        shares = (
            _percent(own.touched_pages, own.scanned_pages),
            _percent(own.last_touched_pages, own.last_scanned_pages),
        )
        if csv:
            # The last two values are separated by a blank: so are the reference's, and what reads them.
            numbers = ",".join(f"{value:.6f}" for value in (*seconds, *sizes))
            shown = " ".join(_number(share, ".6f") for share in shares)
            lines.append(f"{pid},{own.scans},{own.scanned_pages},{numbers},{shown}")
        else:
            numbers = " ".join(f"{value:6.3f}" for value in seconds) + " " + " ".join(f"{size:8.3f}" for size in sizes)
            shown = " ".join(_number(share, "5.2f") for share in shares)
            lines.append(f"{pid:8d} {own.scans:8d} {own.scanned_pages:12d} {numbers} {shown}")
    return lines


def _swap_ins(statistics: Statistics, csv: bool) -> list[str]:
    header = "     pid   swapins     waits   tot[s]  avg[ms]"
    lines = ["table: swap-ins", "pid,swapins,waits,tot[s],avg[ms]" if csv else header]
    for pid, own in sorted(statistics.swap_ins.items()):
        each_ms = 1e3 * own.wait_s / own.waits if own.waits else math.nan
        if csv:
            lines.append(f"{pid},{own.swap_ins},{own.waits},{own.wait_s:.6f},{_number(each_ms, '.6f')}")
        else:
            numbers = f"{pid:8d} {own.swap_ins:9d} {own.waits:9d} {own.wait_s:8.3f}"
            lines.append(f"{numbers} {_number(each_ms, '8.3f')}")
    return lines


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else math.nan


def _number(value: float, form: str) -> str:
    """A number as Go prints it: NaN, not nan."""
    return f"{value:{form}}".replace("nan", "NaN")


TABLES: dict[str, Callable[[Statistics, bool], list[str]]] = {
    "events": _events,
    "process_madvise": _process_madvise,
    "move_pages": _move_pages,
    "move_pages_errors": _move_pages_errors,
    "memory_scans": _memory_scans,
}
OWN_TABLES: dict[str, Callable[[Statistics, bool], list[str]]] = {"swap_ins": _swap_ins}
"""Tables that the reference does not have: shown when they are asked for."""
FORMATS = ("txt", "csv")


def tables_text(statistics: Statistics, names: Sequence[str] = tuple(TABLES), form: str = "txt") -> str:
    """The tables of these names, separated by an empty line, with a newline at the end.

    Raises:
        ConfigError: an unknown format; the message is the reference's. An unknown table is told in its place.
    """
    if form not in FORMATS:
        raise ConfigError(f'unknown format "{form}", txt and csv expected')
    known = TABLES | OWN_TABLES
    with statistics.locked():
        found = [known[name](statistics, form == "csv") if name in known else [_unknown(name)] for name in names]
    return "\n".join("\n".join(lines) + "\n" for lines in found)


def _unknown(name: str) -> str:
    available = ", ".join(f'"{each}"' for each in TABLES)
    return f'unknown table "{name}", available: {available}'
