# SPDX-License-Identifier: MIT
"""`struct` formats made from the compiled header's own offsets and sizes."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from ._uapi import ffi as uapi

__all__ = ["Layout"]

_INTEGERS = {(1, False): "B", (1, True): "b", (2, False): "H", (2, True): "h", (4, False): "I",
             (4, True): "i", (8, False): "Q", (8, True): "q"}  # fmt: skip


def _code(ctype: Any, ffi: Any) -> tuple[str, int]:
    """struct code of a field, and how many values it unpacks to."""
    if ctype.kind == "primitive":
        if ctype.cname == "char":
            return "s", 1
        return _INTEGERS[ffi.sizeof(ctype), int(ffi.cast(ctype, -1)) < 0], 1
    if ctype.kind == "array":
        if ctype.item.cname in ("char", "uint8_t"):
            return f"{ctype.length}s", 1
        return _code(ctype.item, ffi)[0] * ctype.length, ctype.length
    raise TypeError(f"no struct code for {ctype.cname}")


class Layout:
    """A C struct: bytes to values by name, and back.

    Nested structs come as `head.len`, flexible arrays not at all, an array of
    bytes as bytes and any other as a tuple. RuntimeError for a struct with padding that
    its declaration does not name: the protocol has none.
    """

    def __init__(self, name: str, ffi: Any = uapi) -> None:
        """`name` as in the header, without `struct`; `ffi` of the extension that knows it."""
        self._ffi = ffi
        self._slices: dict[str, tuple[int, int]] = {}
        self._blank: list[Any] = []
        self._values = 0
        text, at = self._walk(ffi.typeof(f"struct {name}"), "", 0)
        self.struct = struct.Struct(f"={text}")
        self.size: int = ffi.sizeof(f"struct {name}")
        if self.struct.size != at or at != self.size:
            raise RuntimeError(f"struct {name}: a hole at its end")
        self._blank = list(self.struct.unpack(bytes(at)))

    def _walk(self, ctype: Any, prefix: str, base: int) -> tuple[str, int]:
        text, at = "", base
        for name, field in ctype.fields:
            if field.type.kind == "array" and not field.type.length:
                continue
            if field.offset + base != at:
                raise RuntimeError(f"{ctype.cname}: a hole before {name}")
            if field.type.kind == "struct":
                inner, at = self._walk(field.type, f"{prefix}{name}.", at)
                text += inner
                continue
            code, values = _code(field.type, self._ffi)
            text += code
            self._slices[prefix + name] = (self._values, values)
            self._values += values
            at += self._ffi.sizeof(field.type)
        return text, at

    def index(self, name: str) -> int:
        """Position of a field among the values that `struct` unpacks."""
        return self._slices[name][0]

    def unpack(self, data: bytes, offset: int = 0) -> dict[str, Any]:
        """Values by field name of the struct at `offset`."""
        values = self.struct.unpack_from(data, offset)
        return {name: values[at] if n == 1 else values[at : at + n] for name, (at, n) in self._slices.items()}

    def pack(self, fields: Mapping[str, Any]) -> bytes:
        """The struct; fields not given are zero. struct.error where a value does not fit."""
        values = list(self._blank)
        for name, value in fields.items():
            at, n = self._slices[name]
            values[at : at + n] = [value] if n == 1 else value
        if len(values) != len(self._blank):
            raise struct.error("an array of another length")
        return self.struct.pack(*values)
