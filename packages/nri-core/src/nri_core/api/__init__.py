"""Pods, containers, adjustments and updates as plugin authors see them. No IO."""

from nri_core.api.adjust import Adjustment, Update
from nri_core.api.events import EventMask
from nri_core.api.model import Container, ContainerState, Mount, Pod

__all__ = ["Adjustment", "Container", "ContainerState", "EventMask", "Mount", "Pod", "Update"]
