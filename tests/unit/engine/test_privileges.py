"""The table of capabilities: whole, and the words that follow from it."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from memtier_engine.abi.constants import Capability
from memtier_engine.errors import AccessDenied, KernelCallError
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.privileges import EXTRAS, MOVERS, PLUGIN_NEEDS, TRACKERS, least, missing, named
from memtier_engine.trackers import registry
from memtier_engine.trackers.bpf import rights


def machine(folder: Path, *held: Capability) -> Host:
    """One whose process has these capabilities."""
    mask = sum(1 << each for each in held)
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/self/status").write_text(f"CapEff:\t{mask:016x}\n")
    return Host(folder)


def test_every_tracker_has_a_row() -> None:
    assert TRACKERS.keys() == registry.TRACKERS.keys() | {"mglru"}


def test_what_bpf_asks_for_is_in_its_row() -> None:
    named_there = {*rights.FOR_LOADING, *rights.FOR_FRAMES, *rights.FOR_OTHERS}
    assert named_there == {need.capability for need in TRACKERS["bpf"]}


def test_each_need_has_a_reason_and_the_kernels_source() -> None:
    for needs in (*TRACKERS.values(), *MOVERS.values(), *EXTRAS.values(), PLUGIN_NEEDS):
        for need in needs:
            assert need.why
            assert need.source.endswith("()")


def test_a_broader_capability_that_is_needed_anyway_stands_for_a_narrow_one() -> None:
    assert Capability.CAP_DAC_READ_SEARCH in least(MOVERS["page-out"])
    both = least(MOVERS["page-out"], TRACKERS["refs"])
    assert Capability.CAP_DAC_OVERRIDE in both
    assert Capability.CAP_DAC_READ_SEARCH not in both
    assert Capability.CAP_BPF not in least(TRACKERS["bpf"])


def test_what_is_held_in_a_broader_form_is_not_missing(tmp_path: Path) -> None:
    host = machine(tmp_path, Capability.CAP_SYS_ADMIN, Capability.CAP_DAC_OVERRIDE)
    assert [need.capability.name for need in missing(host, TRACKERS["bpf"])] == ["CAP_SYS_PTRACE"]


def test_a_refusal_names_what_is_missing_once(tmp_path: Path) -> None:
    host = machine(tmp_path, Capability.CAP_SYS_NICE)
    refusal = AccessDenied("open /proc/7/pagemap: Permission denied [EACCES]", errno.EACCES)
    text = str(named(host, refusal, MOVERS["page-out"]))
    assert text == (
        "open /proc/7/pagemap: Permission denied [EACCES]: this process lacks CAP_DAC_READ_SEARCH, CAP_SYS_PTRACE"
        " (run as root)"
    )
    assert str(named(host, named(host, refusal, MOVERS["page-out"]), TRACKERS["bpf"])) == text


@pytest.mark.parametrize("failure", [KernelCallError("full", errno.ENOSPC), AccessDenied("no", errno.EPERM)])
def test_other_failures_stay_as_they_are(tmp_path: Path, failure: KernelCallError) -> None:
    host = machine(tmp_path, *(need.capability for need in PLUGIN_NEEDS))
    assert named(host, failure, MOVERS["page-out"]) is failure
