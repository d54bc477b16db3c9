"""`make bench-saving` in small: a few seconds of a small key-value server, and what is made of the numbers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.saving import senpai
from bench.saving.__main__ import how, insert
from bench.saving.cell import Cell, Times, measure, percentile
from bench.saving.report import grouped, table
from bench.saving.servers import RECORD_BYTES, records
from bench.saving.variants import VARIANTS, biggest_memory, engine_config, has_memory_controller
from memtier_engine.config.files import parse
from support.swap import calm_down

MIB = 1 << 20


def cell(workload: str = "kv", variant: str = "none", **values: float) -> Cell:
    """Of 100 MiB and an answer in 1 ms, nothing out."""
    facts: dict[str, float] = {
        "footprint_bytes": 100 * MIB, "out_bytes": 0, "zram_bytes": 0, "p50_s": 0.001, "p99_s": 0.002, "answers": 9,
        "refaults_per_min": 0.0, "variant_cpu_percent": 0.0, "load_cpu_percent": 5.0, **values,
    }  # fmt: skip
    return Cell(workload=workload, variant=variant, cache_bytes=None, course=[(1.0, 0.0), (2.0, 1.0)], **facts)  # type: ignore[arg-type]


def test_savings_are_net_of_what_the_compressed_pages_take_and_rows_are_medians_of_the_rounds() -> None:
    rounds = [
        cell(variant="age", out_bytes=out * MIB, zram_bytes=20 * MIB, p99_s=p99_s)
        for out, p99_s in ((50, 0.004), (60, 0.005), (90, 0.9))
    ]
    text = table(grouped([*rounds, cell(p99_s=0.0025)])).splitlines()
    assert len(text) == 4
    row = [column.strip() for column in text[3].split("|")[1:-1]]
    assert row[:8] == ["key-value server", VARIANTS["age"].title, "60", "40", "40 %", "1", "5", "2.00"]
    assert [line.count("|") for line in text] == [12] * 4


def test_results_say_how_many_rounds_there_were_and_how_long_they_took() -> None:
    times = Times(60.0, 45.0)
    assert how(grouped([cell()]), times) == "one round; windows of 45 s, after 60 s"
    assert how(grouped([cell(), cell()]), times).startswith("median of 2 rounds; ")
    assert how(grouped([cell(), cell(), cell("web")]), times).startswith("1 to 2 rounds; ")


def test_damon_watches_the_largest_piece_of_memory_whole() -> None:
    iomem = (
        "00000000-00000fff : Reserved\n00001000-0009fbff : System RAM\n00100000-7ffd3fff : System RAM\n"
        "  01000000-019fffff : Kernel code\n100000000-13fffffff : System RAM\n"
    )
    assert biggest_memory(iomem) == (0x100000, 0x7FFD4000)


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(number) for number in range(100)]
    assert percentile(values, 50) == 50
    assert percentile(values, 99) == 99
    assert percentile([3.0], 99) == 3.0
    with pytest.raises(ValueError, match="no answers"):
        percentile([], 50)


def test_the_senpai_loop_asks_for_less_the_nearer_the_stall_is_to_its_limit() -> None:
    assert senpai.wanted_bytes(1000 * MIB, 0, 0.6) == int(1000 * MIB * senpai.RECLAIM_SHARE)
    assert senpai.wanted_bytes(1000 * MIB, 300, 0.6) == int(1000 * MIB * senpai.RECLAIM_SHARE / 2)
    assert senpai.wanted_bytes(1000 * MIB, 600, 0.6) == 0
    assert senpai.wanted_bytes(1000 * MIB, 600_000, 0.6) == 0


def test_records_compress_as_text_does() -> None:
    import zlib

    found = records(1, RECORD_BYTES)
    assert {len(each) for each in found} == {RECORD_BYTES}
    assert len(set(found)) == len(found)
    whole = b"".join(found)
    assert 2 < len(whole) / len(zlib.compress(whole, 1)) < 5


@pytest.mark.parametrize(("policy", "own"), [("age", "swapoutms: 10000\n"), ("auto", "goal: 'save: 30%'\n"),
                                             ("reclaim", "goal: 'psi: 0.1%'\n")])  # fmt: skip
def test_the_files_for_memtierd_are_valid(policy: str, own: str) -> None:
    spec = parse(engine_config(policy, own, "/sys/fs/cgroup/x"))
    assert spec.target.cgroups == ("/sys/fs/cgroup/x",)
    assert spec.guards.memory_psi_node is None
    assert spec.swaps


def test_results_go_between_the_marks_of_the_page_and_nowhere_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- host begins -->\nold\n<!-- host ends -->\nafter\n")
    insert(page, "host", "new\n")
    assert page.read_text() == "before\n<!-- host begins -->\n\nnew\n\n<!-- host ends -->\nafter\n"
    with pytest.raises(ValueError, match="no marks"):
        insert(page, "vm", "x")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for swap and a cgroup: run the tests as root")
def test_a_small_key_value_server_is_measured_with_an_engine() -> None:
    """24 MiB, idle after 10 s at the soonest: memory goes out, its price is seen, and nothing stays behind."""
    calm_down()
    for settle_s in (13.0, 40.0, 90.0):  # in which everything starts and is then idle: a busy machine needs longer
        try:
            found = measure("kv", "age", Times(settle_s, 2.0), scale=24 / 256)
        except OSError as error:
            pytest.skip(f"needs zram (CONFIG_ZRAM) and a mounted cgroup v2 tree, as root: {error}")
        if found.out_bytes > 10 * MIB and found.answers > 20:
            break
    assert found.footprint_bytes > 24 * MIB
    assert found.out_bytes > 10 * MIB
    assert 0 < found.saved_bytes < found.out_bytes
    assert found.answers > 20
    assert 0 < found.p50_s <= found.p99_s
    assert 0 < found.variant_cpu_percent < 100
    assert found.course[0][1] == 0
    assert found.course[-1][1] > 10


def test_ways_that_do_not_work_here_say_why() -> None:
    if has_memory_controller():
        assert VARIANTS["senpai"].why_not() is None
    else:
        assert "memory.reclaim" in (VARIANTS["senpai"].why_not() or "")
    for variant in VARIANTS.values():
        why = variant.why_not()
        assert why is None or len(why) > 20


def test_the_command_names_its_ways_and_refuses_others() -> None:
    command = [sys.executable, "-m", "bench.saving", "--variants", "magic"]
    tests = str(Path(__file__).parents[1])
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": tests}, check=False
    )
    assert result.returncode == 2
    assert re.search(r"invalid choice: 'magic'.*none.*age.*auto.*reclaim.*senpai.*damon", result.stderr, re.S)
