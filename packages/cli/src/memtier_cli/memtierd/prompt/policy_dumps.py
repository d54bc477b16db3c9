"""What `policy -dump WORDS` prints: one function per policy, in the reference's words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from memtier_cli.accessed import USAGE, AccessedDump
from memtier_cli.memtierd.prompt import configs
from memtier_cli.memtierd.prompt.errors import CommandError
from memtier_cli.memtierd.prompt.gotext import share
from memtier_cli.memtierd.prompt.policy_part import PolicyPart
from memtier_engine.distinct import distinct_counts
from memtier_engine.engine.loop import Engine
from memtier_engine.engine.oom_facts import HostOomFacts
from memtier_engine.errors import ConfigError, ProcessGone
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.locate import PageLocator
from memtier_engine.model import PAGE_BYTES, PAGE_SHIFT, ProcessId
from memtier_engine.policies.avoid_oom import AvoidOomPolicy
from memtier_engine.policies.heat import HeatPolicy
from memtier_engine.policies.heatmap import Heatmap, Heats

_GIB = 1 << 30
_MIB = 1 << 20
_HEAT_USAGE = "dump <forecast [PARAMS]|heatmap|heatgram [CLASSES]|numa>\n"
_NUMA_HEAD = "node      pid pageData numaUsed numaSize\n"
_OOM_USAGE = "dump <config|nodes|status|balance|cands>\n"


def dump(host: Host, policy: PolicyPart, words: Sequence[str]) -> str:
    """The text, with a newline at its end unless it is empty; of a policy that was stopped, what it saw last.

    Raises:
        CommandError: it was never started, and there is nothing to show without that.
    """
    work = _DUMPS.get(policy.name)
    return "" if work is None else work(host, policy, words)


def _age(host: Host, policy: PolicyPart, words: Sequence[str]) -> str:
    if not words:
        return USAGE
    if words[0] != "accessed":
        return f'unknown dump "{words[0]}"\n{USAGE}'
    try:
        wanted = AccessedDump.of(words[1:])
    except ConfigError as failure:
        return f"{failure.message}\n"
    with policy.seen() as engine:
        if engine is None:
            raise CommandError("policy is not started")
        return wanted.text(engine)


def _heat(host: Host, policy: PolicyPart, words: Sequence[str]) -> str:
    what = words[0] if words else ""
    if what not in ("forecast", "heatmap", "heatgram", "numa"):
        return _HEAT_USAGE
    if what == "forecast":
        return _forecaster(policy)
    with policy.seen() as engine:
        heat = None if engine is None else engine.policy
        assert heat is None or isinstance(heat, HeatPolicy)
        heatmap = Heatmap() if heat is None else heat.heatmap
        if what == "heatmap":
            return heatmap_text(heatmap)
        if what == "heatgram":
            classes = heatmap.config.heat_classes
            if len(words) > 1:
                if not words[1].isdecimal() or not 1 <= int(words[1]) <= 1000:
                    return f'invalid number of heat classes "{words[1]}", expected 1 to 1000\n'
                classes = int(words[1])
            return heatgram_text(heatmap, classes)
        return _NUMA_HEAD + ("" if engine is None or heat is None else _numa(host, engine, heat))


def heatmap_text(heatmap: Heatmap) -> str:
    """Every range of every process with its heat, class and age."""
    lines = ["heatmap:"]
    for process, heats in sorted(heatmap.processes.items()):
        classes = heatmap.classes(heats.heat)
        columns = (heats.starts, heats.ends, heats.pages, heats.heat, heats.created_ns, heats.updated_ns, classes)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        for number, (start, end, pages, heat, created, updated, its_class) in enumerate(rows):
            age_s = (updated - created) / 1e9
            shown = f"{start:x}-{end:x}({pages}),{heat:f},{created},{age_s:.6f}s"
            lines.append(f"pid: {process.pid}: {number} {{{shown}}} (class {its_class})")
    return "\n".join(lines) + "\n"


def heatgram_text(heatmap: Heatmap, classes: int) -> str:
    """The greatest heat of each process, and how much of its memory is in each of so many classes."""
    found = sorted(heatmap.processes.items())
    lines = ["", "table: maximum heat in heatmaps", "     pid  maxHeat"]
    lines += [f"{process.pid:8d} {_most(heats):8.4f}" for process, heats in found]
    lines += ["", "table: memory in heat classes"]
    total = sum(int(heats.pages.sum()) for _, heats in found)
    most = heatmap.config.heat_max
    for process, heats in found:
        lines.append("     pid class pidmem[%] totmem[%]    mem[G]")
        wanted = np.zeros(len(heats), np.int64) if most == 0 else (heats.heat * (classes / most)).astype(np.int64)
        counts = np.bincount(np.minimum(wanted, classes - 1), heats.pages, minlength=classes)
        own = int(heats.pages.sum())
        for number, pages in enumerate(counts.tolist()):
            shares = f"{share(pages, own, 2):>9} {share(pages, total, 2):>9}"
            lines.append(f"{process.pid:8d} {number:5d} {shares} {pages * PAGE_BYTES / _GIB:9.3f}")
    return "\n".join(lines) + "\n"


def _most(heats: Heats) -> float:
    return float(heats.heat.max()) if len(heats) else 0.0


def _numa(host: Host, engine: Engine, heat: HeatPolicy) -> str:
    """Where the tracked memory is now, by node and process, and what the policy may use."""
    locator = PageLocator(host)
    by_process: dict[ProcessId, dict[int, int]] = {}
    for process, own in engine.pages.items():
        try:
            by_process[process] = distinct_counts(locator.nodes(process, own.spans))
        except ProcessGone:
            continue
    named = {node for group in heat.config.heat_numas.values() for node in group} | set(heat.config.numa_size_bytes)
    named |= {node for counts in by_process.values() for node in counts if node >= 0}
    used = {node: sum(counts.get(node, 0) for counts in by_process.values()) for node in named}
    lines = []
    for node in sorted(named):
        size = heat.config.numa_size_bytes.get(node, 0) // _MIB
        for process in sorted(by_process):
            data = (by_process[process].get(node, 0) << PAGE_SHIFT) // _MIB
            lines.append(f"{node:4d} {process.pid:8d} {data:7d}M {(used[node] << PAGE_SHIFT) // _MIB:7d}M {size:7d}M\n")
    return "".join(lines)


def _forecaster(policy: PolicyPart) -> str:
    if policy.spec is None or policy.spec.forecaster is None:
        return "no forecaster\n"
    if policy.spec.forecaster.name == "stub":
        return "<HeatForecasterStub>\n"
    section = configs.section_of("policy.heat", policy.config_text or "{}").section("forecaster")
    assert section is not None
    name, text = section.text("name"), section.text_or_none("config")
    shown = configs.dump("forecaster", name, text) if text else ""
    return f"HeatForecaster{name.capitalize()}{{config={shown}}}\n"


def _avoid_oom(host: Host, policy: PolicyPart, words: Sequence[str]) -> str:
    match words[0] if words else None:
        case None:
            return _OOM_USAGE
        case "config":
            return configs.dump("policy", policy.name, policy.config_text) + "\n"
        case "nodes":
            return "".join(
                f"Node {node.node}: avail {node.available_bytes / _GIB:.3f}G/{node.total_bytes / _GIB:.3f}G "
                f"{share(node.available_bytes, node.total_bytes, 1)} %\n"
                for node in HostOomFacts(host, ()).nodes()
            )
        case "status":
            return "online\n" if policy.running else "offline\n"
        case "balance" | "cands" as what:
            with policy.seen() as engine:
                if engine is None:
                    return "\n"
                assert isinstance(engine.policy, AvoidOomPolicy)
                return f"{engine.policy.status}\n" if what == "balance" else _candidates(engine.policy)
        case _:
            return f"unknown argument, {_OOM_USAGE}"


def _candidates(policy: AvoidOomPolicy) -> str:
    return "".join(
        f"pid: {each.process.pid} {int(each.spans.starts[0]):x} size: {each.size_bytes // _MIB} MB "
        f"(in {PAGE_BYTES >> 10} kB pages) fromNode: {each.node} score: {each.score}\n"
        for each in policy.evaluated
    )


def _demote_idle(host: Host, policy: PolicyPart, words: Sequence[str]) -> str:
    with policy.seen() as engine:
        if engine is None:
            return "pids: 0, ranges: 0, pages: 0 (0.0 MiB)\n"
        ranges = sum(len(own.spans) for own in engine.pages.values())
        pages = sum(len(own.ages) for own in engine.pages.values())
        return f"pids: {len(engine.pages)}, ranges: {ranges}, pages: {pages} ({pages * PAGE_BYTES / _MIB:.1f} MiB)\n"


_DUMPS: Mapping[str, Callable[[Host, PolicyPart, Sequence[str]], str]] = {
    "age": _age,
    "auto": _age,
    "avoid-oom": _avoid_oom,
    "demote-idle": _demote_idle,
    "heat": _heat,
}
