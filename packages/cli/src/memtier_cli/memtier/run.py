"""`memtier run`: the engine on any cgroup or process."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from memtier_cli.memtier.values import Bandwidth, Duration

if TYPE_CHECKING:
    from memtier_engine.engine.loop import Engine, StepReport

IDLE_AFTER_S = 60.0
BANDWIDTH_MIB_PER_S = 100.0
SHARED_TOLD_BYTES = 8 << 20


@click.command("run")
@click.option(
    "--cgroup",
    "cgroups",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A cgroup directory; repeatable.",
)
@click.option("--pid", "pids", multiple=True, type=click.IntRange(min=1), help="A process; repeatable.")
@click.option(
    "--idle-after",
    type=Duration(),
    default="60s",
    show_default=True,
    help="Page out what was not touched for so long.",
)
@click.option(
    "--bandwidth",
    type=Bandwidth(),
    default="100MiB/s",
    show_default=True,
    help="Move no faster than this; none: no limit.",
)
@click.option("--tracker", default="auto", show_default=True, help="How accesses are found; auto: the best that works.")
@click.option(
    "--interval",
    type=Duration(),
    help="Time between scans.  [default: a quarter of --idle-after, at most 5s]",
)
@click.option("--dry-run", is_flag=True, help="Move nothing; say what would have been moved.")
@click.option("--duration", type=Duration(), help="End after this time.  [default: at Ctrl-C or SIGTERM]")
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A configuration file as memtierd takes it, instead of the options above.",
)
def command(
    cgroups: tuple[Path, ...],
    pids: tuple[int, ...],
    idle_after: float,
    bandwidth: float | None,
    tracker: str,
    interval: float | None,
    dry_run: bool,
    duration: float | None,
    config_file: Path | None,
) -> int:
    """Run the engine on cgroups or processes and page out what they do not use.

    A line per scan tells the state. It ends by itself when all processes given by --pid have. What is swapped out
    stays so at the end, and is read back when it is needed.
    Exit status: 0 also after Ctrl-C or SIGTERM, 1 if a cgroup, process, tracker or swap is missing.
    """
    from memtier_cli.logs import configure
    from memtier_cli.signals import stop_on_signals
    from memtier_engine.hostfs.limits import raise_open_files

    given = [bool(cgroups), bool(pids), config_file is not None]
    if sum(given) != 1:
        raise click.UsageError("give one of --cgroup, --pid and --config")
    raise_open_files()
    configure()  # the engine says what goes wrong by itself, on stderr
    with stop_on_signals() as stop:
        if config_file is not None:
            engine = _from_file(config_file, dry_run)
        else:
            engine = _from_options(cgroups, pids, idle_after, bandwidth, tracker, interval, dry_run)
        last = None
        line = ProgressLine()
        would_move_bytes, told_shared = 0, False
        for report in engine.run(duration_s=duration, stop=stop):
            if report.processes and not told_shared:
                told_shared = True
                _tell_shared(engine)
            line.show(_line(report, engine, dry_run))
            would_move_bytes = max(would_move_bytes, report.candidate_bytes)
            last = report
            if pids and not engine.target.poll():
                stop.set()
        line.end()
    if last is not None:
        click.echo(_summary(last, would_move_bytes if dry_run else None))
    return 0


class ProgressLine:
    """One line that changes in place on a terminal; one line after the other elsewhere."""

    def __init__(self) -> None:
        self._in_place = sys.stdout.isatty()
        self._open = False

    def show(self, text: str) -> None:
        """Show the state."""
        if self._in_place:
            width = shutil.get_terminal_size().columns
            click.echo(f"{text[: width - 1]}\x1b[K\r", nl=False)  # log messages go over it
            self._open = True
        else:
            click.echo(text)

    def end(self) -> None:
        """Leave the last state standing."""
        if self._open:
            click.echo()


def _from_options(
    cgroups: tuple[Path, ...],
    pids: tuple[int, ...],
    idle_after_s: float,
    bandwidth_mib_per_s: float | None,
    tracker: str,
    interval_s: float | None,
    dry_run: bool,
) -> Engine:
    from memtier_engine.engine.loop import Engine, EngineConfig
    from memtier_engine.errors import MemtierError
    from memtier_engine.hostfs.cgroup import find_cgroup
    from memtier_engine.hostfs.host import Host
    from memtier_engine.hostfs.proc import read_swaps
    from memtier_engine.mover.mover import MoverConfig
    from memtier_engine.policies.age import AgePolicyConfig
    from memtier_engine.targets.base import Target, why_not
    from memtier_engine.targets.cgroups import CgroupsTarget
    from memtier_engine.targets.pids import PidsTarget

    host = Host()
    target: Target
    if cgroups:
        for cgroup in cgroups:
            if not find_cgroup(host, str(cgroup)).is_dir():
                raise MemtierError(f"--cgroup {cgroup}: no such cgroup", hint="list them with: systemd-cgls")
        target = CgroupsTarget(host, cgroups)
    else:
        for pid in pids:
            why = why_not(host, pid)
            if why is not None:
                raise MemtierError(f"--pid {pid}: {why}", hint="list them with: ps -e")
        target = PidsTarget(host, pids)
    if not dry_run and not read_swaps(host):
        raise MemtierError(
            "there is no swap to page out to",
            hint="turn some on (swapon), or try --dry-run; see `memtier check`",
        )
    interval_ms = max(1, int(1000 * (interval_s or min(5.0, idle_after_s / 4))))
    config = EngineConfig(
        tracker=tracker,
        scan_interval_ms=interval_ms,
        policy=AgePolicyConfig(interval_ms=interval_ms, swap_out_ms=int(idle_after_s * 1000)),
        mover=MoverConfig(bandwidth_mib_per_s=bandwidth_mib_per_s),
        dry_run=dry_run,
    )
    return Engine(target, config, host=host)


def _from_file(path: Path, dry_run: bool) -> Engine:
    from memtier_engine.config.files import load

    return load(path).build(dry_run=dry_run, events=True)


def _tell_shared(engine: Engine) -> None:
    """Say that shared memory is left alone, once, where there is much of it: else it is missed in `resident`."""
    from loguru import logger

    from memtier_engine.errors import KernelCallError
    from memtier_engine.hostfs.proc import read_status

    most_bytes, most_pid = 0, 0
    for process in engine.spaces.processes:
        try:
            shared_bytes = read_status(engine.host, process.pid).rss_shmem or 0
        except KernelCallError:
            continue  # it exits
        if shared_bytes > most_bytes:
            most_bytes, most_pid = shared_bytes, process.pid
    if most_bytes >= SHARED_TOLD_BYTES:
        logger.info(
            "pid {}: {:.0f} MiB of it in RAM are shared memory (shm, memfd, tmpfs): not looked at, nor paged out",
            most_pid,
            most_bytes / (1 << 20),
        )


def _line(report: StepReport, engine: Engine, dry_run: bool) -> str:
    parts = [
        f"{report.processes} processes",
        f"resident {_mib(report.resident_bytes)}",
        f"idle {_mib(report.idle_bytes((engine.config.policy.swap_out_ms or 0) / 1000))}",
        f"paged out {_mib(report.paged_out_bytes)}",
        f"refaults {_mib(report.refault_bytes_total)}",
        f"scan {report.scan_seconds * 1000:.0f} ms",
        f"CPU {report.cpu_seconds_total:.2f} s",
    ]
    if report.not_yet_freed_bytes:
        parts[3] += f" (of that {_mib(report.not_yet_freed_bytes)} written, not yet free)"
    if report.held_back_by:
        parts.append("waits for " + "; ".join(report.held_back_by))
    if report.skipped:
        pid, why = min(report.skipped.items())
        more = f" (and {len(report.skipped) - 1} more)" if len(report.skipped) > 1 else ""
        parts.append(f"leaves alone, or takes less of: pid {pid}: {why}{more}")
    if dry_run:
        parts[3] = f"would move {_mib(report.candidate_bytes)}"
    return f"[{report.tracker}] " + ", ".join(parts)


def _summary(report: StepReport, would_move_bytes: int | None) -> str:
    if would_move_bytes is not None:
        return f"dry run: nothing was moved; {_mib(would_move_bytes)} would have been"
    held = report.not_yet_freed_bytes
    return (
        f"moved {_mib(report.moved_bytes_total)}, {_mib(report.refault_bytes_total)} of it came back"
        f"{f', {_mib(held)} of it is written to swap and not yet free' if held else ''};"
        f" {report.cpu_seconds_total:.2f} s of CPU in {report.scans} scans"
    )


def _mib(amount_bytes: int) -> str:
    return f"{amount_bytes / (1 << 20):.1f} MiB"
