"""`memtier demo`: real memory leaves RAM, and you watch."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from threading import Event
from typing import Protocol

import click

from memtier_cli.memtier.values import Duration

HOT_MIB, COLD_MIB = 128, 384
SCAN_INTERVAL_S = 0.5
"""On a machine that is quick enough; see `scan_interval_s`."""
IDLE_AFTER_SCANS = 6
BANDWIDTH_MIB_PER_S = 200
SETTLE_S = 3.0
"""The run ends early once the cold memory has been out for this long."""


class Screen(Protocol):
    """Where progress goes."""

    def show(self, rows: dict[str, str]) -> None:
        """Show the state."""


class PlainScreen:
    """One line per update, for files and pipes."""

    def show(self, rows: dict[str, str]) -> None:
        """Print the state as one line."""
        print("  ".join(f"{name}: {value}" for name, value in rows.items()), flush=True)


class NoScreen:
    """Nothing, for `--json`."""

    def show(self, rows: dict[str, str]) -> None:
        """Show nothing."""


@click.command("demo")
@click.option("--tracker", default="auto", show_default=True, help="Which tracker to use; auto: the best that works.")
@click.option("--duration", type=Duration(), default="100s", show_default=True, help="Longest time to run.")
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as one JSON object.")
def command(tracker: str, duration: float, as_json: bool) -> int:
    """Page out the idle memory of a real process and show it.

    Starts a process with 512 MiB, 128 MiB of it in use, in a cgroup of its own, and runs the engine on the cgroup.
    Exit status: 0 at least 95 % of the cold memory went out and at most 2 % of the hot memory; 1 it did not, or
    something it needs is missing; 129, 130, 143 ended by SIGHUP, Ctrl-C, SIGTERM, and all was taken back.
    """
    from memtier_cli.memtier.demo_scene.scene import own_cgroup, scan_seconds, workload
    from memtier_cli.memtier.demo_scene.verdict import judge
    from memtier_cli.memtier.demo_scene.zram import swap_for_now
    from memtier_cli.signals import stop_on_signals
    from memtier_engine.engine.loop import Engine, EngineConfig
    from memtier_engine.guards.config import GuardsConfig
    from memtier_engine.hostfs.host import Host
    from memtier_engine.mover.mover import MoverConfig
    from memtier_engine.policies.age import AgePolicyConfig
    from memtier_engine.targets.cgroups import CgroupsTarget
    from memtier_engine.trackers.registry import create_tracker

    host = Host()
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        stack.callback(_say_stopped, stop)  # entered first, so it runs when all else is taken back
        choice = create_tracker(tracker, host)
        swap = stack.enter_context(swap_for_now((HOT_MIB + COLD_MIB) << 20))
        cgroup = stack.enter_context(own_cgroup())
        if not as_json:
            for _, why in choice.rejected:
                print(f"not used: {why}")
            print(f"tracker: {choice.tracker.name}    swap: {swap}    cgroup: {cgroup}")
            print(
                f"starting a process with {HOT_MIB + COLD_MIB} MiB, {HOT_MIB} MiB of it in use ...",
                flush=True,
            )
        layout = "pages" if choice.tracker.page_exact else "mappings"
        load = stack.enter_context(workload(cgroup, HOT_MIB, COLD_MIB, layout))
        interval_ms = int(1000 * scan_interval_s(scan_seconds(choice.tracker, load), load.round_s))
        if not as_json:
            print(
                f"a look at it every {interval_ms} ms; what {IDLE_AFTER_SCANS} looks find idle is paged out", flush=True
            )
        config = EngineConfig(
            scan_interval_ms=interval_ms,
            policy=AgePolicyConfig(interval_ms=interval_ms, swap_out_ms=IDLE_AFTER_SCANS * interval_ms),
            mover=MoverConfig(bandwidth_mib_per_s=BANDWIDTH_MIB_PER_S),
            # The installation just before may have left the disk busy; the demo's own memory harms nobody.
            guards=GuardsConfig(memory_psi_node=None, io_psi_node=None),
        )
        engine = Engine(CgroupsTarget(host, [cgroup]), config, host=host, tracker=choice.tracker)
        screen = _screen(stack, as_json)
        began_s = engine.clock.now_s()
        out_since_s = None
        last = None
        errors: dict[str, None] = {}
        for report in engine.run(duration_s=duration, stop=stop):
            memory = load.memory()
            errors.update(dict.fromkeys(report.errors))
            speed = (
                0.0
                if last is None
                else (report.moved_bytes_total - last.moved_bytes_total) / (report.time_s - last.time_s)
            )
            last = report
            screen.show(
                {
                    "time": f"{report.time_s - began_s:4.1f} s",
                    "in RAM": _mib(memory.hot_bytes + memory.cold_bytes - memory.hot_out_bytes - memory.cold_out_bytes),
                    "swapped out": _mib(memory.hot_out_bytes + memory.cold_out_bytes),
                    "hot kept": f"{100 * (1 - memory.hot_out_bytes / memory.hot_bytes):5.1f} %",
                    "moving": f"{speed / (1 << 20):4.0f} MiB/s",
                    "refaults": _mib(memory.refault_bytes),
                    "engine CPU": f"{report.cpu_seconds_total:.2f} s",
                    **({"waits for": "; ".join(report.held_back_by)} if report.held_back_by else {}),
                }
            )
            if memory.cold_out_bytes < 0.99 * memory.cold_bytes:
                out_since_s = None
            elif out_since_s is None:
                out_since_s = report.time_s
            elif report.time_s - out_since_s >= SETTLE_S:
                break
        if stop.is_set() or last is None:
            return 128 + (stop.number or 2)
        verdict = judge(
            load.memory(),
            tracker=engine.tracker.name,
            engine_cpu_s=last.cpu_seconds_total,
            duration_s=engine.clock.now_s() - began_s,
        )
    if as_json:
        print(json.dumps({**verdict.as_dict(), "errors": list(errors)}))
    else:
        for error in errors:
            print(f"warning: {error}")
        print(
            f"\nverdict: {verdict.cold_out_share:.1%} of the cold memory is out,"
            f" {_mib(verdict.saved_bytes)} of RAM saved,"
            f" {verdict.hot_wrongly_out_share:.1%} of the hot memory was wrongly out,"
            f" the engine used {verdict.engine_cpu_s:.2f} s of CPU in {verdict.duration_s:.0f} s"
            f" (tracker {verdict.tracker}): {'good' if verdict.passed else 'NOT GOOD'}"
        )
    return 0 if verdict.passed else 1


def scan_interval_s(scan_s: float, round_s: float) -> float:
    """Time between scans: long enough that scanning is a small part of it, and that hot memory is touched in it.

    A small or emulated machine may take half a second for what others do in 20 ms.
    """
    return max(SCAN_INTERVAL_S, 8 * scan_s, 4 * round_s)


def _say_stopped(stop: Event) -> None:
    if stop.is_set():
        click.echo("stopped: the demo's process, cgroup and swap are taken away again", err=True)


def _mib(amount_bytes: float) -> str:
    return f"{amount_bytes / (1 << 20):.0f} MiB"


def _screen(stack: ExitStack, as_json: bool) -> Screen:
    if as_json:
        return NoScreen()
    if not sys.stdout.isatty():
        return PlainScreen()
    from rich.live import Live
    from rich.table import Table

    live = stack.enter_context(Live(refresh_per_second=4))

    class TableScreen:
        def show(self, rows: dict[str, str]) -> None:
            table = Table(title="memtier demo", show_header=False)
            for name, value in rows.items():
                table.add_row(name, value)
            live.update(table)

    return TableScreen()
