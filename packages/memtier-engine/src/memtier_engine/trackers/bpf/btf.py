"""The running kernel's type information (BTF): where the fields of its structures are. Bytes in, offsets out.

Source: Documentation/bpf/btf.rst, include/uapi/linux/btf.h. Needed for bcc only: libbpf reads BTF by itself.
"""

from __future__ import annotations

import struct

from memtier_engine.errors import Unavailable

BTF_MAGIC = 0xEB9F
_HEADER = struct.Struct("<HBBIIIII")  # magic, version, flags, hdr_len, type_off, type_len, str_off, str_len
_TYPE = struct.Struct("<III")  # name_off, info, size or type
_MEMBER = struct.Struct("<III")  # name_off, type, offset in bits

_KIND_INT = 1
_KIND_ARRAY = 3
_KIND_STRUCT = 4
_KIND_UNION = 5
_KIND_ENUM = 6
_KIND_TYPEDEF = 8
_KIND_VOLATILE = 9
_KIND_CONST = 10
_KIND_FUNC_PROTO = 13
_KIND_VAR = 14
_KIND_DATASEC = 15
_KIND_DECL_TAG = 17
_KIND_TYPE_TAG = 18
_KIND_ENUM64 = 19
_LAST_KIND = _KIND_ENUM64

_FIXED_TAIL = {_KIND_INT: 4, _KIND_ARRAY: 12, _KIND_VAR: 4, _KIND_DECL_TAG: 4}
"""Bytes that follow the common part, by kind; kinds in neither table have none."""
_TAIL_PER_MEMBER = {
    _KIND_STRUCT: 12,
    _KIND_UNION: 12,
    _KIND_ENUM: 8,
    _KIND_FUNC_PROTO: 8,
    _KIND_DATASEC: 12,
    _KIND_ENUM64: 12,
}
_TRANSPARENT = (_KIND_TYPEDEF, _KIND_VOLATILE, _KIND_CONST, _KIND_TYPE_TAG)


class Btf:
    """Structures by name. Only the position of every type is kept, not the types themselves."""

    def __init__(self, data: bytes) -> None:
        """Index `data`, the whole of /sys/kernel/btf/vmlinux: 0.1 s for 100 000 types.

        Raises:
            Unavailable: it is not BTF, or of a kind unknown here.
        """
        if len(data) < _HEADER.size or _HEADER.unpack_from(data)[0] != BTF_MAGIC:
            raise Unavailable("the kernel's type information is not little-endian BTF")
        _, _, _, header_length, type_offset, type_length, string_offset, string_length = _HEADER.unpack_from(data)
        self._data = data
        self._strings: int = header_length + string_offset
        self._strings_end = self._strings + string_length
        if self._strings_end > len(data) or header_length + type_offset + type_length > len(data):
            raise Unavailable("the kernel's type information (BTF) is cut short")
        self._positions = [0]  # type 0 is void
        self._structs: dict[int, int] = {}
        at = header_length + type_offset
        end = at + type_length
        unpack = _TYPE.unpack_from
        while at < end:
            name, info, _ = unpack(data, at)
            kind = info >> 24 & 0x1F
            if kind > _LAST_KIND:
                raise Unavailable(f"the kernel's type information has kind {kind}, which is not known here")
            if kind == _KIND_STRUCT and name:
                self._structs.setdefault(name, len(self._positions))
            self._positions.append(at)
            at += _TYPE.size + _FIXED_TAIL.get(kind, 0) + _TAIL_PER_MEMBER.get(kind, 0) * (info & 0xFFFF)

    def _name(self, offset: int) -> str:
        start = self._strings + offset
        return self._data[start : self._data.index(b"\0", start, self._strings_end)].decode()

    def offset(self, structure: str, field: str) -> int:
        """Offset in bytes of `field` in `struct structure`; fields of nameless members are found as C finds them.

        Raises:
            Unavailable: this kernel has no such structure or field.
        """
        found = self._structs.get(self._name_offset(structure))
        bits = None if found is None else self._offset_bits(found, field)
        if bits is None:
            raise Unavailable(f"this kernel has no {field} in struct {structure} (by its BTF)")
        return bits // 8

    def _name_offset(self, name: str) -> int:
        at = self._data.find(b"\0" + name.encode() + b"\0", self._strings, self._strings_end)
        return at + 1 - self._strings

    def _offset_bits(self, type_number: int, field: str) -> int | None:
        at = self._positions[type_number]
        _, info, target = _TYPE.unpack_from(self._data, at)
        kind = info >> 24 & 0x1F
        if kind in _TRANSPARENT:
            return self._offset_bits(target, field)
        if kind not in (_KIND_STRUCT, _KIND_UNION):
            return None
        has_bit_fields = info >> 31
        for member in range(info & 0xFFFF):
            name, inner, offset = _MEMBER.unpack_from(self._data, at + _TYPE.size + member * _MEMBER.size)
            offset = offset & 0xFFFFFF if has_bit_fields else offset
            if name:
                if self._name(name) == field:
                    return int(offset)
                continue
            within = self._offset_bits(inner, field)
            if within is not None:
                return int(offset) + within
        return None
