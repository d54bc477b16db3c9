"""What commands need of the prompt that runs them, all of it together. For type checks: it imports every command."""

from __future__ import annotations

from typing import Protocol

from memtier_cli.memtierd.prompt.basic import LogNeeds, QuitNeeds
from memtier_cli.memtierd.prompt.memory import ArangeNeeds
from memtier_cli.memtierd.prompt.moving import MoverNeeds
from memtier_cli.memtierd.prompt.pages import PagesNeeds
from memtier_cli.memtierd.prompt.policies import PolicyNeeds
from memtier_cli.memtierd.prompt.routines import RoutinesNeeds
from memtier_cli.memtierd.prompt.statistics import StatsNeeds
from memtier_cli.memtierd.prompt.stopwatch import TimeNeeds
from memtier_cli.memtierd.prompt.swapping import SwapNeeds
from memtier_cli.memtierd.prompt.tracking import TrackerNeeds
from memtier_cli.memtierd.prompt.watching import PidwatcherNeeds


class AllNeeds(
    ArangeNeeds,
    LogNeeds,
    MoverNeeds,
    PagesNeeds,
    PidwatcherNeeds,
    PolicyNeeds,
    QuitNeeds,
    RoutinesNeeds,
    StatsNeeds,
    SwapNeeds,
    TimeNeeds,
    TrackerNeeds,
    Protocol,
):
    """What a prompt has that any command runs in."""
