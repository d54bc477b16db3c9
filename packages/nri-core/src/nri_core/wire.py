"""Bytes of a peer as protobuf messages, with a bound on what they become. No IO.

An empty container in a list is two bytes on the wire and some hundred in memory, a thousand as a Python object: a
limit on bytes alone would let 1 MiB become 600. So what is small is counted too, before it is decoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

SMALL_BYTES = 8
"""A part of a message with at least so many bytes of content takes at most some twenty times as much in memory."""
MAX_SMALL_PARTS = 1 << 16
"""Strings and messages of fewer bytes in one message; the largest real ones have some hundred."""
MAX_PARTS = 1 << 18
"""Of any size, where they have to be counted one by one."""

WEIGHT_OF_SMALL_PART = 100
WEIGHT_OF_BYTES = 10
"""Measured with protobuf 7.36: an empty Mount takes 80 bytes, one whose content has 8 bytes as many."""

_LONG = bytes(range(SMALL_BYTES, 256))
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types."""

M = TypeVar("M", bound=Message)


class TooManyParts(ValueError):
    """A message is made of more parts than are decoded."""


def decoded(message: M, data: bytes, *, few: bool = False) -> M:
    """Fill `message` from `data`, and give it back.

    Args:
        few: it is usually large and made of few parts, such as one payload: to count them is quicker than to look at
            all of `data`.
    Raises:
        TooManyParts: it has more than `MAX_SMALL_PARTS` parts of fewer than `SMALL_BYTES` bytes.
        ValueError: it is no such message.
    """
    if len(data) > 2 * MAX_SMALL_PARTS and (few or may_be_small(data) > MAX_SMALL_PARTS):
        _count(memoryview(data), message.DESCRIPTOR, [0, 0])
    try:
        message.ParseFromString(data)
    except (DecodeError, UnicodeDecodeError, RecursionError) as error:  # the last two: protobuf without C
        raise ValueError(str(error)) from None
    return message


def may_be_small(data: bytes) -> int:
    """At most so many parts of `data` have fewer than `SMALL_BYTES` bytes: each has its length as a byte below 8.

    A bound, found at 1 ns a byte. Text can hold such bytes too, so that nothing may be refused for it alone.
    """
    half = len(data) // 2
    return half if half <= MAX_SMALL_PARTS else len(data.translate(None, _LONG))


def weight(data: bytes) -> int:
    """About as many bytes, and hardly more, does `data` take once it is decoded."""
    return WEIGHT_OF_BYTES * len(data) + WEIGHT_OF_SMALL_PART * len(data.translate(None, _LONG))


def fields(data: bytes | memoryview) -> Iterator[tuple[int, int, Any]]:
    """(number, wire type, value) of each field: an int for varints, a slice for bytes, None for fixed widths.

    Raises:
        ValueError: cut short, or a wire type that proto3 does not have.
    """
    at, end = 0, len(data)
    try:
        while at < end:
            key = data[at]
            at += 1
            if key > 0x7F:
                key, at = _varint(data, at - 1)
            number, kind = key >> 3, key & 7
            if kind == BYTES:
                length = data[at]
                at += 1
                if length > 0x7F:
                    length, at = _varint(data, at - 1)
                after = at + length
                if after > end:
                    break
                yield number, kind, data[at:after]
                at = after
            elif kind == VARINT:
                value, at = _varint(data, at)
                yield number, kind, value
            elif kind in (FIXED64, FIXED32):
                at += 8 if kind == FIXED64 else 4
                yield number, kind, None
            else:
                raise ValueError(f"field {number} is of wire type {kind}, which proto3 does not have")
    except IndexError:
        at = end + 1
    if at != end:
        raise ValueError("a field is cut short")


def _varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("a number has more than ten bytes")


def _count(data: memoryview, descriptor: Any, counts: list[int]) -> None:
    """Add (all, small) parts of `data` to `counts`. As deep as the schema, which has no recursive message."""
    known = descriptor.fields_by_number
    for number, kind, value in fields(data):
        field = known.get(number)
        if field is None or kind != BYTES:
            continue  # what is unknown is kept as it came
        counts[0] += 1
        counts[1] += len(value) < SMALL_BYTES
        if counts[1] > MAX_SMALL_PARTS or counts[0] > MAX_PARTS:
            raise TooManyParts(
                f"a message of more than {MAX_SMALL_PARTS} parts under {SMALL_BYTES} bytes, or {MAX_PARTS} in all"
            )
        if field.message_type is not None:
            _count(value, field.message_type, counts)
