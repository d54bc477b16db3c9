"""Annotations of a pod + the configuration -> class and cgroup values of one container. Pure.

A pod says `KEY.memtierd.nri.io` for all its containers and `KEY.memtierd.nri.io/CONTAINER` (or
`/container.CONTAINER`) for one. Per key, the container's form beats the pod's. An empty value is not an absent
one: it hides what the pod or the class says, and sets nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from memtier_cli.nri_memtierd.config import MEMORY_KEYS, PluginConfig, WorkloadClass
from memtier_engine.errors import ConfigError, MemtierError
from memtier_engine.units import Sizes

SUFFIX = ".memtierd.nri.io"
CLASS_KEY = "class"
SWAP_MAX = "memory.swap.max"
OnUnknownClass = Literal["fail", "ignore"]
SHOWN_CHARACTERS = 80
"""Of what a pod says: its annotations may be 256 KiB long together, and go into the log and the status."""
REMARKS_MOST = 10

_AMOUNTS = Sizes(hint="use max, or bytes such as 268435456 or 256M", b=False, whole=True, blanks=False)


class ContainerRefused(MemtierError):
    """The container must not be created like this; the text goes to whoever created the pod."""


@dataclass(frozen=True, slots=True)
class Annotations:
    """What the annotations say about one container."""

    values: Mapping[str, str]
    """By key ("class", "memory.high"): the value that counts; it may be empty."""
    names: Mapping[str, str]
    """By key: the name of the annotation it came from."""
    unknown: tuple[str, ...] = ()
    """Annotations of our suffix that mean nothing to us."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done with one container."""

    workload_class: WorkloadClass | None = None
    """None: no engine, whatever the reason."""
    unified: Mapping[str, str] = field(default_factory=dict)
    """cgroup v2 file -> value, for the runtime to write."""
    remarks: tuple[str, ...] = ()
    """Things the administrator should see in the log: ignored annotations, classes that do not exist."""


def read_annotations(annotations: Mapping[str, str], container: str) -> Annotations:
    """The annotations of our suffix that count for the container of that name."""
    ranks: dict[str, int] = {}
    values: dict[str, str] = {}
    names: dict[str, str] = {}
    unknown: list[str] = []
    for name in sorted(annotations):
        whole_key, slash, scope = name.partition("/")
        key = whole_key.removesuffix(SUFFIX)
        if key == whole_key or not key:
            continue
        if key != CLASS_KEY and key not in MEMORY_KEYS:
            unknown.append(name)
            continue
        # Container names have no dot, so `container.NAME` cannot be a container of that name.
        rank = {"": 0 if not slash else -1, f"container.{container}": 1, container: 2}.get(scope, -1)
        if rank >= 0 and rank >= ranks.get(key, 0):
            ranks[key], values[key], names[key] = rank, annotations[name], name
    return Annotations(values, names, tuple(unknown))


def memory_value(text: str) -> str | None:
    """`max` or a number of bytes as decimal text, from what a person wrote; None if it is neither.

    Suffixes K, M, G, T, P, E (also Ki, Mi, ...) are powers of 1024, as the kernel reads them. They are resolved
    here because runtimes with the systemd cgroup driver accept only `max` and decimal bytes.
    """
    text = text.strip()
    if text == "max":
        return text
    try:
        return str(_AMOUNTS.to_bytes(text))
    except ConfigError:
        return None


def classify(
    annotations: Mapping[str, str],
    container: str,
    namespace: str,
    config: PluginConfig | None,
    *,
    on_unknown_class: OnUnknownClass = "fail",
) -> Decision:
    """Decide on one container.

    Args:
        annotations: of the pod; those of the container itself do not count.
        container: its name in the pod.
        config: None: no configuration was ever loaded.
    Raises:
        ContainerRefused: a class that does not exist or may not be used here (unless ignored), or a memory
            value that no kernel would take.
    """
    found = read_annotations(annotations, container)
    remarks = [f"annotation {_shown(name)} is not known and ignored" for name in found.unknown[:REMARKS_MOST]]
    if (more := len(found.unknown) - REMARKS_MOST) > 0:
        remarks.append(f"{more} more annotations are not known and ignored")
    chosen, remark = _find_class(found, namespace, config, on_unknown_class)
    if remark:
        remarks.append(remark)

    unified: dict[str, str] = {}
    if chosen is not None and chosen.allow_swap is not None:
        unified[SWAP_MAX] = "max" if chosen.allow_swap else "0"
    allowed = (config or PluginConfig()).allow_annotations
    for key in MEMORY_KEYS:
        text = found.values.get(key)
        if text is None:
            continue
        if key not in allowed:
            remarks.append(f"annotation {_shown(found.names[key])} is not in allowannotations and ignored")
            continue
        if text == "":
            unified.pop(key, None)
            continue
        value = memory_value(text)
        if value is None:
            raise ContainerRefused(
                f"annotation {_shown(found.names[key])} has value {_shown(text)}",
                hint=_AMOUNTS.hint,
            )
        unified[key] = value
    return Decision(chosen, unified, tuple(remarks))


def _find_class(
    found: Annotations, namespace: str, config: PluginConfig | None, on_unknown_class: OnUnknownClass
) -> tuple[WorkloadClass | None, str | None]:
    name = found.values.get(CLASS_KEY)
    if not name:
        return None, None
    source, shown = found.names[CLASS_KEY][:SHOWN_CHARACTERS], _shown(name)
    if config is None:
        why, hint = f"class {shown} ({source}): the plugin has no configuration", "start it with -config FILE"
    else:
        chosen = config.find(name)
        if chosen is not None and chosen.allows(namespace):
            return chosen, None
        if chosen is None:
            names = ", ".join(sorted(each.name for each in config.classes)) or "none"
            why, hint = f"class {shown} ({source}) is not configured", f"configured classes: {names}"
        else:
            why = f"class {shown} ({source}) may not be used in namespace {namespace!r}"
            hint = "the class has a list of namespaces"
    if on_unknown_class == "fail":
        raise ContainerRefused(why, hint=hint)
    return None, f"{why}; ignored"


def _shown(text: str) -> str:
    """Its beginning, quoted."""
    return repr(text) if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]!r}..."
