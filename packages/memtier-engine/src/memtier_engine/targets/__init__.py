"""Whose memory: each target answers `poll()` with the processes it means now."""

from memtier_engine.targets.base import Target
from memtier_engine.targets.cgroups import CgroupsTarget
from memtier_engine.targets.pids import PidsTarget

__all__ = ["CgroupsTarget", "PidsTarget", "Target"]
