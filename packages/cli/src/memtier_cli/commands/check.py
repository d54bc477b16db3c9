"""`memtier check`: what this kernel offers."""

from __future__ import annotations

import json

import click

EXIT_NOTHING_WORKS = 3


@click.command("check")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool) -> int:
    """Show what this kernel and these rights offer, which tracker `auto` takes, and how to get what is missing.

    Exit status: 0 some tracker and some swap work, 3 not.
    """
    from memtier_engine.hostfs.host import Host
    from memtier_engine.hostfs.probe import probe
    from memtier_engine.trackers.registry import AUTO_ORDER, TRACKERS, why_not

    host = Host()
    features = probe(host)
    names = [*AUTO_ORDER, *sorted(set(TRACKERS) - set(AUTO_ORDER))]
    trackers = {name: why_not(name, host) for name in names}
    chosen = next((name for name in AUTO_ORDER if trackers[name] is None), None)
    works = chosen is not None and features.works("swap")
    if as_json:
        print(
            json.dumps(
                {
                    "features": {
                        feature.name: {
                            "works": feature.works,
                            "why": feature.why,
                            "fix": feature.fix,
                            "detail": feature.detail,
                        }
                        for feature in features
                    },
                    "trackers": {
                        name: {"works": why is None, "why": why and why[0], "fix": why and why[1]}
                        for name, why in trackers.items()
                    },
                    "auto": chosen,
                    "swap": features.works("swap"),
                }
            )
        )
        return 0 if works else EXIT_NOTHING_WORKS
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("feature", "works", "detail, or how to get it", title="this kernel")
    for feature in features:
        detail = (
            feature.detail or "" if feature.works else f"{feature.why}" + (f": {feature.fix}" if feature.fix else "")
        )
        table.add_row(feature.name, "[green]yes[/]" if feature.works else "[red]no[/]", detail)
    console.print(table)
    table = Table("tracker", "works", "reason", title="trackers, in the order in which auto tries them")
    for name, why in trackers.items():
        mark = " <- auto" if name == chosen else ""
        reason = ": ".join(part for part in why or () if part)
        table.add_row(name, "[red]no[/]" if why else f"[green]yes[/]{mark}", reason)
    console.print(table)
    if not works:
        console.print("memtier cannot page out here: " + ("no tracker works" if chosen is None else "there is no swap"))
    return 0 if works else EXIT_NOTHING_WORKS
