"""`memtier check`: what this kernel offers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import click

EXIT_NOTHING_WORKS = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """Whether something works here; if not, why and what would help."""

    works: bool
    why: str | None
    fix: str | None
    detail: str | None = None

    @property
    def text(self) -> str:
        """The reason and the help, or what is worth knowing."""
        if self.works:
            return self.detail or ""
        return ": ".join(part for part in (self.why, self.fix) if part)


@dataclass(frozen=True, slots=True)
class Findings:
    """All that was found out, by name."""

    features: dict[str, Finding]
    trackers: dict[str, Finding]
    auto: str | None  # the tracker that it takes
    auto_order: dict[str, str]
    """Name and reason of each that `auto` tries, in turn."""
    bpf_sources: dict[str, Finding]
    bpf_loaders: dict[str, Finding]

    @property
    def works(self) -> bool:
        """Whether memory can be paged out here."""
        return self.auto is not None and self.features["swap"].works


def look() -> Findings:
    """Try everything on this machine."""
    from memtier_engine.hostfs.host import Host
    from memtier_engine.hostfs.probe import probe
    from memtier_engine.trackers.bpf.sources import sources, ways_to_load
    from memtier_engine.trackers.registry import AUTO_ORDER, AUTO_REASONS, TRACKERS, why_not

    host = Host()
    trackers = {}
    for name in (*AUTO_ORDER, *sorted(set(TRACKERS) - set(AUTO_ORDER))):
        why = why_not(name, host, in_auto=name in AUTO_REASONS)
        trackers[name] = Finding(why is None, why and why[0], why and why[1], AUTO_REASONS.get(name))
    return Findings(
        {each.name: Finding(each.works, each.why, each.fix, each.detail) for each in probe(host)},
        trackers,
        next((name for name in AUTO_ORDER if trackers[name].works), None),
        dict(AUTO_REASONS),
        {each.name: Finding(each.works, each.why, each.fix, each.detail) for each in sources(host)},
        {each.name: Finding(each.works, each.why, each.fix, each.detail) for each in ways_to_load(host)},
    )


@click.command("check")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool) -> int:
    """Show what this kernel and these rights offer, which tracker `auto` takes, and how to get what is missing.

    Exit status: 0 some tracker and some swap work, 3 not.
    """
    found = look()
    if as_json:
        from memtier_cli.memtier.rights import rows

        print(json.dumps({**asdict(found), "swap": found.features["swap"].works, "capabilities": rows()}))
    else:
        _show(found)
    return 0 if found.works else EXIT_NOTHING_WORKS


def _show(found: Findings) -> None:
    from rich.console import Console

    console = Console()
    table = _table("this kernel", ("feature", "works", "detail, or how to get it"), found.features)
    console.print(table)
    columns = ("tracker", "works", "why auto tries it there, or why it does not work")
    console.print(_table("trackers, in the order in which auto tries them", columns, found.trackers, found.auto))
    columns = ("source", "works", "detail, or how to get it")
    console.print(_table("BPF: what it can tell (docs/bpf.md)", columns, found.bpf_sources))
    columns = ("loader", "works", "how to get it")
    console.print(_table("BPF: how it can be loaded; the first that works is taken", columns, found.bpf_loaders))
    console.print(_capabilities())
    if not found.works:
        reason = "no tracker works" if found.auto is None else "there is no swap"
        console.print(f"memtier cannot page out here: {reason}")


def _capabilities() -> object:
    from memtier_cli.memtier.rights import table

    return table()


def _table(title: str, columns: Sequence[str], rows: dict[str, Finding], chosen: str | None = None) -> object:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title)
    for column in columns:
        table.add_column(column, overflow="fold")  # a path or command that is cut off helps nobody
    for name, finding in rows.items():
        mark = " <- auto" if name == chosen else ""
        table.add_row(name, f"[green]yes[/]{mark}" if finding.works else "[red]no[/]", escape(finding.text))
    return table
