"""`python -m bench.saving --out DIR`: measure here and in the test VM, and write the table and the drawings.

Rounds are interleaved: each measures every way on every workload once, so that what else the machine does hits all
of them alike. Ways that do not work here are left out with the reason; the test VM has what they need.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from bench.saving.cell import LOADS, Cell, Times, measure
from bench.saving.report import Groups, draw, grouped, table
from bench.saving.variants import VARIANTS

ROUNDS, VM_ROUNDS = 3, 1
VM_SCALE = 0.25
VM_NODES = "2048:0-1"
VM_TIMES = Times(75.0, 20.0)
"""Together 29 minutes. Policy `auto` needs 70 s to know how the key-value server uses its memory."""
BEGIN, END = "<!-- {} begins -->", "<!-- {} ends -->"


def machine() -> str:
    """CPU, cores, memory and kernel."""
    model = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    kib = int(Path("/proc/meminfo").read_text().split()[1])
    return f"{model}, {os.cpu_count()} CPUs, {kib / (1 << 20):.1f} GiB, Linux {platform.release().split('-')[0]}"


def cells(workloads: Sequence[str], variants: Sequence[str], rounds: int, times: Times, scale: float) -> Iterator[Cell]:
    """Measure; each cell is printed when it is done.

    Ways that do not work here are left out, and so are cells that fail; why is printed.
    """
    usable = []
    for variant in variants:
        why = VARIANTS[variant].why_not()
        if why is None:
            usable.append(variant)
        else:
            print(f"{VARIANTS[variant].title}: left out: {why}", flush=True)
    for number in range(rounds):
        for workload in workloads:
            # Another order each round: no way always runs after the same other one.
            for variant in usable[number % len(usable) :] + usable[: number % len(usable)]:
                try:
                    cell = measure(workload, variant, times, scale=scale)
                except (OSError, RuntimeError, ValueError) as failure:
                    print(f"round {number + 1}, {workload}, {variant}: FAILED: {failure}", flush=True)
                    continue
                print(
                    f"round {number + 1}, {workload}, {variant}: {cell.saved_bytes >> 20} MiB saved,"
                    f" p99 {1e3 * cell.p99_s:.3g} ms, {cell.refaults_per_min:.0f} refaults/min,"
                    f" CPU {cell.variant_cpu_percent:.1f} %",
                    flush=True,
                )
                yield cell


def cells_in_vm(
    workloads: Sequence[str], variants: Sequence[str], rounds: int, times: Times
) -> Iterator[tuple[str, list[Cell]]]:
    """(the machine, its cells) measured in the test VM, for each round and workload: each has a guest of its own.

    What a guest measured before it failed counts; the failure is printed.
    """
    from support.vm import VmSession

    for number in range(rounds):
        turn = [*variants[number % len(variants) :], *variants[: number % len(variants)]]
        for workload in workloads:
            with VmSession() as session:
                command = [
                    *("python3", "-u", "-m", "bench.saving", "--here", "--json", "--rounds", "1"),
                    *("--settle", str(times.settle_s), "--window", str(times.window_s), "--scale", str(VM_SCALE)),
                    *("--workloads", workload, "--variants", *turn),
                ]
                environment = {"PYTHONPATH": "/host/tests", "PYTHONDONTWRITEBYTECODE": "1"}
                limit_s = 60 + len(turn) * (60 + 3 * (times.settle_s + times.window_s))
                result = session.run(command, timeout_s=limit_s, nodes=VM_NODES, swap_mib=0, env=environment)
            for line in result.output.splitlines():
                if not line.startswith("{"):
                    print(f"VM: {line}", flush=True)
            if result.status != 0:
                print(f"round {number + 1}, {workload}: the guest ended with status {result.status}", flush=True)
            records = result.records()
            titles = [str(record["title"]) for record in records if record["kind"] == "machine"]
            yield (
                titles[0] if titles else "Test VM",
                [
                    Cell(**{name: value for name, value in record.items() if name != "kind"})
                    for record in records
                    if record["kind"] == "cell"
                ],
            )


def insert(page: Path, part: str, text: str) -> None:
    """Put `text` between the marks of `part` in `page`.

    Raises:
        ValueError: the marks are not there.
    """
    begin, end = BEGIN.format(part), END.format(part)
    before, found, rest = page.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise ValueError(f"{page.name} has no marks {begin} and {end}")
    page.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}")


def how(groups: Groups, times: Times) -> str:
    """How often and for how long was measured, in words."""
    least, most = (pick(map(len, groups.values())) for pick in (min, max))
    rounds = "one round" if most == 1 else f"median of {most} rounds" if least == most else f"{least} to {most} rounds"
    return f"{rounds}; windows of {times.window_s:g} s, after {times.settle_s:g} s"


def write(found: Sequence[Cell], title: str, times: Times, out: Path, part: str, page: Path | None) -> None:
    """Table, drawings and raw numbers of one machine."""
    if not found:
        raise RuntimeError("nothing was measured")
    groups = grouped(found)
    text = f"{title}; {how(groups, times)}.\n\n{table(groups)}"
    keep(found, out, part)
    pictures = draw(groups, title, out, part)
    if page is not None:
        shown = "\n".join(f"![{part}]({os.path.relpath(path, page.parent)})" for path in pictures)
        insert(page, part, f"{text}\n{shown}")
    else:
        (out / f"{part}.md").write_text(text)
    print(f"\n{text}", flush=True)


def keep(found: Sequence[Cell], out: Path, part: str) -> None:
    """The raw numbers of what was measured so far."""
    (out / f"{part}.json").write_text(json.dumps([asdict(cell) for cell in found]) + "\n")


def _times(options: argparse.Namespace, usual: Times) -> Times:
    return Times(
        usual.settle_s if options.settle is None else options.settle,
        usual.window_s if options.window is None else options.window,
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.saving", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/saving"), help="folder for the results")
    parser.add_argument("--page", type=Path, help="a page with marks to put the results into, too")
    parser.add_argument("--rounds", type=int, help=f"default {ROUNDS}; in the test VM {VM_ROUNDS}")
    parser.add_argument("--settle", type=float, help="seconds before the measurement")
    parser.add_argument("--window", type=float, help="seconds of the measurement")
    parser.add_argument("--scale", type=float, default=1.0, help="of the workloads' memory and rate")
    parser.add_argument("--workloads", nargs="+", choices=list(LOADS), default=list(LOADS))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--here", action="store_true", help="measure on this machine only")
    parser.add_argument("--vm", action="store_true", help="measure in the test VM only")
    parser.add_argument("--json", action="store_true", help="print cells as JSON instead of writing files")
    options = parser.parse_args()
    if os.geteuid() != 0 and not (options.vm and not options.here):
        print("bench.saving needs root: it makes a swap device and a cgroup", file=sys.stderr)
        return 2
    out: Path = options.out
    if not options.json:
        out.mkdir(parents=True, exist_ok=True)
    if options.here or not options.vm:
        rounds, times, found = options.rounds or ROUNDS, _times(options, Times()), []
        if options.json:
            print(json.dumps({"kind": "machine", "title": machine()}), flush=True)
        for cell in cells(options.workloads, options.variants, rounds, times, options.scale):
            found.append(cell)
            if options.json:
                print(json.dumps({"kind": "cell", **asdict(cell)}), flush=True)
        if not options.json:
            write(found, machine(), times, out, "host", options.page)
    if options.vm or not options.here:
        rounds, times, found = options.rounds or VM_ROUNDS, _times(options, VM_TIMES), []
        title = ""
        for named, in_guest in cells_in_vm(options.workloads, options.variants, rounds, times):
            title = named
            found += in_guest
            keep(found, out, "vm")
        write(found, f"Test VM: {title}", times, out, "vm", options.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
