"""`memtier run`: the engine on any cgroup or process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from memtier_cli.memtier.values import Bandwidth, Duration

if TYPE_CHECKING:
    from memtier_engine.engine.loop import Engine

IDLE_AFTER_S = 60.0
BANDWIDTH_MIB_PER_S = 100.0
SHARED_TOLD_BYTES = 8 << 20


@click.command("run")
@click.option(
    "--cgroup",
    "cgroups",
    multiple=True,
    help="A cgroup directory; repeatable.",
)
@click.option("--pid", "pids", multiple=True, type=click.IntRange(min=1), help="A process; repeatable.")
@click.option("--all", "everything", is_flag=True, help="All processes; with --cgroup: also the root of a hierarchy.")
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
@click.option("--json", "as_json", is_flag=True, help="Print states and result as JSON, one object a line.")
@click.option("--quiet", is_flag=True, help="Print warnings and the result only.")
@click.option("--verbose", is_flag=True, help="Print also what helps to find faults.")
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Of messages, on standard error.",
)
def command(
    cgroups: tuple[str, ...],
    pids: tuple[int, ...],
    everything: bool,
    idle_after: float,
    bandwidth: float | None,
    tracker: str,
    interval: float | None,
    dry_run: bool,
    duration: float | None,
    config_file: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    log_format: str,
) -> int:
    """Run the engine on cgroups or processes and page out what they do not use.

    A line per scan tells the state; an output that is full or closed ends nothing. It ends by itself when all
    processes given by --pid have. What is swapped out stays so at the end, and is read back when it is needed.
    Init, sshd, kubelet, container runtimes and memtier itself are left alone, unless --pid names them or --cgroup
    the very cgroup they are in.
    Exit status: 0 also after Ctrl-C or SIGTERM, 1 if a cgroup, process, tracker or swap is missing, or no process
    could be looked at.
    """
    from memtier_cli import libraries

    libraries.ready()
    from memtier_cli.logs import configure_console
    from memtier_cli.memtier.screen import Screen
    from memtier_cli.memtier.states import Told
    from memtier_cli.signals import stop_on_signals
    from memtier_engine.errors import MemtierError
    from memtier_engine.hostfs.limits import raise_open_files

    if sum([bool(cgroups) or everything, bool(pids), config_file is not None]) != 1:
        raise click.UsageError("give one of --cgroup, --pid, --all and --config")
    if config_file is not None and (unused := _given("idle_after", "bandwidth", "tracker", "interval")):
        raise click.UsageError(f"--config has its own: leave out {', '.join(unused)}")
    if quiet and verbose:
        raise click.UsageError("give one of --quiet and --verbose")
    raise_open_files()
    with Screen(as_json=as_json, messages_as_json=log_format == "json") as screen, stop_on_signals() as stop:
        # The engine says what goes wrong by itself, on stderr.
        level = "WARNING" if quiet else "DEBUG" if verbose else "INFO"
        configure_console(screen.message, level=level, as_json=log_format == "json")
        if config_file is not None:
            engine = _from_file(config_file, dry_run)
        else:
            engine = _from_options(cgroups, pids, everything, idle_after, bandwidth, tracker, interval, dry_run)
        told = Told(engine.config, dry_run=dry_run)
        told_shared = False
        for report in engine.run(duration_s=duration, stop=stop):
            if report.processes and not told_shared:
                told_shared = True
                _tell_shared(engine)
            told.add(report)
            if as_json and not quiet:
                screen.state(json.dumps(told.as_dict(report)))
            elif not quiet:
                screen.state(told.line(report, screen.width if screen.in_place else None))
            if pids and not engine.target.poll():
                stop.set()
        if told.last is not None and config_file is None and told.nothing_seen(ended=not engine.target.poll()):
            raise MemtierError(told.why_nothing)
        if told.last is not None:
            screen.result(json.dumps(told.result()) if as_json else told.summary())
    return 0


def _given(*names: str) -> list[str]:
    """The flags of those of the options that stand on the command line."""
    context = click.get_current_context()
    sources = {name: context.get_parameter_source(name) for name in names}
    return [f"--{name.replace('_', '-')}" for name in names if sources[name] == ParameterSource.COMMANDLINE]


def _from_options(
    cgroups: tuple[str, ...],
    pids: tuple[int, ...],
    everything: bool,
    idle_after_s: float,
    bandwidth_mib_per_s: float | None,
    tracker: str,
    interval_s: float | None,
    dry_run: bool,
) -> Engine:
    from memtier_engine.engine.loop import Engine, EngineConfig
    from memtier_engine.errors import MemtierError
    from memtier_engine.hostfs.host import Host
    from memtier_engine.hostfs.proc import read_swaps
    from memtier_engine.mover.mover import MoverConfig
    from memtier_engine.policies.age import AgePolicyConfig
    from memtier_engine.targets.asked import check_cgroup, check_pid, check_processes
    from memtier_engine.targets.base import Target
    from memtier_engine.targets.cgroups import CgroupsTarget
    from memtier_engine.targets.pids import PidsTarget
    from memtier_engine.targets.proc import ProcTarget
    from memtier_engine.targets.sparing import SparingTarget

    host = Host()
    target: Target
    if pids:
        for pid in pids:
            check_pid(host, pid)
        target = PidsTarget(host, pids)
    else:
        named = [check_cgroup(host, name, root_allowed=everything) for name in cgroups]
        target = sparing = SparingTarget(
            host, CgroupsTarget(host, cgroups) if cgroups else ProcTarget(host), named=() if everything else named
        )
        found = target.poll()
        if not found:
            where = f"cgroup {', '.join(map(repr, cgroups))}" if cgroups else "this machine"
            but = f" but what is left alone unless named: {', '.join(sorted(sparing.spared))}" if sparing.spared else ""
            raise MemtierError(f"{where}: there is no process{but}")
        check_processes(host, found)
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
