"""Tracker `bpf` without a kernel: words and states, type information, panels and their error, events' files."""

from __future__ import annotations

import platform
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtier_engine.abi import libbpf
from memtier_engine.errors import AccessDenied, KernelCallError, TrackerUnavailable, Unavailable
from memtier_engine.hostfs.host import Host
from memtier_engine.model import CHUNK_PAGES, PAGE_BYTES, Spans
from memtier_engine.trackers.bpf import build, hardware, loaders, paging, program, rights, sampling
from memtier_engine.trackers.bpf.blocks import laid_out
from memtier_engine.trackers.bpf.btf import Btf
from memtier_engine.trackers.common import cut
from memtier_engine.trackers.words import page_numbers

MIB = 1 << 20
U64 = np.uint64


def spans(*pairs: tuple[int, int]) -> Spans:
    starts, ends = zip(*pairs, strict=True)
    return Spans(np.array(starts, U64), np.array(ends, U64))


# ---- page table words


def test_present_and_hidden_pages_are_resident_and_swap_entries_are_not() -> None:
    """PROT_NONE pages are in memory; a swap entry has neither bit."""
    words = np.array([0x8000000301234867, 0x8000000301234960, 0x07FFFFFF12340000 << 1, 0], U64)
    assert paging.resident(words).tolist() == [True, True, False, False]
    assert paging.accessed(words[:2]).tolist() == [True, True]
    assert paging.dirty(words[:2]).tolist() == [True, True]


def test_a_block_becomes_what_its_state_says() -> None:
    """Nothing: zeros; huge: its bits 512 times, with the frame of each part; unstable: in use; a table: as it is."""
    states = np.array([paging.STATE_NOTHING, paging.STATE_TABLE, paging.STATE_HUGE_PMD, paging.STATE_UNSTABLE], U64)
    entries = np.array([0, 0x1067, 0x80000002000000A5, 0x1067], U64)
    words = np.full((4, 512), 0xDEAD, U64)
    paging.fill_blocks(states, entries, words)
    assert not words[0].any()
    assert (words[1] == 0xDEAD).all()
    assert (words[2] == entries[2] + np.arange(512, dtype=U64) * U64(PAGE_BYTES)).all()
    assert paging.frames(words[2], (1 << 40) - PAGE_BYTES).tolist() == list(range(0x200000, 0x200200)[:512])
    assert paging.resident(words[3]).all()
    assert paging.accessed(words[3]).all()


def test_swapped_pages_are_told_from_empty_and_special_entries() -> None:
    """Types from 23 on are pages on their way to another node, and markers."""
    words = np.array([0, 0x0400_0000_0000_0002, (22 << 59) | 2, (23 << 59) | 2, (31 << 59) | 2, 0x1067, 0x1160], U64)
    assert paging.swapped(words).tolist() == [False, True, True, False, False, False, False]


def test_a_huge_page_that_is_being_split_stays_resident() -> None:
    """It is not PRESENT for a moment, but HUGE."""
    words = np.zeros((1, 512), U64)
    paging.fill_blocks(np.array([paging.STATE_HUGE_PMD], U64), np.array([0x80000002000000A4], U64), words)
    assert paging.resident(words[0]).all()


def test_states_and_sizes_are_those_of_the_c_source() -> None:
    """Two files, one set of numbers."""
    source = loaders.read_resource(loaders.SOURCE).decode()
    defined = {name: int(value) for name, value in re.findall(r"^#define (\w+) (\d+)(?:ULL)?\b", source, re.M)}
    for name in ("NOTHING", "TABLE", "HUGE_PMD", "HUGE_PUD", "UNSTABLE", "GONE"):
        assert defined[f"STATE_{name}"] == getattr(paging, f"STATE_{name}")
    assert defined["OTHER_MMU"] == paging.OTHER_MMU
    assert defined["HEAD_ONLY"] == paging.HEAD_ONLY
    assert defined["BLOCKS"] == program.MAX_BLOCKS
    assert defined["CANDIDATES"] == program._CANDIDATES


