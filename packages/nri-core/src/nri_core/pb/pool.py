"""Builds message classes in a descriptor pool of our own.

In protobuf's default pool a message name can stand once in a process: any other package with NRI's or ttrpc's
messages, under another file name, would fail to import beside this one, or make this one fail.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor, FileDescriptor
from google.protobuf.internal import enum_type_wrapper

_POOL = descriptor_pool.DescriptorPool()


def _class_of(descriptor: Descriptor) -> Any:
    make = getattr(message_factory, "GetMessageClass", None)  # protobuf 4.22
    if make is None:
        make = message_factory.MessageFactory(_POOL).GetPrototype  # type: ignore[attr-defined]  # gone in 5.26
    return make(descriptor)


def add(data: bytes, dependencies: Iterable[FileDescriptor], module: str, names: dict[str, Any]) -> FileDescriptor:
    """Put a serialized FileDescriptorProto into the pool, and its classes and enums into the module's `names`.

    Args:
        dependencies: the files it imports; of the default pool, from which they are copied.
    """
    for file in dependencies:
        _POOL.AddSerializedFile(file.serialized_pb)
    _POOL.AddSerializedFile(data)
    found = _POOL.FindFileByName(_name(data))
    for name, enum in found.enum_types_by_name.items():
        names[name] = enum_type_wrapper.EnumTypeWrapper(enum)
        names.update({value.name: value.number for value in enum.values})
    for name, message in found.message_types_by_name.items():
        names[name] = _class_of(message)
        names[name].__module__ = module  # pickle finds the class by it
    return found


def _name(data: bytes) -> str:
    from google.protobuf import descriptor_pb2

    return descriptor_pb2.FileDescriptorProto.FromString(data).name
