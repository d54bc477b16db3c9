"""What methods of a plugin returned, as the runtime's messages; or why it cannot be. No IO."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from nri_core.api.adjust import Adjustment, Update
from nri_core.errors import LocalProtocolError
from nri_core.pb import nri_pb2

T = TypeVar("T")


class WrongAnswer(TypeError):
    """A method returned what it must not; the text says what, and of which type it is."""


def creation(found: Any, container_id: str) -> nri_pb2.CreateContainerResponse:
    """The answer to CreateContainer: an Adjustment, or (Adjustment, updates), or None.

    Raises:
        WrongAnswer: it is none of these, or holds what cannot be encoded.
        LocalProtocolError: an update of the container under creation.
    """
    method = "create_container"
    adjustment, changes = found if isinstance(found, tuple) and len(found) == 2 else (found, ())
    response = nri_pb2.CreateContainerResponse()
    if adjustment is not None:
        if not isinstance(adjustment, Adjustment):
            raise WrongAnswer(f"{method} returned {described(found)}, not an Adjustment, (Adjustment, updates) or None")
        if adjustment:
            response.adjust.CopyFrom(_encoded(method, adjustment, Adjustment.to_message))
    for update in updates(method, changes):
        if update.container_id == container_id:
            raise LocalProtocolError(
                f"an update of the container under creation, {container_id}", hint="use the adjustment"
            )
        response.update.append(update)
    return response


def updates(method: str, found: Any) -> list[nri_pb2.ContainerUpdate]:
    """Updates, or None. Raises: WrongAnswer."""
    if found is None:
        return []
    if not isinstance(found, Iterable) or isinstance(found, str | bytes):
        raise WrongAnswer(f"{method} returned {described(found)}, not a list of Update or None")
    messages = []
    for update in found:
        if not isinstance(update, Update):
            raise WrongAnswer(f"{method} returned {described(found)} with {described(update)} in it, not an Update")
        messages.append(_encoded(method, update, Update.to_message))
    return messages


def described(found: object) -> str:
    """The type of a wrong answer, and what it was, in a few words."""
    if isinstance(found, tuple):
        return f"a tuple of {', '.join(type(part).__name__ for part in found) or 'nothing'}"
    return type(found).__name__


def _encoded(method: str, found: T, encode: Callable[[T], Any]) -> Any:
    try:
        return encode(found)
    except (TypeError, ValueError, AttributeError) as error:  # protobuf's, of a field of the wrong type or range
        raise WrongAnswer(f"{method} returned an {type(found).__name__} that cannot be encoded: {error}") from error
