"""Loading tracker `bpf`: by libbpf and by bcc, with rights and without."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from memtier_engine.errors import KernelCallError, TrackerUnavailable, Unavailable
from memtier_engine.hostfs.host import Host
from memtier_engine.trackers.bpf import build, loaders, program, sources
from memtier_engine.trackers.bpf.btf import Btf
from memtier_engine.trackers.bpf.faults import FaultCounter
from memtier_engine.trackers.bpf.tracker import BpfTracker
from memtier_engine.trackers.registry import create_tracker, why_not
from support.kernel_headers import VARIABLE, source_for_bcc
from support.toucher import scan, toucher

_WHY = why_not("bpf", Host())
pytestmark = pytest.mark.skipif(
    _WHY is not None, reason=f"tracker bpf does not work here: {_WHY}; run as root, or `make e2e` in the test VM"
)


@pytest.fixture(autouse=True)
def no_walker_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that another test left loaded would hide what loading does here."""
    monkeypatch.setattr(program, "_shared", program._Shared())


@pytest.fixture
def kernel_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers for bcc: the running kernel's, or those of any other version."""
    try:
        source = source_for_bcc(tmp_path)
    except Unavailable as failure:
        pytest.skip(f"{failure.message}: {failure.hint}")
    if source is not None:
        monkeypatch.setenv(VARIABLE, str(source))


def test_auto_takes_the_loader_that_needs_no_compiler() -> None:
    tracker = BpfTracker(Host())
    assert tracker.loader == "libbpf"
    tracker.close()


def test_bcc_compiles_the_same_source_and_sees_the_same(kernel_headers: None, tmp_path: Path) -> None:
    """With the headers of another kernel version too: offsets come from this kernel's BTF."""
    tracker = BpfTracker(Host(), loader="bcc")
    try:
        assert tracker.loader == "bcc"
        with toucher("anonymous", 1000, tmp_path) as load:
            load.write(range(1000))
            scan(tracker, load)
            load.read(range(0, 1000, 7))
            assert scan(tracker, load).accessed.tolist() == list(range(0, 1000, 7))
    finally:
        tracker.close()


def test_bcc_counts_faults_too(kernel_headers: None, tmp_path: Path) -> None:
    with FaultCounter(Host(), loader="bcc") as counter, toucher("anonymous", 1000, tmp_path) as load:
        counter.watch(frozenset({load.process}))
        load.write(range(100))
        table = counter.read()[load.process]
        assert int(table.faults.sum()) >= 100


