"""The demo's judgement, from what the kernel says of the workload and not from the engine's own word."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from memtier_cli.memtier.demo_scene.scene import Memory

COLD_OUT_LEAST = 0.95
HOT_OUT_MOST = 0.02


@dataclass(frozen=True, slots=True)
class Verdict:
    """How well the engine told hot from cold."""

    tracker: str
    cold_out_share: float
    hot_wrongly_out_share: float
    """Hot memory that is out at the end or came back from swap during the run."""
    saved_bytes: int
    engine_cpu_s: float
    duration_s: float

    @property
    def passed(self) -> bool:
        """Enough cold memory out, hardly any hot memory."""
        return self.cold_out_share >= COLD_OUT_LEAST and self.hot_wrongly_out_share <= HOT_OUT_MOST

    def as_dict(self) -> dict[str, object]:
        """For `--json`."""
        return {**asdict(self), "passed": self.passed}


def judge(memory: Memory, *, tracker: str, engine_cpu_s: float, duration_s: float) -> Verdict:
    """The verdict on the memory as it is at the end."""
    return Verdict(
        tracker=tracker,
        cold_out_share=memory.cold_out_bytes / memory.cold_bytes,
        hot_wrongly_out_share=min(1.0, (memory.hot_out_bytes + memory.refault_bytes) / memory.hot_bytes),
        saved_bytes=memory.cold_out_bytes + memory.hot_out_bytes,
        engine_cpu_s=engine_cpu_s,
        duration_s=duration_s,
    )