# ---- blocks and batches


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 100_000)), min_size=1, max_size=12),
)
def test_batches_cover_the_spans_in_order_and_fit_the_map(sizes: list[tuple[int, int]]) -> None:
    """Every page lies where `laid_out` says, whatever the alignment."""
    at, pairs = 0x7F0000000000, []
    for gap, length in sizes:
        at += gap * PAGE_BYTES
        pairs.append((at, at + length * PAGE_BYTES))
        at = pairs[-1][1]
    whole = spans(*pairs)
    covered = []
    for pieces in cut(whole, CHUNK_PAGES, program.MAX_BLOCKS):
        layout = laid_out(pieces)
        assert len(layout.addresses) <= program.MAX_BLOCKS
        assert (np.diff(layout.addresses) > 0).all()  # each once, however many spans lie in it
        numbers = layout.numbers(np.arange(int(pieces.pages.sum())))
        words = (layout.addresses[:, None] // PAGE_BYTES + np.arange(512, dtype=U64)).reshape(-1)
        assert words[layout.places].tolist() == numbers.tolist() == page_numbers(pieces).tolist()
        covered.append(numbers)
    assert np.concatenate(covered).tolist() == page_numbers(whole).tolist()


# ---- BTF


class BtfBuilder:
    """Writes type information as pahole does."""

    def __init__(self) -> None:
        self.strings = b"\0"
        self.types = b""

    def name(self, text: str) -> int:
        at = len(self.strings)
        self.strings += text.encode() + b"\0"
        return at if text else 0

    def add(self, name: str, kind: int, count: int, size: int, tail: bytes = b"", flag: int = 0) -> None:
        self.types += struct.pack("<III", self.name(name), flag << 31 | kind << 24 | count, size) + tail

    def member(self, name: str, kind: int, offset: int) -> bytes:
        return struct.pack("<III", self.name(name), kind, offset)

    def bytes(self) -> bytes:
        header = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(self.types), len(self.types), len(self.strings))
        return header + self.types + self.strings


def built() -> bytes:
    b = BtfBuilder()
    b.add("int", 1, 0, 4, struct.pack("<I", 32))  # 1
    b.add("", 5, 2, 8, b.member("inner", 1, 0) + b.member("other", 1, 0))  # 2: nameless union
    b.add("", 4, 2, 64, b.member("first", 1, 0) + b.member("", 2, 128))  # 3: nameless struct
    b.add("", 10, 0, 3)  # 4: const struct
    b.add("numbers", 19, 1, 8, struct.pack("<III", 0, 1, 0))  # 5: enum64
    b.add("pair", 13, 2, 1, bytes(16))  # 6: prototype
    b.add("mm_struct", 4, 3, 128, b.member("flags", 1, 5) + b.member("", 4, 256) + b.member("pgd", 1, 960), flag=1)
    b.add("pgd", 7, 0, 0)  # forward
    return b.bytes()


def test_offsets_are_found_as_c_finds_them() -> None:
    """Through nameless structures and unions, behind const, beside bit fields."""
    btf = Btf(built())
    assert btf.offset("mm_struct", "pgd") == 120
    assert btf.offset("mm_struct", "first") == 32
    assert btf.offset("mm_struct", "other") == 48


@pytest.mark.parametrize(("structure", "field"), [("mm_struct", "absent"), ("absent", "pgd"), ("pgd", "first")])
def test_what_this_kernel_does_not_have_is_named(structure: str, field: str) -> None:
    with pytest.raises(Unavailable, match=rf"this kernel has no {field} in struct {structure}"):
        Btf(built()).offset(structure, field)


@pytest.mark.parametrize("data", [b"", b"\x9f\xeb", bytes(100), built()[:60]])
def test_broken_type_information_is_refused(data: bytes) -> None:
    with pytest.raises(Unavailable):
        Btf(data)


def test_every_field_that_the_source_reads_is_found_in_it() -> None:
    """bcc needs an OFFSET_ for each; libbpf finds them itself."""
    fields = loaders.fields_in(loaders.read_resource(loaders.SOURCE).decode())
    assert ("mm_struct", "pgd") in fields
    assert ("task_struct", "files") in fields
    assert ("files_struct", "fdt") in fields
    assert ("file", "private_data") in fields
    assert ("mm_struct", "notifier_subscriptions") in fields


