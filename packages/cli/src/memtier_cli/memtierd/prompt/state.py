"""A prompt: the machine, the statistics, and what its commands have selected and created."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from memtier_cli.memtierd.prompt.output import Output
from memtier_cli.memtierd.prompt.session import run_line, run_words

if TYPE_CHECKING:
    from memtier_cli.memtierd.prompt.policy_part import PolicyPart
    from memtier_cli.memtierd.prompt.ranges import Selection
    from memtier_cli.memtierd.prompt.routine_part import RoutinePart
    from memtier_cli.memtierd.prompt.tracker_part import AnyTracker
    from memtier_cli.memtierd.prompt.watcher_part import AnyWatcher
    from memtier_engine.hostfs.host import Host
    from memtier_engine.mover.control import MoverControl, MoverThread
    from memtier_engine.mover.mover import MoverConfig
    from memtier_engine.stats.recorder import Statistics


@dataclass(eq=False)
class Prompt:
    """One prompt and everything its commands share. One thread at a time."""

    output: Output
    _host: Host | None = None
    """None: this machine."""
    _statistics: Statistics | None = None
    """None: its own."""
    trusted: bool = True
    """Whether whoever gives the commands may run programs: an operator may, a configuration file may not."""
    ranges: Selection | None = None
    """Of `arange`."""
    pages: Selection | None = None
    """Of `pages`."""
    policy: PolicyPart | None = None
    tracker: AnyTracker | None = None
    watcher: AnyWatcher | None = None
    routines: list[RoutinePart] = field(default_factory=list)
    routine_index: int = 0
    stopwatches: dict[str, float] = field(default_factory=dict)
    """Unix time of the start, by name."""
    lender: Prompt | None = None
    """Whose policy and mover it uses; what is lent is not closed."""
    ended: bool = False
    """Set by `q`."""
    sink: Callable[[str], None] | None = None
    """Takes the output while a pipe is open; None: `output`."""
    _mover: MoverThread | None = None
    _pace: MoverConfig | None = None
    """Of the policy's mover, which its own took over."""
    _earlier: list[Any] = field(default_factory=list)
    """Trackers and watchers that are not current any more and may still run."""

    @property
    def host(self) -> Host:
        """The machine."""
        if self._host is None:
            from memtier_engine.hostfs.host import Host

            self._host = Host()
        return self._host

    @property
    def statistics(self) -> Statistics:
        """What engines have done. They begin when somebody asks: before, there is nothing to count."""
        if self._statistics is None:
            from memtier_engine.stats.recorder import Statistics

            self._statistics = Statistics()
        return self._statistics

    def write(self, text: str) -> None:
        """Output as it is."""
        if self.sink is not None:
            self.sink(text)
        else:
            self.output.write(text)

    def say(self, line: str) -> None:
        """A line of output."""
        self.write(line + "\n")

    def say_all(self, lines: Sequence[str]) -> None:
        """Lines of output in one piece."""
        if lines:
            self.write("\n".join(lines) + "\n")

    @property
    def mover(self) -> MoverControl:
        """The running policy's, or the prompt's own."""
        control = None if self.policy is None else self.policy.mover
        return control or self.own_mover

    @property
    def own_mover(self) -> MoverThread:
        """The prompt's own, or the lender's: it outlives a short prompt."""
        if self.lender is not None:
            return self.lender.own_mover
        if self._mover is None:
            from memtier_engine.mover.control import MoverThread

            self._mover = MoverThread(self.host, self._pace, on_outcome=self._moved)
        return self._mover

    def _take_pace(self, policy: PolicyPart) -> None:
        """What is moved by hand goes at the pace of the current policy, running or not; once per configuration."""
        pace = None if policy.spec is None or policy.name == "stub" else policy.spec.mover
        if pace is None or pace is self._pace or self.lender is not None:
            return
        self._pace = pace
        if self._mover is not None:
            self._mover.configure(pace)

    def attach(self, policy: PolicyPart) -> None:
        """Make a policy the current one, with its tracker and its watcher, if it works with such.

        The policy before is stopped: nobody could do that any more. Trackers and watchers go on until the end.
        """
        before = self.policy
        if before is not None and before is not policy and (self.lender is None or before is not self.lender.policy):
            before.close()
        self._keep(self.tracker, self.watcher)
        self.policy = policy
        self.tracker = policy.tracker
        self.watcher = policy.watcher
        self._take_pace(policy)

    def run_words_apart(self, words: Sequence[str], *, trusted: bool) -> int:
        """See `Owner.run_words_apart`."""
        with self._apart(trusted) as prompt:
            return run_words(prompt, words)

    def run_line_apart(self, line: str, *, trusted: bool) -> int:
        """See `Owner.run_line_apart`."""
        with self._apart(trusted) as prompt:
            return run_line(prompt, line)

    @contextmanager
    def _apart(self, trusted: bool) -> Iterator[Prompt]:
        """A fresh one, as each command of a routine has; what it creates lasts as long as the command."""
        prompt = Prompt(self.output, self.host, self.statistics, trusted=trusted, lender=self)
        if self.policy is not None:
            prompt.attach(self.policy)
        try:
            yield prompt
        finally:
            prompt.close()

    def _keep(self, *parts: Any) -> None:
        """Remember parts that are replaced, to stop them in the end."""
        self._earlier += [part for part in parts if part is not None and part not in self._earlier]

    def close(self) -> None:
        """Stop whatever the commands started. Safe to call twice."""
        parts: list[Any] = [*self.routines, self.watcher, self.tracker, self.policy, *self._earlier, self._mover]
        lent = None if self.lender is None else self.lender.policy
        for part in parts:
            if part is not None and part is not lent:
                part.close()

    def _moved(self, outcome: Any) -> None:
        self.statistics.event("mover.taskHandler")
        self.statistics.moved(outcome)
