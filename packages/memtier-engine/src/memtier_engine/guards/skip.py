"""Which processes to leave alone, and why: facts about a process in, a reason or None out. No IO."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from memtier_engine.errors import ConfigError
from memtier_engine.guards.base import MIB

REALTIME_POLICIES = {1: "SCHED_FIFO", 2: "SCHED_RR", 6: "SCHED_DEADLINE"}
"""Source: include/uapi/linux/sched.h."""


@dataclass(frozen=True, slots=True)
class ProcessFacts:
    """What the rules want to know of a process; None: could not be read, and then nothing follows from it."""

    name: str
    """As in /proc/PID/comm: at most 15 bytes, chosen by the process itself."""
    rss_bytes: int | None = None
    tracer_pid: int | None = None
    core_dumping: bool = False
    realtime_policy: int | None = None
    """Scheduling policy of a real-time thread of it; None: it has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipRules:
    """Each rule by itself is enough to leave a process alone."""

    rss_least_bytes: int = 4 * MIB
    """Leave every process this much memory: what a sleeping program needs to wake up with."""
    names: tuple[str, ...] = ()
    """Patterns (`*`, `?`, `[a-z]`) on the name in /proc/PID/comm."""
    realtime: bool = True
    """Processes with a real-time thread: a fault from swap would miss its deadline."""
    traced: bool = True
    """Processes under a debugger or in a core dump: reading their memory would bring all of it back."""

    def __post_init__(self) -> None:
        if self.rss_least_bytes < 0:
            raise ConfigError(
                f"value {self.rss_least_bytes}", key_path="guards.skip.rss_least_bytes", hint="use a size of 0 or more"
            )

    def why(self, facts: ProcessFacts) -> str | None:
        """Why nothing is taken from the process; None: no rule applies."""
        if facts.rss_bytes is not None and facts.rss_bytes < self.rss_least_bytes:
            return f"has {facts.rss_bytes / MIB:.3g} MiB in RAM, less than {self.rss_least_bytes / MIB:.3g} MiB"
        for pattern in self.names:
            if fnmatchcase(facts.name, pattern):
                return f"is named like {pattern!r}"
        if self.realtime and facts.realtime_policy is not None:
            kind = REALTIME_POLICIES.get(facts.realtime_policy, f"policy {facts.realtime_policy}")
            return f"has a real-time thread ({kind})"
        if self.traced and facts.tracer_pid:
            return f"is traced by pid {facts.tracer_pid}"
        if self.traced and facts.core_dumping:
            return "is writing a core dump"
        return None
