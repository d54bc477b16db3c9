"""What stayed, told once by process and reason."""

from __future__ import annotations

from memtier_engine.model import PAGE_BYTES, SWAP_NODE, Kept, MoveOutcome, ProcessId, Spans, Why
from memtier_engine.mover.kept import AGAIN_S, IN_WORDS, KeptBytes
from support.fakes import PROCESS, spans

MIB_PAGES = (1 << 20) // PAGE_BYTES


def outcome(*kept: Kept, process: ProcessId = PROCESS) -> MoveOutcome:
    return MoveOutcome(process, Spans.empty(), SWAP_NODE, 0, 0, 0.0, kept=kept)


def test_bytes_add_up_by_process_and_reason_and_begin_anew_with_each_decision() -> None:
    kept = KeptBytes()
    kept.add(outcome(Kept(Why.LOCKED, spans((0, 3))), Kept(Why.ABSENT, spans((5, 6)))))
    kept.add(outcome(Kept(Why.LOCKED, spans((3, 5)))))
    assert kept.bytes() == {(PROCESS.pid, Why.LOCKED): 5 * PAGE_BYTES}
    kept.begin()
    assert kept.bytes() == {}


def test_one_line_says_whose_how_much_and_why_and_says_it_once() -> None:
    kept = KeptBytes()
    said: list[str] = []
    for second in range(int(AGAIN_S)):
        kept.begin()
        kept.add(outcome(Kept(Why.LOCKED, spans((0, 256 * MIB_PAGES))), Kept(Why.SHARED, spans((0, 5)))))
        said += kept.lines(float(second))
    assert said == [f"pid {PROCESS.pid}: 256 MiB stay in RAM: {IN_WORDS[Why.LOCKED]}"]
    assert list(kept.lines(AGAIN_S)) == said
    kept.add(outcome(Kept(Why.LOCKED, spans((0, 300 * MIB_PAGES)))))
    assert len(list(kept.lines(AGAIN_S + 1))) == 1, "it has doubled"
    kept.forget(PROCESS)
    assert kept.bytes() == {}


def test_every_reason_but_absence_has_its_words() -> None:
    assert set(IN_WORDS) == set(Why) - {Why.ABSENT}
