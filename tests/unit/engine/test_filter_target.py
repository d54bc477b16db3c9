"""Targets `proc`, `filter` and pacing, and Go's regular expressions."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

from memtier_engine.clock import FakeClock
from memtier_engine.errors import ConfigError
from memtier_engine.model import ProcessId
from memtier_engine.targets.filter import FilterTarget, ProcessFilter
from memtier_engine.targets.paced import PacedTarget
from memtier_engine.targets.proc import ProcTarget
from memtier_engine.targets.regexp import compile_re2
from support.fakes import FakeTarget
from support.hostfolder import PF_KTHREAD, HostFolder

ONE, TWO = ProcessId(1001, 100), ProcessId(1002, 100)


class Machine(HostFolder):
    """Processes with a program and sizes."""

    def add(
        self, process: ProcessId, exe: str | None, *, size: int = 0, rss: int = 0, dirty: int = 0, flags: int = 0
    ) -> None:
        self.process(process.pid, start_ticks=process.start_ticks, flags=flags)
        if exe is not None:
            link = self.root / f"proc/{process.pid}/exe"
            link.unlink(missing_ok=True)
            link.symlink_to(exe)
        self.write(f"proc/{process.pid}/status", f"Name:\twork\nVmSize:\t{size} kB\nVmRSS:\t{rss} kB\n")
        self.write(f"proc/{process.pid}/smaps_rollup", f"0-1 ---p 0 00:00 0 [rollup]\nPrivate_Dirty: {dirty} kB\n")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def found(machine: Machine, *filters: ProcessFilter) -> set[int]:
    return {process.pid for process in FilterTarget(machine.host, ProcTarget(machine.host), filters).poll()}


def exe(pattern: str) -> ProcessFilter:
    return ProcessFilter(exe_regexp=compile_re2(pattern))


def test_proc_finds_programs_and_neither_kernel_threads_nor_itself(machine: Machine) -> None:
    machine.add(ONE, "/bin/one")
    machine.add(TWO, None)
    machine.add(ProcessId(1003, 1), "/bin/thread", flags=PF_KTHREAD)
    machine.add(ProcessId(os.getpid(), 1), "/bin/self")
    machine.write("proc/meminfo", "")
    assert ProcTarget(machine.host).poll() == {ONE}


def test_without_filters_nothing_passes_and_an_empty_filter_lets_all_pass(machine: Machine) -> None:
    machine.add(ONE, "/bin/one")
    assert found(machine) == set()
    assert found(machine, ProcessFilter()) == {1001}


def test_the_program_is_searched_without_anchors(machine: Machine) -> None:
    machine.add(ONE, "/usr/bin/meme")
    machine.add(TWO, "/opt/memed")
    assert found(machine, exe(".*/meme")) == {1001, 1002}
    assert found(machine, exe("/meme$")) == {1001}
    assert found(machine, exe("^meme")) == set()


def test_a_program_that_was_replaced_is_still_that_program(machine: Machine) -> None:
    machine.add(ONE, "/usr/bin/meme (deleted)")
    assert found(machine, exe("/meme$")) == {1001}


def test_sizes_count_from_the_threshold_on(machine: Machine) -> None:
    machine.add(ONE, "/bin/one", size=100, rss=50, dirty=20)
    for passing, failing in (
        (ProcessFilter(min_vm_size_kib=100), ProcessFilter(min_vm_size_kib=101)),
        (ProcessFilter(min_vm_rss_kib=50), ProcessFilter(min_vm_rss_kib=51)),
        (ProcessFilter(min_private_dirty_kib=20), ProcessFilter(min_private_dirty_kib=21)),
        (
            ProcessFilter(min_vm_size_kib=100, min_private_dirty_kib=20),
            ProcessFilter(min_vm_size_kib=100, min_private_dirty_kib=21),
        ),
    ):
        assert found(machine, passing) == {1001}
        assert found(machine, failing) == set()


def test_filters_combine_by_and_or_and_not(machine: Machine) -> None:
    machine.add(ONE, "/bin/one", rss=10)
    machine.add(TWO, "/bin/two", rss=20)
    either = ProcessFilter(or_filters=(exe("/one"), exe("/two")))
    assert found(machine, either) == {1001, 1002}
    assert found(machine, ProcessFilter(or_filters=(exe("/one"), exe("/three")))) == {1001}
    assert found(machine, ProcessFilter(and_filters=(either, ProcessFilter(min_vm_rss_kib=15)))) == {1002}
    assert found(machine, ProcessFilter(not_filter=exe("/one"))) == {1002}
    assert found(machine, ProcessFilter(min_vm_rss_kib=15, not_filter=exe("/two"))) == set()
    assert found(machine, exe("/one"), exe("/two")) == {1001, 1002}, "any filter of the list is enough"


def test_a_process_that_grows_past_the_threshold_is_found_later(machine: Machine) -> None:
    """The reference asks only once, when a process appears."""
    machine.add(ONE, "/bin/one", rss=10)
    target = FilterTarget(machine.host, ProcTarget(machine.host), [ProcessFilter(min_vm_rss_kib=20)])
    assert target.poll() == frozenset()
    machine.add(ONE, "/bin/one", rss=20)
    assert target.poll() == {ONE}


def test_a_process_that_vanishes_meanwhile_does_not_match(machine: Machine) -> None:
    target = FilterTarget(machine.host, FakeTarget(ONE), [ProcessFilter(min_vm_rss_kib=1)])
    assert target.poll() == frozenset()


def test_a_paced_target_asks_once_per_interval() -> None:
    source, clock = FakeTarget(ONE), FakeClock()
    target = PacedTarget(source, 5.0, clock)
    assert target.poll() == {ONE}
    source.processes = frozenset({TWO})
    clock.advance(4.9)
    assert target.poll() == {ONE}
    clock.advance(0.1)
    assert target.poll() == {TWO}


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        (r"[[:alpha:]]+/x", "/bin/x", "/7/x"),
        (r"[^[:digit:]_]x", "ax", "7x"),
        (r"a\z", "ba", "a\n"),
        (r"a$", "ba", "a\n"),
        (r"(?m)a$", "a\nb", "ab"),
        (r"(?i)MEME", "/bin/meme", "/bin/mem"),
        (r"x(?i:MEME)", "xmeme", "XMEME"),
        (r"\Qa.b\E", "a.b", "acb"),
        (r"\Qa.b", "a.b", "acb"),
        (r"\x{41}b", "Ab", "bb"),
        (r"(?P<name>a)b", "ab", "b"),
        (r"(?<name>a)b", "ab", "b"),
        (r"[]a]b", "]b", "xb"),
        (r"[a[]b", "[b", "xb"),
        (r"a{2,3}", "aa", "a"),
        (r"\bcat\b", "a cat", "cats"),
        (r"\d", "7", "\u0667"),
        (r"\$", "$", "a"),
        (r"^\pL+$", "aé", "a1"),
        (r"^\p{Lu}", "Éa", "éA"),
        (r"^\P{Sc}$", "a", "€"),
        (r"^\p{^L}$", "1", "a"),
        (r"^\P{^L}$", "a", "1"),
        (r"^[\p{Sc}x]$", "€", "y"),
        (r"^\p{Any}$", "€", ""),
    ],
)
def test_go_regular_expressions_mean_what_they_mean_in_go(pattern: str, matching: str, other: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = compile_re2(pattern)
    assert compiled.search(matching)
    assert not compiled.search(other)


@pytest.mark.parametrize(
    "pattern",
    [
        *("(?=a)", "(?!a)", "(?<=a)b", "(?<!a)b", r"(a)\1", "(?P<n>a)(?P=n)", "(?>a)", "a++", "a*+", "(?#x)", "("),
        *(
            "[a",
            "a(?i)b",
            "(?-i)a",
            "(?U)a",
            "(?(1)a)",
            r"\pX",
            r"\p{Greek}",
            r"\p",
            r"\Z",
            r"\x{zz}",
            "[[:nope:]]",
            "*a",
            "a{5}+",
        ),
    ],
)
def test_what_go_and_python_do_not_share_is_refused_with_the_pattern(pattern: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compile_re2(pattern, key_path="filters[0].procexeregexp")
    assert repr(pattern) in str(caught.value)
    assert str(caught.value).startswith("filters[0].procexeregexp: ")