# ---- the compiled object


def test_the_object_was_compiled_from_this_source() -> None:
    """Otherwise `make bpf` and commit it."""
    assert build.is_fresh()


def test_a_changed_source_makes_the_object_stale(tmp_path: Path) -> None:
    for name in (loaders.SOURCE, loaders.OBJECT, build.DIGEST):
        (tmp_path / name).write_bytes(loaders.read_resource(name))
    assert build.is_fresh(tmp_path)
    with (tmp_path / loaders.SOURCE).open("a") as file:
        file.write("\n")
    assert not build.is_fresh(tmp_path)


def test_without_libbpf_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libbpf, "SONAMES", ("libbpf.so.none",))
    libbpf._library.cache_clear()
    try:
        with pytest.raises(Unavailable, match=r"libbpf\.so\.none is not installed .*apt install libbpf1"):
            libbpf.available()
    finally:
        libbpf._library.cache_clear()


# ---- reasons


def host_with(tmp_path: Path, *, capabilities: int, lockdown: str | None = None) -> Host:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text(f"Name:\tx\nCapEff:\t{capabilities:016x}\n")
    if lockdown is not None:
        (tmp_path / "sys/kernel/security").mkdir(parents=True)
        (tmp_path / "sys/kernel/security/lockdown").write_text(lockdown)
    return Host(tmp_path)


@pytest.mark.parametrize(
    ("held", "missing"),
    [(0, "CAP_BPF, CAP_PERFMON"), (1 << 39, "CAP_PERFMON"), (1 << 38, "CAP_BPF")],
)
def test_each_missing_capability_is_named(held: int, missing: str, tmp_path: Path) -> None:
    failure = AccessDenied("load the BPF object", 1)
    why = rights.explained(host_with(tmp_path, capabilities=held), failure)
    assert why.message.endswith(f"this process lacks {missing}")


@pytest.mark.parametrize(
    ("held", "missing"),
    [
        (1 << 21 | 1 << 19, "CAP_DAC_OVERRIDE"),
        (1 << 21 | 1 << 1, "CAP_SYS_PTRACE"),
        (1 << 21, "CAP_DAC_OVERRIDE, CAP_SYS_PTRACE"),
    ],
)
def test_each_capability_missing_for_another_users_process_is_named(held: int, missing: str, tmp_path: Path) -> None:
    refusal = AccessDenied("open /proc/5/pagemap: Permission denied [EACCES]", 13)
    named = rights.denied(host_with(tmp_path, capabilities=held), refusal, rights.FOR_OTHERS)
    assert named.message == f"{refusal.message}: this process lacks {missing}"
    assert named.errno == 13


def test_a_refusal_that_no_capability_explains_stays_as_it_is(tmp_path: Path) -> None:
    """A security module may refuse even root."""
    refusal = AccessDenied("open /proc/5/pagemap: Permission denied [EACCES]", 13)
    assert rights.denied(host_with(tmp_path, capabilities=(1 << 41) - 1), refusal, rights.FOR_OTHERS) is refusal


def test_with_all_capabilities_a_refusal_points_to_seccomp(tmp_path: Path) -> None:
    why = rights.explained(host_with(tmp_path, capabilities=1 << 21), AccessDenied("load the BPF object", 1))
    assert "lacks" not in why.message
    assert why.hint is not None
    assert "seccomp" in why.hint


def test_a_locked_down_kernel_is_the_reason_when_it_is(tmp_path: Path) -> None:
    """There the verifier knows no bpf_probe_read_kernel: EINVAL."""
    failure = KernelCallError("load the BPF object: unknown func", 22)
    host = host_with(tmp_path, capabilities=1 << 21, lockdown="none integrity [confidentiality]\n")
    assert "locked down (confidentiality)" in rights.explained(host, failure).message
    other = host_with(tmp_path / "other", capabilities=1 << 21, lockdown="none [integrity] confidentiality\n")
    assert rights.explained(other, failure).message == failure.message


