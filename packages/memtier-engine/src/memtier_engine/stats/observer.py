"""What an engine tells those who want to know: scans, chunks, moves and events, as they happen."""

from __future__ import annotations

from memtier_engine.model import MoveOutcome, PageChunk, ProcessId, Spans


class Observer:
    """Does nothing; inherit it and write the methods you need. All are called from the engine's thread."""

    @property
    def every_scan(self) -> bool:
        """True: wants to see processes scanned that did not run since the last scan; else these may be left out."""
        return False

    def scan_began(self, process: ProcessId, spans: Spans, now_s: float) -> None:
        """A scan of `process` begins; `now_s` is the engine's time of the round."""

    def chunk(self, process: ProcessId, chunk: PageChunk) -> None:
        """A chunk of the scan that began last. Its arrays must not be kept: copy what you need."""

    def scan_ended(self, process: ProcessId, seconds: float) -> None:
        """The scan that began last went through."""

    def appeared(self, process: ProcessId) -> None:
        """The target means `process` from now on; if it is very young it is scanned later."""

    def forgotten(self, process: ProcessId) -> None:
        """The engine does not follow `process` any more."""

    def moved(self, outcome: MoveOutcome) -> None:
        """The mover did a call."""

    def swapped_in(self, process: ProcessId, count: int, waits: int, wait_s: float) -> None:
        """`process` faulted on `count` pages in swap since it was told last, of which `waits` took `wait_s` in all."""

    def event(self, name: str) -> None:
        """Something happened, by the reference's name for it."""


_EVENT_NAMES = {"idlepage": "IdlePage", "softdirty": "SoftDirty"}


def event_prefix(kind: str, name: str) -> str:
    """The reference's spelling in event names: "Policy" and "avoid-oom" are `PolicyAvoidOom`."""
    return kind + _EVENT_NAMES.get(name, "".join(word.capitalize() for word in name.split("-")))
