"""What commands print, to the byte. Vectors: what the reference printed."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from memtier_cli.accessed import parse_times
from memtier_cli.memtierd.prompt import configs
from memtier_cli.memtierd.prompt.moving import task_text
from memtier_cli.memtierd.prompt.output import Output
from memtier_cli.memtierd.prompt.pages import _pagemap_line
from memtier_cli.memtierd.prompt.policy_dumps import heatgram_text, heatmap_text
from memtier_cli.memtierd.prompt.session import run_line
from memtier_cli.memtierd.prompt.state import Prompt
from memtier_cli.memtierd.prompt.swapping import status_text
from memtier_cli.memtierd.prompt.tracking import counter_lines, counter_text, heat_lines, regions_text
from memtier_engine.errors import ConfigError
from memtier_engine.hostfs.host import Host
from memtier_engine.model import PAGE_BYTES, SWAP_NODE, MoveOutcome, MoveTask, ProcessId, Spans
from memtier_engine.pages.regions import Counters
from memtier_engine.policies.heatmap import Heatmap, HeatmapConfig
from memtier_engine.units import parse_size

PROCESS = ProcessId(123, 1)
NS = 1_000_000_000


@pytest.fixture
def prompt(tmp_path: Path) -> Iterator[Prompt]:
    made = Prompt(Output(io.StringIO()), Host(tmp_path))
    yield made
    made.close()


def output(prompt: Prompt, line: str) -> str:
    stream = prompt.output._stream
    assert isinstance(stream, io.StringIO)
    stream.seek(0)
    stream.truncate()
    run_line(prompt, line)
    return stream.getvalue()


def pages(first: int, last: int) -> Spans:
    """Pages [first, last)."""
    return Spans(np.array([first * PAGE_BYTES], np.uint64), np.array([last * PAGE_BYTES], np.uint64))


def counters(*rows: tuple[int, int, int, int]) -> Counters:
    """Rows (first page, last page, accesses, writes)."""
    table = np.array(rows, np.int64).reshape(-1, 4)
    starts, ends = (table[:, column].astype(np.uint64) * np.uint64(PAGE_BYTES) for column in (0, 1))
    return Counters(starts, ends, table[:, 2].copy(), table[:, 3].copy())


def test_a_counter_record() -> None:
    assert counter_text(123, 0x7EFB00000000, 0x7EFB00200000, 0, 0) == (
        "a=0 r=0 w=0 AddrRanges{pid=123 ranges=7efb00000000-7efb00200000 (2097152 B)}"
    )


def test_counters_are_sorted_by_accesses_then_writes() -> None:
    lines = counter_lines(
        {PROCESS: counters((0, 1, 5, 0), (1, 2, 0, 3)), ProcessId(7, 1): counters((9, 10, 0, 1), (3, 4, 5, 0))}
    )
    assert [line.split(" Addr")[0] for line in lines] == ["a=0 r=0 w=1", "a=0 r=0 w=3", "a=5 r=0 w=0", "a=5 r=0 w=0"]
    assert "pid=7 ranges=3000-4000 (4096 B)" in lines[2]
    assert counter_lines({}) == []


def test_heat_joins_neighbours_with_the_same_number() -> None:
    assert heat_lines(counters((0, 1, 2, 1), (1, 3, 3, 0), (3, 4, 1, 0), (5, 6, 1, 0))) == [
        "0-3000 (12288 B) 3",
        "3000-4000 (4096 B) 1",
        "5000-6000 (4096 B) 1",
    ]


def test_a_finders_regions_look_like_a_map_of_go() -> None:
    assert regions_text({PROCESS: pages(1, 2)}) == "map[123:AddrRanges{pid=123 ranges=1000-2000 (4096 B)}]\n"
    assert regions_text({}) == "map[]\n"


def test_swap_status() -> None:
    assert status_text(12162, 0, 27646) == "12162 0 / 27646 pages, 0 / 107 MB (0.0 %) swapped out"
    assert status_text(1, 0, 0) == "1 0 / 0 pages, 0 / 0 MB (NaN %) swapped out"


def test_a_movers_task() -> None:
    whole = pages(16, 116)
    assert task_text(MoveTask(PROCESS, whole, 3), pages(26, 116)) == (
        "MoverTask{pid: 123, next: 1a000, page: 10 out of 100, dest: [node3]}"
    )
    assert task_text(MoveTask(PROCESS, whole, SWAP_NODE), Spans.empty()) == (
        "MoverTask{pid: 123, next: N/A, page: 100 out of 100, dest: [swap]}"
    )


def test_pagemap_bits_stand_in_the_order_of_the_header() -> None:
    assert _pagemap_line(0x7F0000001000, 1 << 63 | 1 << 56 | 0xABC) == "7f0000001000: bits: 010001 pfn: 2748"
    assert _pagemap_line(0x1000, 1 << 62 | 1 << 55) == "1000: bits: 100010 pfn: 0"
    assert _pagemap_line(0, 1 << 61 | 1 << 57) == "0: bits: 001100 pfn: 0"


def test_the_heatmap_and_its_classes() -> None:
    """Two updates a second apart: 10 accesses on 20 pages, then 5; heat 0.5 falls to a quarter and gains 0.25."""
    heatmap = Heatmap(HeatmapConfig(heat_max=2.0, heat_retention=0.25, heat_classes=8))
    heatmap.update(PROCESS, counters((40, 60, 10, 0)), 10 * NS)
    heatmap.update(PROCESS, counters((40, 60, 5, 0)), 11 * NS)
    assert heatmap_text(heatmap) == (
        "heatmap:\npid: 123: 0 {28000-3c000(20),0.375000,10000000000,1.000000s} (class 1)\n"
    )
    assert heatgram_text(heatmap, 2) == (
        "\ntable: maximum heat in heatmaps\n     pid  maxHeat\n     123   0.3750\n"
        "\ntable: memory in heat classes\n     pid class pidmem[%] totmem[%]    mem[G]\n"
        "     123     0    100.00    100.00     0.000\n     123     1      0.00      0.00     0.000\n"
    )


@pytest.mark.parametrize(
    ("kind", "name", "text", "shown"),
    [
        ("pidwatcher", "cgroups", '{"intervalms": 5000, "CGROUPS": ["/x"]}', '{"IntervalMs":5000,"Cgroups":["/x"]}'),
        ("pidwatcher", "pidlist", "pids: [1, 0x10]", '{"Pids":[1,16]}'),
        (
            "tracker",
            "idlepage",
            "scanintervalms: 100",
            '{"PagesInRegion":512,"MaxCountPerRegion":1,"ScanIntervalMs":100,"RegionsUpdateMs":10000,'
            '"PagemapReadahead":0,"KpageflagsReadahead":0,"BitmapReadahead":0}',
        ),
        (
            "tracker",
            "finder",
            "reportaccesses: 42\npagemapbitpresent: false",
            '{"RegionsUpdateMs":0,"ReportAccesses":42,"PagemapBitExclusive":null,"PagemapBitPresent":false,'
            '"PagemapBitSoftDirty":null}',
        ),
        (
            "policy",
            "age",
            "pidwatcher: {name: pidlist, config: 'pids: [1]'}\n"
            "tracker: {name: softdirty, config: '{\"ScanIntervalMs\":9}'}\nidlenumas: [2, 3]\nintervalms: 7",
            '{"PidWatcher":{"Name":"pidlist","Config":"pids: [1]"},"Tracker":{"Name":"softdirty","Config":'
            '"{\\"PagesInRegion\\":512,\\"MaxCountPerRegion\\":1,\\"ScanIntervalMs\\":9,\\"RegionsUpdateMs\\":10000,'
            '\\"SkipPageProb\\":0,\\"PagemapReadahead\\":0,\\"TrackReferenced\\":false}"},'
            '"Mover":{"IntervalMs":10,"Bandwidth":100},"Cgroups":null,"Pids":null,"IntervalMs":7,"SwapOutMs":0,'
            '"IdleDurationMs":0,"IdleNumas":[2,3],"ActiveDurationMs":0,"ActiveNumas":null}',
        ),
        (
            "policy",
            "heat",
            "pidwatcher: {name: proc}\ntracker: {name: refs, config: 'scanintervalms: 5'}\n"
            "heatnumas: {0: [2], 0x3: [0, 1]}\nnumasize: {2: 1G}\nheatmap: {heatmax: 0.01}",
            '{"PidWatcher":{"Name":"proc","Config":""},"Tracker":{"Name":"refs","Config":"{\\"scanintervalms\\":5}"},'
            '"Heatmap":{"HeatMax":0.01,"HeatRetention":0.9513,"HeatClasses":10},"Forecaster":null,'
            '"Mover":{"IntervalMs":10,"Bandwidth":100},"Cgroups":null,"Pids":null,"IntervalMs":10000,'
            '"HeatNumas":{"0":[2],"3":[0,1]},"NumaSize":{"2":"1G"}}',
        ),
        (
            "routine",
            "statactions",
            'intervalms: 5\nintervalcommand: [a, "<b>"]',
            '{"IntervalMs":5,"IntervalCommand":["a","\\u003cb\\u003e"],"IntervalCommandRunner":"","PageOutMB":0,'
            '"PageOutCommand":null,"PageOutCommandRunner":"","Timestamp":"","TimestampAfter":""}',
        ),
        (
            "tracker",
            "idlepage",
            None,
            '{"PagesInRegion":512,"MaxCountPerRegion":1,"ScanIntervalMs":5000,"RegionsUpdateMs":10000,'
            '"PagemapReadahead":0,"KpageflagsReadahead":0,"BitmapReadahead":0}',
        ),
        (
            "tracker",
            "softdirty",
            None,
            '{"PagesInRegion":512,"MaxCountPerRegion":1,"ScanIntervalMs":5000,"RegionsUpdateMs":10000,'
            '"SkipPageProb":0,"PagemapReadahead":0,"TrackReferenced":false}',
        ),
        ("tracker", "damon", None, ""),
        ("tracker", "multi", None, ""),
        ("pidwatcher", "proc", None, '{"IntervalMs":5000}'),
        ("pidwatcher", "cgroups", None, ""),
        ("pidwatcher", "pidlist", "pids: []", '{"Pids":[]}'),
        (
            "pidwatcher",
            "filter",
            '{"Source":{"Name":"proc","Config":"{}"},"Filters":[{"MinVmSizeKb":-5,"Not":{"MinVmRSSKb":100}}]}',
            '{"Source":{"Name":"proc","Config":"{}"},"Filters":[{"ProcExeRegexp":"","MinVmSizeKb":-5,"MinVmRSSKb":0,'
            '"MinPrivateDirtyKb":0,"And":null,"Or":null,"Not":{"ProcExeRegexp":"","MinVmSizeKb":0,"MinVmRSSKb":100,'
            '"MinPrivateDirtyKb":0,"And":null,"Or":null,"Not":null}}]}',
        ),
        (
            "policy",
            "avoid-oom",
            "cgroups: [/x]\nstartfreeingmemory: ''",
            '{"StartFreeingMemory":"8%","StopFreeingMemory":"16%","Cgroups":["/x"],"IntervalMs":5000,'
            '"Mover":{"IntervalMs":10,"Bandwidth":100}}',
        ),
        (
            "policy",
            "ratio",
            "pidwatcher: {name: proc}\nratio: 1.0\nratiotargets: []\npids: []",
            '{"PidWatcher":{"Name":"proc","Config":""},"Tracker":{"Name":"idlepage","Config":"{\\"PagesInRegion\\":512,'
            '\\"MaxCountPerRegion\\":1,\\"ScanIntervalMs\\":5000,\\"RegionsUpdateMs\\":10000,\\"PagemapReadahead\\":0,'
            '\\"KpageflagsReadahead\\":0,\\"BitmapReadahead\\":0}"},'
            '"Mover":{"IntervalMs":10,"Bandwidth":100},"IntervalMs":5000,"Ratio":1,"RatioTargets":[-1],'
            '"Cgroups":null,"Pids":[]}',
        ),
        ("tracker", "stub", "anything", ""),
    ],
)
def test_a_configuration_is_shown_as_one_line_with_the_references_names(
    kind: str, name: str, text: str | None, shown: str
) -> None:
    assert configs.dump(kind, name, text) == shown


def test_stopwatches(prompt: Prompt) -> None:
    assert output(prompt, "time -elapsed a -stop b") == ('stopwatch "a" not started\nstopwatch "b" not started\n')
    started = output(prompt, "time -start a,b")
    assert [line.rsplit(" ", 1)[0] for line in started.splitlines()] == [
        'stopwatch "a" started',
        'stopwatch "b" started',
    ]
    shown = output(prompt, "time -stop b -elapsed a -sleep 0")
    first, second = shown.splitlines()
    assert 0 <= float(first) < 60
    assert len(first.partition(".")[2]) == 6
    assert second.startswith('stopwatch "b" stopped at 0.')
    assert output(prompt, "time -elapsed b") == 'stopwatch "b" not started\n'


def test_single_moves(prompt: Prompt) -> None:
    outcome = MoveOutcome(PROCESS, pages(16, 20), 3, 4 * PAGE_BYTES, 2 * PAGE_BYTES, 0.1, page_errors={16: 1})
    text = (
        "move_pages(pid=123, pagecount=4, firstpage=10000 dest=3) => "
        "(return=0 on_dest=2 on_other=1 [errno:pagecount]=map[16:1])\n"
    )
    assert output(prompt, "stats -lm 123") == "<nil>\n"
    assert output(prompt, "stats -dump moves new") == "error: not recording\n"
    assert output(prompt, "stats -dump moves start") == "recording moves started\n"
    prompt.statistics.moved(outcome)
    assert output(prompt, "stats -lm 123") == output(prompt, "stats -le 123") == text
    assert output(prompt, "stats -dump moves new") == text
    assert output(prompt, "stats -dump moves new") == ""
    assert output(prompt, "stats -dump moves stop") == "recording moves stopped\n"
    assert output(prompt, "stats -dump moves x") == 'invalid dump moves parameter: "x"\n'
    assert output(prompt, "stats -dump") == "Usage: dump moves <start|new|stop>\n"


def test_a_process_without_page_errors_has_an_empty_latest_call_with_errors(prompt: Prompt) -> None:
    prompt.statistics.moved(MoveOutcome(PROCESS, pages(1, 2), 0, PAGE_BYTES, PAGE_BYTES, 0.1))
    assert output(prompt, "stats -le 123") == (
        "move_pages(pid=0, pagecount=0, firstpage=0 dest=0) => "
        "(return=0 on_dest=0 on_other=0 [errno:pagecount]=map[])\n"
    )


def test_unknown_tables_and_formats(prompt: Prompt) -> None:
    assert output(prompt, "stats -t help").startswith(
        'unknown table "help", available: "events", "process_madvise", "move_pages", "move_pages_errors", '
        '"memory_scans"'
    )
    assert output(prompt, "stats -f xml") == 'unknown format "xml", txt and csv expected\n'
    assert output(prompt, "stats -t events -f csv") == "table: events\ncount,timeint[s],latest[s ago],name\n"


def test_a_policy_that_was_never_started_has_empty_tables(prompt: Prompt) -> None:
    config = "{intervalms: 1000, pidwatcher: {name: proc}, tracker: {name: refs}, heatnumas: {0: [0]}}"
    assert output(prompt, f"policy -create heat -config '{config}'") == "policy created\n"
    assert output(prompt, "policy -dump heatmap") == "heatmap:\n\n"
    assert output(prompt, "policy -dump heatgram") == (
        "\ntable: maximum heat in heatmaps\n     pid  maxHeat\n\ntable: memory in heat classes\n\n"
    )
    assert output(prompt, "policy -dump numa") == "node      pid pageData numaUsed numaSize\n\n"
    output(prompt, "policy -create avoid-oom -config '{intervalms: 1000, cgroups: [/x]}'")
    assert output(prompt, "policy -dump balance") == output(prompt, "policy -dump cands") == "\n\n"


def test_the_tracker_and_the_watcher_of_a_policy_show_their_configuration(prompt: Prompt) -> None:
    config = (
        "{intervalms: 1000, pidwatcher: {name: proc, config: {intervalms: 77}}, "
        "tracker: {name: idlepage, config: {scanintervalms: 99}}}"
    )
    assert output(prompt, f"policy -create age -config '{config}'") == "policy created\n"
    assert output(prompt, "pidwatcher -config-dump") == '{"IntervalMs":77}\n'
    assert '"ScanIntervalMs":99,' in output(prompt, "tracker -config-dump")
    output(prompt, "policy -create ratio -config '{ratio: 0.5, pidwatcher: {name: proc}}'")
    assert '"ScanIntervalMs":5000,' in output(prompt, "tracker -config-dump")  # the default of ratio, idlepage
    assert output(prompt, "pidwatcher -config-dump") == '{"IntervalMs":5000}\n'


def test_the_mover_has_the_pace_of_the_policy_until_it_gets_another(prompt: Prompt) -> None:
    parts = "intervalms: 1000, pidwatcher: {name: proc}, tracker: {name: refs}"
    output(prompt, f"policy -create age -config '{{{parts}, mover: {{intervalms: 20, bandwidth: 50}}}}'")
    assert output(prompt, "mover -config-dump") == '{"IntervalMs":20,"Bandwidth":50}\n'
    output(prompt, "mover -config 'bandwidth: 5'")
    output(prompt, "policy -dump")
    assert output(prompt, "mover -config-dump") == '{"IntervalMs":10,"Bandwidth":5}\n'
    output(prompt, f"policy -config '{{{parts}, mover: {{bandwidth: 7}}}}'")
    assert output(prompt, "mover -config-dump") == '{"IntervalMs":10,"Bandwidth":7}\n'


def test_the_first_policy_is_there_also_if_its_configuration_is_refused(prompt: Prompt) -> None:
    assert output(prompt, "policy -create age -config 'x: 1'").startswith("policy created\nconfig failed: ")
    config = "{intervalms: 1000, pidwatcher: {name: proc}, tracker: {name: refs}}"
    assert output(prompt, f"policy -config '{config}' -config-dump").startswith('{"PidWatcher":')


def test_idle_bits_and_flags_of_frames(prompt: Prompt, tmp_path: Path) -> None:
    assert output(prompt, "pages -pi 1").startswith("failed to open idle bitmap: ")
    bitmap, flags = tmp_path / "sys/kernel/mm/page_idle/bitmap", tmp_path / "proc/kpageflags"
    bitmap.parent.mkdir(parents=True)
    bitmap.write_bytes(bytes(8))
    assert output(prompt, "pages -pi 3 -si 5") == "PFN 3 idle: false\n"  # both, as told
    assert output(prompt, "pages -pi 5") == "PFN 5 idle: true\n"
    flags.parent.mkdir(exist_ok=True)
    flags.write_bytes(bytes(8) + (1 << 5).to_bytes(8, "little"))
    assert "LRU           1\n" in output(prompt, "pages -pk 1")
    for frame in ("2", str(1 << 54)):
        assert output(prompt, f"pages -pk {frame}").startswith(f"reading flags of PFN {frame} from kpageflags failed: ")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("arange -ls", "no aranges selected, use -pid PID\n"),
        ("pages", "no pages selelected, try pages -pid PID\n"),
        ("pages -pid 0", "missing -pid=PID\n"),
        ("pages foo", "missing -pid=PID\n"),
        ("stats -dump moves start foo", "Usage: dump moves <start|new|stop>\n"),
        ("pages -node 1", "missing -pid=PID\n"),
        ("mover -pages-to 1", "mover error: set pages before moving\n"),
        ("mover -pages-to -1 -tasks", "mover error: -pages-to takes a node; to page out, use swap -out -mover\n"),
        ("mover -config-dump", '{"IntervalMs":10,"Bandwidth":100}\n'),
        ("mover -wait", "mover error: it is not running, use -start\n"),
        ("tracker", "no tracker, create one with -create NAME [-config CONFIG]\n"),
        ("tracker -create x", 'creating tracker failed: invalid tracker name "x"\n'),
        ("pidwatcher", "no pidwatcher, create one with -create NAME [-config CONFIG]\n"),
        ("pidwatcher -create stub", "pidwatcher created\n"),
        (
            "pidwatcher -create pidlist -poll",
            "pidwatcher created\npidwatcher error: pidlist is not configured, use -config\n",
        ),
        ("policy", "no policy, create one with -create NAME\n"),
        ("policy -create x", 'invalid policy name "x"\n'),
        ("policy -create age -start", "policy created\nstart failed: not configured, use -config\n"),
        ("policy -create age -dump accessed 0,1", "policy created\npolicy is not started\n"),
        ("routines", "no routines, create one with -create NAME\n"),
        ("routines -create stub", "routine 0 created, started using it\n"),
        ("routines -create stub -use 3", "routine 0 created, started using it\ninvalid routine 3, the last one is 0\n"),
        ("routines -create stub -stop", "routine 0 created, started using it\nroutine 0 stopped\n"),
        ("swap -out", "missing pids, add -pid=PID, -pids=PID,PID or -pid-cgroups=PATH\n"),
        ("swap -pids 1,x -status", 'invalid pid "x": not a process id\n'),
        ("swap -pid-cgroups /nonexistent* -status", "could not find any matching cgroups\n"),
    ],
)
def test_what_is_missing_is_told_in_the_references_words(prompt: Prompt, line: str, text: str) -> None:
    assert output(prompt, line) == text


def test_components_are_listed_one_per_line_and_hold_all_of_the_reference(prompt: Prompt) -> None:
    assert output(prompt, "pidwatcher -ls") == "cgroups\nfilter\npidlist\nproc\nstub\n"
    assert {"damon", "finder", "idlepage", "multi", "softdirty", "stub"} <= set(output(prompt, "tracker -ls").split())
    assert {"age", "avoid-oom", "demote-idle", "heat", "ratio", "stub"} <= set(output(prompt, "policy -ls").split())
    assert output(prompt, "routines -ls") == "statactions\nstub\n"


def test_a_mover_is_configured_and_wrong_values_are_told(prompt: Prompt) -> None:
    assert output(prompt, "mover -config '{\"Bandwidth\": 5}' -config-dump") == '{"IntervalMs":10,"Bandwidth":5}\n'
    assert output(prompt, "mover -config 'bandwidth: 0'").startswith("mover reconfiguration error: ")
    assert output(prompt, "mover -config-dump") == '{"IntervalMs":10,"Bandwidth":5}\n'


def test_after_a_stub_policy_there_is_still_a_mover(prompt: Prompt) -> None:
    """The reference crashes here."""
    assert output(prompt, "policy -create stub -start") == "policy created\n"
    assert output(prompt, "mover -start -wait -tasks -config-dump") == (
        '{"IntervalMs":10,"Bandwidth":100}\nmover wait received: AllDone\n'
    )
    assert output(prompt, "policy -start") == "start failed: already started\n"
    # It works with no tracker and no watcher.
    assert output(prompt, "tracker -counters") == "no tracker, create one with -create NAME [-config CONFIG]\n"
    assert output(prompt, "pidwatcher -dump") == "no pidwatcher, create one with -create NAME [-config CONFIG]\n"
    assert output(prompt, "tracker -create stub -counters") == "tracker created\ncannot get tracker counters\n"
    assert output(prompt, "policy -stop -start") == "start failed: already started\n"
    assert output(prompt, "policy -stop -dump") == "policy stopped\n\n"


def test_times_of_a_dump_are_read_as_the_reference_reads_them() -> None:
    assert parse_times("1.5m,1 s,3us,-1s,2") == (90.0, 1.0, 3e-6, -1.0, 2.0)
    for text in ("5x,1", "nan,1"):
        with pytest.raises(ConfigError):
            parse_times(text)


def test_sizes_that_the_reference_takes_mean_the_same() -> None:
    assert list(map(parse_size, ("10K", "10KB", "10 MB", " 7M"))) == [10240, 10240, 10485760, 7340032]