def test_without_libbpf_auto_falls_back_to_bcc(kernel_headers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(host: Host, programs: object, sizes: object) -> loaders.Loaded:
        raise Unavailable("libbpf.so.1 is not installed")

    monkeypatch.setitem(loaders._LOAD, "libbpf", absent)
    tracker = BpfTracker(Host())
    assert tracker.loader == "bcc"
    tracker.close()


def test_each_source_and_loader_tells_whether_it_works_and_why_not() -> None:
    """What `memtier check` shows: here at least the page tables and the faults."""
    found = {source.name: source for source in (*sources.sources(Host()), *sources.ways_to_load(Host()))}
    assert list(found) == ["accessed", "sampled", "faults", "hardware", "libbpf", "bcc"]
    assert all(source.works or source.why for source in found.values())
    assert found["accessed"].works
    assert "loaded by libbpf" in (found["accessed"].detail or "")
    assert "page_fault" in (found["faults"].detail or "")


def test_a_source_that_does_not_work_gives_its_reason(tmp_path: Path) -> None:
    """A machine without anything: no source, no loader, and each says what it misses."""
    (tmp_path / "proc/sys/kernel").mkdir(parents=True)
    (tmp_path / "proc/cpuinfo").write_text(Path("/proc/cpuinfo").read_text())
    (tmp_path / "proc/sys/kernel/osrelease").write_text("1.2.3\n")
    (tmp_path / "proc/self").mkdir()
    (tmp_path / "proc/self/status").write_text("Name:\tx\nCapEff:\t000001ffffffffff\n")
    found = {
        source.name: source for source in (*sources.sources(Host(tmp_path)), *sources.ways_to_load(Host(tmp_path)))
    }
    assert not any(source.works for source in found.values())
    for name in ("accessed", "sampled", "faults", "libbpf", "bcc"):
        assert "btf/vmlinux does not exist" in (found[name].why or "")
        assert found[name].fix == "a kernel with CONFIG_DEBUG_INFO_BTF=y"
    assert "neither PEBS" in (found["hardware"].why or "")


@pytest.mark.parametrize("state", ["confidentiality", "integrity"])
def test_a_locked_down_kernel_is_named_whatever_loads_the_program(
    state: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Simulated: the verifier refuses bpf_probe_read_kernel to both loaders. Only confidentiality forbids it."""

    def refused(host: Host, programs: object, sizes: object) -> loaders.Loaded:
        raise KernelCallError("load the BPF object: unknown func bpf_probe_read_kernel#113", errno.EINVAL)

    monkeypatch.setitem(loaders._LOAD, "libbpf", refused)
    monkeypatch.setitem(loaders._LOAD, "bcc", refused)
    for name in ("proc/cpuinfo", "proc/self/status"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(Path("/", name).read_text())
    (tmp_path / "sys/kernel/security").mkdir(parents=True)
    words = [f"[{each}]" if each == state else each for each in ("none", "integrity", "confidentiality")]
    (tmp_path / "sys/kernel/security/lockdown").write_text(" ".join(words) + "\n")
    found = {source.name: source.why or "" for source in sources.sources(Host(tmp_path))}
    for name in ("accessed", "sampled", "faults"):
        assert ("locked down (confidentiality)" in found[name]) == (state == "confidentiality")


def test_memtier_check_shows_each_source_and_loader_with_its_reason() -> None:
    """Without the rights, each names the capabilities; `auto`'s order comes with its reasons."""
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv: apt install util-linux")
    program = [
        sys.executable,
        "-c",
        "import sys; from memtier_cli.memtier.program import main; sys.exit(main())",
        "check",
    ]
    dropped = ["setpriv", "--inh-caps=-all", "--bounding-set=-sys_admin,-bpf,-perfmon", *program, "--json"]
    found = json.loads(subprocess.run(dropped, capture_output=True, text=True, check=False).stdout)
    sources = found["bpf_sources"]
    assert list(sources) == ["accessed", "sampled", "faults", "hardware"]
    for name in ("accessed", "sampled", "faults"):
        assert not sources[name]["works"]
        assert "this process lacks CAP_BPF, CAP_PERFMON" in sources[name]["why"]
    assert found["bpf_loaders"]["libbpf"]["works"], "the library is there, the rights to use it are not"
    assert found["auto"] not in (None, "bpf", "idlepage")
    assert list(found["auto_order"]) == ["bpf", "idlepage", "damon", "softdirty", "refs"]
    assert all(found["auto_order"].values())
    table = subprocess.run(program, capture_output=True, text=True, check=False).stdout
    for word in ("accessed", "hardware", "libbpf", "loaded by"):
        assert word in table


def test_without_both_the_reasons_of_both_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(host: Host, programs: object, sizes: object) -> loaders.Loaded:
        raise Unavailable("not here", hint="install it")

    monkeypatch.setitem(loaders._LOAD, "libbpf", absent)
    monkeypatch.setitem(loaders._LOAD, "bcc", absent)
    with pytest.raises(TrackerUnavailable, match=r"libbpf: not here; bcc: not here \(install it\)"):
        BpfTracker(Host())


def test_without_kernel_headers_bcc_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("BCC_KERNEL_SOURCE", raising=False)
    (tmp_path / "proc/sys/kernel").mkdir(parents=True)
    (tmp_path / "proc/sys/kernel/osrelease").write_text("1.2.3\n")
    with pytest.raises(Unavailable, match=r"neither /lib/modules/1\.2\.3/build nor .* exists"):
        loaders._need_headers(Host(tmp_path))


def test_without_type_information_the_option_is_named(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"btf/vmlinux does not exist .*CONFIG_DEBUG_INFO_BTF"):
        loaders.load_by_libbpf(Host(tmp_path), ("walk",), {})
    with pytest.raises(Unavailable, match=r"^/sys/kernel/btf/vmlinux does not exist .*CONFIG_DEBUG_INFO_BTF"):
        loaders.load(Host(tmp_path), ("walk",))  # that bcc is missing too, say, would be beside the point


@pytest.mark.parametrize(
    ("dropped", "missing"),
    [
        ("-sys_admin,-bpf,-perfmon", "CAP_BPF, CAP_PERFMON"),
        ("-sys_admin,-perfmon", "CAP_PERFMON"),
        ("-sys_admin,-bpf", "CAP_BPF"),
        ("-sys_admin", "CAP_SYS_ADMIN"),
    ],
)
def test_a_missing_capability_is_named(dropped: str, missing: str) -> None:
    """Really dropped, in a process of its own."""
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv: apt install util-linux")
    output = subprocess.run(
        ["setpriv", "--inh-caps=-all", f"--bounding-set={dropped}", sys.executable, "-c", _TRY],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"this process lacks {missing} (run as root)" in output.stdout
    assert output.stderr == ""
    assert output.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("dropped", "missing", "what"),
    [
        ("-dac_override,-dac_read_search", "CAP_DAC_OVERRIDE", "BpfTracker"),
        ("-sys_nice", "CAP_SYS_NICE", "SampledBpfTracker"),
    ],
)
def test_a_capability_for_other_users_processes_is_named_too(dropped: str, missing: str, what: str) -> None:
    """Loading needs none of them: they are missed when another user's process is scanned, or cleared."""
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv: apt install util-linux")
    scan_it = [sys.executable, "-c", _SCAN]
    with subprocess.Popen(["sleep", "60"], user=65534, group=65534) as other:
        try:
            output = subprocess.run(
                ["setpriv", "--inh-caps=-all", f"--bounding-set={dropped}", *scan_it, what, str(other.pid)],
                capture_output=True,
                text=True,
                check=True,
            )
        finally:
            other.kill()
    assert output.stdout.endswith(f"this process lacks {missing} (run as root)\n")
    assert output.stderr == ""


_SCAN = """
import sys
import numpy as np
from memtier_engine.errors import MemtierError
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import process_id
from memtier_engine.model import Spans
from memtier_engine.trackers.bpf.sampling import SampledBpfTracker
from memtier_engine.trackers.bpf.tracker import BpfTracker
spans = Spans(np.array([1 << 21], np.uint64), np.array([1 << 22], np.uint64))
try:
    tracker = {"BpfTracker": BpfTracker, "SampledBpfTracker": SampledBpfTracker}[sys.argv[1]](Host())
    print(list(tracker.scan(process_id(Host(), int(sys.argv[2])), spans)))
except MemtierError as failure:
    print(failure)
"""


_TRY = """
from memtier_engine.hostfs.host import Host
from memtier_engine.trackers.bpf.program import Walker
try:
    Walker(Host())
    print("works")
except Exception as failure:
    print(failure)
"""


def test_a_kernel_that_gives_programs_no_kernel_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated: the program runs, but reads zeros everywhere."""
    monkeypatch.setattr(program, "_prog_run", lambda fd, arguments: None)
    with pytest.raises(TrackerUnavailable, match="cannot read kernel memory"):
        program.Walker(Host())


def test_a_direct_map_that_is_not_where_it_should_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated: we look for bytes that are nowhere."""
    real = program._prog_run

    def elsewhere(fd: int, arguments: tuple[int, ...]) -> None:
        is_locate = len(arguments) == 5 and arguments[3] >> 40
        real(fd, (*arguments[:3], arguments[3] ^ 1, arguments[4]) if is_locate else arguments)

    monkeypatch.setattr(program, "_prog_run", elsewhere)
    with pytest.raises(TrackerUnavailable, match="could not be verified"):
        program.Walker(Host())


def test_a_walk_that_contradicts_pagemap_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated: page tables with one level more than they have."""
    real = program._paging_of
    monkeypatch.setattr(program, "_paging_of", lambda host: (real(host)[0], 48 if real(host)[1] == 39 else 39))
    with pytest.raises(TrackerUnavailable, match="contradicts pagemap"):
        program.Walker(Host())


def test_nothing_stays_loaded_or_open_after_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    real = program._paging_of
    monkeypatch.setattr(program, "_paging_of", lambda host: (real(host)[0], 48 if real(host)[1] == 39 else 39))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(TrackerUnavailable):
            program.Walker(Host())
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_kernels_own_type_information_is_understood() -> None:
    """All of it, and every field that the source reads."""
    btf = Btf(Path("/sys/kernel/btf/vmlinux").read_bytes())
    for structure, field in loaders.fields_in(loaders.read_resource(loaders.SOURCE).decode()):
        if (structure, field) not in loaders._OPTIONAL:
            assert 0 <= btf.offset(structure, field) < 20_000
    assert btf.offset("list_head", "prev") == 8


def test_the_source_compiles_without_a_warning(tmp_path: Path) -> None:
    """Where there is clang; the shipped object needs none."""
    if shutil.which("clang") is None and not any(shutil.which(f"clang-{version}") for version in range(11, 23)):
        pytest.skip("needs clang: apt install clang")
    (tmp_path / loaders.SOURCE).write_bytes(loaders.read_resource(loaders.SOURCE))
    build.compile_object(tmp_path)
    assert build.is_fresh(tmp_path)


def test_the_registry_offers_it_first() -> None:
    choice = create_tracker("auto", Host())
    assert choice.tracker.name == "bpf"
    assert choice.rejected == ()
    choice.tracker.close()