@pytest.mark.parametrize(
    ("cpuinfo", "shift"),
    [("fpu pse lm", paging.TOP_SHIFT_4_LEVELS), ("fpu la57 lm", paging.TOP_SHIFT_5_LEVELS)],
)
def test_paging_levels_and_address_bits_come_from_cpuinfo(cpuinfo: str, shift: int, tmp_path: Path) -> None:
    """With memory encryption the kernel prints fewer physical bits: the mask then leaves the encryption bit out."""
    if platform.machine() != "x86_64":
        pytest.skip("x86_64 only: run it there")
    (tmp_path / "proc").mkdir()
    text = f"processor\t: 0\nflags\t\t: {cpuinfo}\naddress sizes\t: 43 bits physical, 48 bits virtual\n"
    (tmp_path / "proc/cpuinfo").write_text(text)
    assert program._paging_of(Host(tmp_path)) == ((1 << 43) - 4096, shift)


# ---- sampling


def test_a_panel_is_a_random_share_that_another_seed_changes() -> None:
    blocks = np.arange(100_000, dtype=U64) * U64(paging.BLOCK_BYTES)
    first, again = sampling.in_panel(blocks, 7, 0.05), sampling.in_panel(blocks, 7, 0.05)
    other = sampling.in_panel(blocks, 8, 0.05)
    assert (first == again).all()
    assert 4700 < first.sum() < 5300
    assert 4700 < other.sum() < 5300
    assert (first & other).sum() < 400  # 250 by chance
    assert sampling.in_panel(blocks, 7, 1.0).all()


def test_two_standard_errors_hold_the_truth_in_95_of_100_panels() -> None:
    """The stated error is the real one, on a working set in clumps."""
    rng = np.random.default_rng(3)
    blocks = np.arange(8000, dtype=U64) * U64(paging.BLOCK_BYTES)
    pages = np.where(rng.random(8000) < 0.3, rng.integers(0, 513, 8000), 0).astype(U64)
    truth = float(pages.sum()) * PAGE_BYTES
    hits = 0
    for seed in range(400):
        chosen = sampling.in_panel(blocks, seed * 7919, 0.05)
        found = sampling.extrapolate(pages[chosen], len(blocks))
        assert found is not None
        hits += abs(found.accessed_bytes - truth) <= 2 * found.standard_error_bytes
    assert 0.92 <= hits / 400 <= 0.99


def test_a_panel_of_everything_has_no_error_and_one_of_one_block_no_estimate() -> None:
    found = sampling.extrapolate(np.array([1, 2, 3], U64), 3)
    assert found == sampling.WorkingSet(6 * PAGE_BYTES, 0.0, 3, 3)
    assert sampling.extrapolate(np.array([1], U64), 3) is None


# ---- hardware events


def pmu(tmp_path: Path, name: str, files: dict[str, str]) -> Host:
    for path, text in files.items():
        file = tmp_path / "sys/bus/event_source/devices" / name / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return Host(tmp_path)


def test_pebs_events_are_read_from_the_pmus_own_files(tmp_path: Path) -> None:
    """As `perf list` shows them: event and umask into config, the latency limit into config1."""
    host = pmu(
        tmp_path,
        "cpu",
        {
            "type": "4",
            "events/mem-loads": "event=0xcd,umask=0x1,ldlat=30",
            "events/mem-stores": "event=0xd0,umask=0x82",
            "format/event": "config:0-7",
            "format/umask": "config:8-15,40-47",
            "format/ldlat": "config1:0-15",
        },
    )
    loads, stores = hardware.memory_events(host)
    assert (loads.kind, loads.config, loads.config1, loads.precise) == (4, 0x01CD, 3, 2)
    assert (stores.kind, stores.config, stores.config1) == (4, 0x82D0, 0)


def test_ibs_is_taken_where_there_is_no_pebs(tmp_path: Path) -> None:
    (event,) = hardware.memory_events(pmu(tmp_path, "ibs_op", {"type": "9"}))
    assert (event.name, event.kind) == ("ibs_op", 9)


def test_a_cpu_without_memory_sampling_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(TrackerUnavailable, match=r"neither PEBS .* nor IBS .*bare metal"):
        hardware.memory_events(pmu(tmp_path, "software", {"type": "1"}))
