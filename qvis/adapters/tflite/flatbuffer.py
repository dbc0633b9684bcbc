"""Reads the format of FlatBuffers: tables whose fields are found by number. Each step is checked against the bounds."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np


class Table:
    """One table. What is absent has FlatBuffers' default; bytes that make no sense raise ``ValueError``."""

    def __init__(self, data: memoryview, position: int) -> None:
        self._data, self._position = data, position
        self._fields = position - _unpack(data, "<i", position)
        self._size = _unpack(data, "<H", self._fields)

    @classmethod
    def root(cls, data: memoryview) -> Table:
        """The table that the bytes begin with."""
        return cls(data, _unpack(data, "<I", 0))

    def _place(self, field: int) -> int:
        """Where a field is, 0 if it is absent."""
        entry = 4 + 2 * field
        offset = _unpack(self._data, "<H", self._fields + entry) if entry + 2 <= self._size else 0
        return self._position + offset if offset else 0

    def number(self, field: int, code: str, default: int = 0) -> int:
        """A field that is a number, of the type that ``struct`` has under that code."""
        place = self._place(field)
        return _unpack(self._data, f"<{code}", place) if place else default

    def table(self, field: int) -> Table | None:
        """A field that is a table."""
        place = self._place(field)
        return Table(self._data, place + _unpack(self._data, "<I", place)) if place else None

    def vector(self, field: int, size: int) -> tuple[int, int]:
        """Where the elements of a vector begin, and how many there are, of ``size`` bytes each."""
        place = self._place(field)
        if not place:
            return 0, 0
        start = place + _unpack(self._data, "<I", place)
        count = _unpack(self._data, "<I", start)
        if start + 4 + count * size > len(self._data):
            raise ValueError(f"a list at byte {start} reaches beyond the end")
        return start + 4, count

    def tables(self, field: int) -> list[Table]:
        """A field that is a vector of tables."""
        start, count = self.vector(field, 4)
        places = range(start, start + 4 * count, 4)
        return [Table(self._data, place + _unpack(self._data, "<I", place)) for place in places]

    def numbers(self, field: int, dtype: str) -> list[Any]:
        """A field that is a vector of numbers, of NumPy's type of that name."""
        kind = np.dtype(dtype)
        start, count = self.vector(field, kind.itemsize)
        values: list[Any] = np.frombuffer(self._data, kind, count, start).tolist() if count else []
        return values

    def text(self, field: int) -> str:
        """A field that is a string."""
        start, count = self.vector(field, 1)
        return str(self._data[start : start + count], "utf-8", "replace")


def _unpack(data: memoryview, code: str, position: int) -> int:
    if not 0 <= position <= len(data) - struct.calcsize(code):
        raise ValueError(f"it refers to byte {position} of {len(data)}")
    value: int = struct.unpack_from(code, data, position)[0]
    return value
