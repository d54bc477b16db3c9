"""Cells in; a table in Markdown and drawings in SVG out."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.saving.cell import LOADS, Cell
from bench.saving.variants import VARIANTS

MIB = 1 << 20
Groups = Mapping[tuple[str, str], Sequence[Cell]]
"""By (workload, variant), in the order of `LOADS` and `VARIANTS`."""
_HEAD = (
    "| workload | way | out MiB | saved MiB, net | of its memory | p50 ms | p99 ms | p99 to none"
    " | refaults/min | CPU of the way | CPU of the workload |"
)
_COLORS = ("#777777", "#d1495b", "#00798c", "#8e5ea2", "#edae49", "#30638e")


def grouped(cells: Iterable[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """The cells of all rounds, by what they measure."""
    found: dict[tuple[str, str], list[Cell]] = {(workload, variant): [] for workload in LOADS for variant in VARIANTS}
    for cell in cells:
        found[cell.workload, cell.variant].append(cell)
    return {key: group for key, group in found.items() if group}


def middle(group: Sequence[Cell], value: Callable[[Cell], float]) -> float:
    """The median of the rounds."""
    return statistics.median(map(value, group))


def table(groups: Groups) -> str:
    """One row per workload and way; each number is the median of the rounds."""
    lines = [_HEAD, "|" + " --- |" * (_HEAD.count("|") - 1)]
    for (workload, variant), group in groups.items():
        base = groups.get((workload, "none"))
        saved, whole = middle(group, lambda cell: cell.saved_bytes), middle(group, lambda cell: cell.footprint_bytes)
        p99_s = middle(group, lambda cell: cell.p99_s)
        columns = (
            LOADS[workload].title,
            VARIANTS[variant].title,
            f"{middle(group, lambda cell: cell.out_bytes) / MIB:.0f}",
            f"{saved / MIB:.0f}",
            f"{100 * saved / whole:.0f} %" if whole else "",
            f"{1e3 * middle(group, lambda cell: cell.p50_s):.3g}",
            f"{1e3 * p99_s:.3g}",
            f"{p99_s / middle(base, lambda cell: cell.p99_s):.2f}" if base else "",
            f"{middle(group, lambda cell: cell.refaults_per_min):.0f}",
            f"{middle(group, lambda cell: cell.variant_cpu_percent):.1f} %",
            f"{middle(group, lambda cell: cell.load_cpu_percent):.1f} %",
        )
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines) + "\n"


def draw(groups: Groups, title: str, folder: Path, prefix: str) -> list[Path]:
    """Two drawings: what was saved at which price, and the way there. Returns their files.

    Raises:
        ImportError: matplotlib is not installed (dependency group `bench`).
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "memtier", "svg.fonttype": "none", "font.size": 8})
    from matplotlib import pyplot

    def save(figure: Any, name: str) -> Path:
        path = folder / f"{prefix}-{name}.svg"
        figure.suptitle(title, fontsize=9)
        figure.tight_layout(rect=(0, 0.05, 1, 1))
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
        # Blanks at the ends of lines would only make differences.
        path.write_text("".join(f"{line.rstrip()}\n" for line in path.read_text().splitlines()))
        return path

    return [save(_bars(groups, pyplot), "bars"), save(_courses(groups, pyplot), "course")]


def _bars(groups: Groups, pyplot: Any) -> Any:
    plain_s = {name: middle(group, lambda cell: cell.p99_s) for (name, way), group in groups.items() if way == "none"}
    panels: tuple[tuple[str, Callable[[Cell], float]], ...] = (
        ("saved MiB, net of compressed size", lambda cell: cell.saved_bytes / MIB),
        ("p99 of the workload, to no engine", lambda cell: cell.p99_s / plain_s.get(cell.workload, cell.p99_s)),
        ("refaults per minute", lambda cell: cell.refaults_per_min),
        ("CPU of the way, % of one core", lambda cell: cell.variant_cpu_percent),
    )
    workloads, variants = _names(groups)
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6))
    for axis, (label, value) in zip(axes.flat, panels, strict=True):
        width = 0.8 / len(variants)
        for column, variant in enumerate(variants):
            drawn = [name for name in workloads if (name, variant) in groups]
            places = [workloads.index(name) + (column + 0.5) * width - 0.4 for name in drawn]
            heights = [middle(groups[name, variant], value) for name in drawn]
            spread = [
                [
                    abs(pick(map(value, groups[name, variant])) - height)
                    for name, height in zip(drawn, heights, strict=True)
                ]
                for pick in (min, max)
            ]
            axis.bar(
                places, heights, width, yerr=spread, label=VARIANTS[variant].title, color=_color(variant), capsize=1.5
            )
        axis.set_xticks(range(len(workloads)), [LOADS[name].title for name in workloads])
        axis.set_ylabel(label)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="lower center", ncols=len(variants), fontsize=7)
    figure.subplots_adjust(bottom=0.1)
    return figure


def _courses(groups: Groups, pyplot: Any) -> Any:
    workloads, variants = _names(groups)
    figure, axes = pyplot.subplots(1, len(workloads), figsize=(9, 3), squeeze=False)
    for axis, name in zip(axes.flat, workloads, strict=True):
        for variant in variants:
            for number, cell in enumerate(groups.get((name, variant), ())):
                times, sizes = zip(*cell.course, strict=True)
                label = VARIANTS[variant].title if number == 0 else None
                axis.plot(times, sizes, label=label, color=_color(variant), linewidth=1)
        axis.set_title(LOADS[name].title, fontsize=8)
        axis.set_xlabel("seconds since the way began")
        axis.set_ylabel("MiB out")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="lower center", ncols=len(variants), fontsize=6)
    return figure


def _names(groups: Groups) -> tuple[list[str], list[str]]:
    return (
        [name for name in LOADS if any(key[0] == name for key in groups)],
        [name for name in VARIANTS if any(key[1] == name for key in groups)],
    )


def _color(variant: str) -> str:
    return _COLORS[list(VARIANTS).index(variant) % len(_COLORS)]
