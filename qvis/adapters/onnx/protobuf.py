"""Reads the wire format of protocol buffers: just enough to find the parts of a message without copying them."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Schema = Mapping[str, Mapping[int, tuple[str, str]]]
"""For each type of message: number of a field -> (its name, its kind).

Kinds are ``int``, ``float``, ``string``, ``bytes``, ``ints``, ``floats``, ``doubles``, ``strings``, ``payload`` (where
the bytes are, not the bytes), or the name of a type of message, with a ``*`` behind it where there may be several.
"""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def scan(data: memoryview, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """The fields of a message as (number, wire type, start, end); a varint's value stands in place of its start.

    Raises ``ValueError`` where the bytes are no message.
    """
    while start < end:
        tag, start = varint(data, start, end)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, start = varint(data, start, end)
            yield number, wire, value, start
            continue
        if wire == _BYTES:
            size, start = varint(data, start, end)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"byte {start - 1} is no beginning of a field")
        if number == 0 or start + size > end:
            raise ValueError(f"the field at byte {start} reaches {start + size - end} bytes beyond its end")
        yield number, wire, start, start + size
        start += size


def varint(data: memoryview, start: int, end: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if start >= end:
            raise ValueError("it ends within a number")
        byte = data[start]
        start += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, start
    raise ValueError(f"the number before byte {start} is too long")


def varints(data: bytes | memoryview) -> NDArray[np.int64]:
    """All numbers of a packed field."""
    octets = np.frombuffer(data, dtype=np.uint8)
    if octets.size == 0:
        return np.zeros(0, dtype=np.int64)
    ends = np.flatnonzero(octets < 0x80)
    if ends.size == 0 or ends[-1] != octets.size - 1:
        raise ValueError("it ends within a number")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 10:
        raise ValueError("a number is too long")
    values = np.zeros(ends.size, dtype=np.uint64)
    for place in range(int(lengths.max())):
        longer = lengths > place
        seven = (octets[starts[longer] + place] & 0x7F).astype(np.uint64)
        values[longer] |= seven << np.uint64(7 * place)
    return values.view(np.int64)


class Message:
    """One message, whose fields are attributes under the names that the schema gives them.

    What is absent has protobuf's default: 0, ``""``, an empty list, or an empty message. Everything is decoded when it
    is first asked for, so that an attribute may raise ``ValueError``.
    """

    def __init__(self, schema: Schema, kind: str, data: memoryview, start: int, end: int) -> None:
        self._schema, self._kind, self._data = schema, kind, data
        self._bounds = (start, end)

    @cached_property
    def _found(self) -> dict[int, list[tuple[int, int, int]]]:
        found: dict[int, list[tuple[int, int, int]]] = {}
        for number, *where in scan(self._data, *self._bounds):
            found.setdefault(number, []).append(tuple(where))  # type: ignore[arg-type]
        return found

    def HasField(self, name: str) -> bool:
        """Whether the field is there."""
        return any(self._found.get(number) for number, (known, _) in self._schema[self._kind].items() if known == name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        for number, (known, kind) in self._schema[self._kind].items():
            if known == name:
                value = self._decode(kind, self._found.get(number, []))
                self.__dict__[name] = value
                return value
        raise AttributeError(f"{self._kind} has no field {name}")

    def _decode(self, kind: str, fields: list[tuple[int, int, int]]) -> Any:
        if kind == "ints":
            return [_signed(one) for field in fields for one in self._integers(field)]
        if kind in ("floats", "doubles"):
            return [one for field in fields for one in self._reals(kind, field)]
        if kind == "payload":
            return fields
        if kind == "int":
            return _signed(fields[-1][1]) if fields and fields[-1][0] == _VARINT else 0
        if kind == "float":
            return next(iter(self._reals("floats", fields[-1])), 0.0) if fields else 0.0
        spans = [(start, end) for wire, start, end in fields if wire == _BYTES]
        if kind.endswith("*"):
            return [Message(self._schema, kind[:-1], self._data, *span) for span in spans]
        if kind in self._schema:
            return Message(self._schema, kind, self._data, *(spans[-1] if spans else (0, 0)))
        texts = [bytes(self._data[start:end]) for start, end in spans]
        if kind == "bytes":
            return texts[-1] if texts else b""
        if kind == "strings":
            return [text.decode("utf-8", "replace") for text in texts]
        return texts[-1].decode("utf-8", "replace") if texts else ""

    def _integers(self, field: tuple[int, int, int]) -> list[int]:
        wire, start, end = field
        if wire == _VARINT:
            return [start]
        values: list[int] = varints(self._data[start:end]).tolist() if wire == _BYTES else []
        return values

    def _reals(self, kind: str, field: tuple[int, int, int]) -> list[float]:
        wire, start, end = field
        if wire == _VARINT:
            return []
        code, size = ("f", 4) if kind == "floats" else ("d", 8)
        count = (end - start) // size
        return list(struct.unpack(f"<{count}{code}", self._data[start : start + count * size]))


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
