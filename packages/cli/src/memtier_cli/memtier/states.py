"""What `memtier run` tells of each scan and at the end, in words and as JSON."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from memtier_cli.memtier.screen import fit

if TYPE_CHECKING:
    from memtier_engine.engine.report import StepReport
    from memtier_engine.engine.settings import EngineConfig

_DISPENSABLE = (5, 6, 2, 4, 0, 1, 3)
"""Parts of a state in the order in which a narrow terminal goes without them: what is paged out last."""
_ERRORS_NAMED = 3


class Told:
    """The reports of a run."""

    def __init__(self, config: EngineConfig, *, dry_run: bool) -> None:
        """`config`: the engine's."""
        self.last: StepReport | None = None
        self._idle_after_s = (config.policy.swap_out_ms or 0) / 1000
        self._dry_run = dry_run
        self._would_move_bytes = self._processes_most = 0
        self._errors: dict[str, None] = {}

    def add(self, report: StepReport) -> None:
        """The next report."""
        self.last = report
        self._would_move_bytes = max(self._would_move_bytes, report.candidate_bytes)
        self._processes_most = max(self._processes_most, report.processes)
        if not self._processes_most:
            self._errors.update(dict.fromkeys(report.errors))

    def nothing_seen(self, *, ended: bool) -> bool:
        """Whether no process was ever looked at for a reason; `ended`: there is none any more."""
        return not self._processes_most and (bool(self._errors) or ended)

    @property
    def why_nothing(self) -> str:
        """The reason."""
        reasons = list(self._errors)[:_ERRORS_NAMED] or ["all ended before"]
        return f"no process could be looked at: {'; '.join(reasons)}"

    def line(self, report: StepReport, width: int | None) -> str:
        """A state in words: of at most so many characters, or with its time."""
        parts = [
            f"{report.processes} processes",
            f"resident {_mib(report.resident_bytes)}",
            f"idle {_mib(report.idle_bytes(self._idle_after_s))}",
            f"paged out {_mib(report.paged_out_bytes)}",
            f"refaults {_mib(report.refault_bytes_total)}",
            f"scan {report.scan_seconds * 1000:.0f} ms",
            f"CPU {report.cpu_seconds_total:.2f} s",
        ]
        if self._dry_run:
            parts[3] = f"would move {_mib(report.candidate_bytes)}"
        elif report.not_yet_freed_bytes:
            parts[3] += f" (of that {_mib(report.not_yet_freed_bytes)} written, not yet free)"
        reasons = []
        if report.held_back_by:
            reasons.append("waits for " + "; ".join(report.held_back_by))
        if report.skipped:
            pid, why = min(report.skipped.items())
            more = f" (and {len(report.skipped) - 1} more)" if len(report.skipped) > 1 else ""
            reasons.append(f"leaves alone, or takes less of: pid {pid}: {why}{more}")
        reason = ", ".join(reasons)
        if width is None:
            return f"{_now()} [{report.tracker}] {', '.join([*parts, *([reason] if reason else [])])}"
        line = fit(parts, _DISPENSABLE, reason, width)
        whole = f"[{report.tracker}] {line}"
        return whole if len(whole) <= width else line

    def as_dict(self, report: StepReport) -> dict[str, object]:
        """A state for `--json`."""
        return {
            "event": "scan",
            "time": _now(),
            "tracker": report.tracker,
            "processes": report.processes,
            "resident_bytes": report.resident_bytes,
            "idle_bytes": report.idle_bytes(self._idle_after_s),
            "paged_out_bytes": report.paged_out_bytes,
            "not_yet_freed_bytes": report.not_yet_freed_bytes,
            "candidate_bytes": report.candidate_bytes,
            "moved_bytes_total": report.moved_bytes_total,
            "refault_bytes_total": report.refault_bytes_total,
            "scan_seconds": report.scan_seconds,
            "cpu_seconds_total": report.cpu_seconds_total,
            "held_back_by": list(report.held_back_by),
            "skipped": {str(pid): why for pid, why in report.skipped.items()},
            "errors": list(report.errors),
        }

    def result(self) -> dict[str, object]:
        """The end for `--json`."""
        assert self.last is not None
        found = {**self.as_dict(self.last), "event": "end", "scans": self.last.scans, "dry_run": self._dry_run}
        return {**found, "would_move_bytes": self._would_move_bytes} if self._dry_run else found

    def summary(self) -> str:
        """The end in words."""
        assert self.last is not None
        report, held = self.last, self.last.not_yet_freed_bytes
        if self._dry_run:
            return f"dry run: nothing was moved; {_mib(self._would_move_bytes)} would have been"
        return (
            f"moved {_mib(report.moved_bytes_total)}, {_mib(report.refault_bytes_total)} of it came back"
            f"{f', {_mib(held)} of it is written to swap and not yet free' if held else ''};"
            f" {report.cpu_seconds_total:.2f} s of CPU in {report.scans} scans"
        )


def _now() -> str:
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


def _mib(amount_bytes: int) -> str:
    return f"{amount_bytes / (1 << 20):.1f} MiB"
