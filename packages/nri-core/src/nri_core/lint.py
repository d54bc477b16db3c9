"""What is probably wrong with a plugin's class: methods that nobody will call, or cannot. No IO."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterator

from nri_core.api.events import HANDLERS
from nri_core.plugin import Plugin

METHODS = (*HANDLERS.values(), "configure", "synchronize", "disconnected", "late")
"""What is called on a plugin."""
ALIKE = 0.85
"""Least likeness, as difflib has it, at which a name is taken for a slip: `start_contaner`, `synchronise`."""

_DECORATION = {"on", "handle", "do", "pre", "handler", "hook", "event"}


def remarks(plugin: Plugin) -> list[str]:
    """One line each; empty if nothing was noticed."""
    return [*_near_misses(plugin), *_uncallable(plugin)]


def _near_misses(plugin: Plugin) -> Iterator[str]:
    kind = type(plugin)
    for method in METHODS:
        if method in getattr(plugin, "__dict__", {}):
            yield f"{method} is set on the object: define it in the class {kind.__name__}, or it is not called"
    overridden = {method for method in METHODS if getattr(kind, method) is not getattr(Plugin, method)}
    for name in dir(kind):
        if name.startswith("_") or hasattr(Plugin, name) or not callable(inspect.getattr_static(kind, name)):
            continue
        meant = _meant(name)
        if meant is not None and meant not in overridden:
            yield f"{kind.__name__}.{name} is not called by any runtime: was {meant} meant?"


def _meant(name: str) -> str | None:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_")
    words = [word for word in words if word and word not in _DECORATION]
    for method in METHODS:
        parts = method.split("_")
        if sorted(words) == sorted(parts) or "".join(words) == "".join(parts):
            return method  # createContainer, on_create_container, container_create
        if len(words) > 1 and parts[: len(words)] == words:
            return method  # run_pod
    found = difflib.get_close_matches("_".join(words), METHODS, n=1, cutoff=ALIKE)
    return found[0] if found else None


def _uncallable(plugin: Plugin) -> Iterator[str]:
    kind = type(plugin)
    for method in METHODS:
        found = getattr(plugin, method)
        if getattr(found, "__func__", None) is getattr(Plugin, method):
            continue
        given = list(inspect.signature(getattr(Plugin, method)).parameters)[1:]
        if not callable(found):
            yield f"{kind.__name__}.{method} is of type {type(found).__name__}, and cannot be called"
            continue
        try:
            inspect.signature(found).bind(*given)
        except ValueError:
            continue  # a callable without a signature, such as one written in C
        except TypeError as error:
            yield f"{kind.__name__}.{method} cannot be called with ({', '.join(given)}): {error}"
