"""Events a plugin can subscribe to, which runtimes know which, and how both are written."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import IntFlag

from nri_core.pb import nri_pb2


class EventMask(IntFlag):
    """Bit of each event: 1 << (event number - 1)."""

    RUN_POD_SANDBOX = 1 << 0
    STOP_POD_SANDBOX = 1 << 1
    REMOVE_POD_SANDBOX = 1 << 2
    CREATE_CONTAINER = 1 << 3
    POST_CREATE_CONTAINER = 1 << 4
    START_CONTAINER = 1 << 5
    POST_START_CONTAINER = 1 << 6
    UPDATE_CONTAINER = 1 << 7
    POST_UPDATE_CONTAINER = 1 << 8
    STOP_CONTAINER = 1 << 9
    REMOVE_CONTAINER = 1 << 10
    UPDATE_POD_SANDBOX = 1 << 11
    POST_UPDATE_POD_SANDBOX = 1 << 12
    VALIDATE_CONTAINER_ADJUSTMENT = 1 << 13


UP_TO_V0_9 = EventMask(0x07FF)
CRIO_1_33 = EventMask(0x1FFF)
FROM_V0_10 = EventMask(0x3FFF)

HANDLERS = {mask: nri_pb2.Event.Name(mask.bit_length()).lower() for mask in EventMask}
"""Name of the plugin method for each event."""

STATE_CHANGES = frozenset(EventMask) - {
    EventMask.CREATE_CONTAINER,
    EventMask.UPDATE_CONTAINER,
    EventMask.STOP_CONTAINER,
    EventMask.UPDATE_POD_SANDBOX,
    EventMask.VALIDATE_CONTAINER_ADJUSTMENT,
}
"""Events that runtimes before v0.12 send through StateChange."""

_UNKNOWN_VERSIONS = {"", "(devel)", "0.0.0-unknown", "unknown"}


def known_events(runtime_name: str, runtime_version: str, nri_version: str) -> EventMask:
    """The events a runtime accepts in a subscription; it refuses a plugin that names any other.

    Runtimes from NRI v0.12 on tell their NRI version; for others it follows from their own. Where nothing is
    known, only the events that all know.
    """
    if nri_version not in _UNKNOWN_VERSIONS and (found := _numbers(nri_version)):
        return FROM_V0_10 if found >= (0, 10) else UP_TO_V0_9
    version = _numbers(runtime_version)
    if runtime_name in ("containerd", "v2"):  # containerd 2.0.0 to 2.0.4 call themselves v2
        return FROM_V0_10 if version >= (2, 2) else UP_TO_V0_9
    if runtime_name == "cri-o":
        if version >= (1, 34):
            return FROM_V0_10
        return CRIO_1_33 if version >= (1, 33) else UP_TO_V0_9
    return UP_TO_V0_9


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"v?(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else ()


def parse_events(*texts: str) -> EventMask:
    """`runpodsandbox,createcontainer`, `all`, `pod`, `container`: comma-separated, without case.

    Raises:
        ValueError: a word that is no event or group.
    """
    mask = EventMask(0)
    for text in texts:
        for word in text.split(","):
            mask |= _parse_word(word.strip().lower())
    return mask


def _parse_word(word: str) -> EventMask:
    names = {name.replace("_", ""): event for event, name in HANDLERS.items()}
    if word == "all":
        return FROM_V0_10
    if word in ("pod", "podsandbox", "container"):
        return _union(event for name, event in names.items() if word.removesuffix("sandbox") in name)
    if word not in names:
        known = ", ".join(["all", "pod", "container", *names])
        raise ValueError(f"{word!r} is no event; known are: {known}")
    return names[word]


def _union(events: Iterable[EventMask]) -> EventMask:
    mask = EventMask(0)
    for event in events:
        mask |= event
    return mask


def pretty(mask: int) -> str:
    """`RunPodSandbox,CreateContainer`; bits that are no event as `unknown(0x...)`."""
    names = ["".join(part.title() for part in HANDLERS[event].split("_")) for event in EventMask if mask & event]
    rest = mask & ~int(FROM_V0_10)
    return ",".join([*names, *([f"unknown({rest:#x})"] if rest else [])])
