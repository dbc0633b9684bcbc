"""Reads the variables of a TensorFlow checkpoint (a tensor bundle) as the data they are, without TensorFlow.

The index is a sorted table of names as LevelDB writes it, each with a small message that says where the numbers lie.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from qvis.adapters.encodings import ENCODINGS, Array
from qvis.adapters.onnx.protobuf import Message, Schema, varint

MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)
"""What a sorted table ends with."""
GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
_FOOTER, _TRAILER = 48, 5
_SCHEMA: Schema = {
    "Header": {1: ("num_shards", "int"), 2: ("endianness", "int")},
    "Entry": {
        1: ("dtype", "int"),
        2: ("shape", "Shape"),
        3: ("shard", "int"),
        4: ("offset", "int"),
        5: ("size", "int"),
        6: ("crc", "bytes"),
        7: ("slices", "Shape*"),
    },
    "Shape": {2: ("dim", "Dim*")},
    "Dim": {1: ("size", "int")},
    "Graph": {1: ("nodes", "Node*")},
    "Node": {2: ("attributes", "Attribute*"), 3: ("slots", "Slot*")},
    "Attribute": {2: ("full_name", "string"), 3: ("key", "string")},
    "Slot": {3: ("node", "int")},
}
_DTYPES = {
    1: "float32",
    2: "float64",
    3: "int32",
    4: "uint8",
    5: "int16",
    6: "int8",
    7: "string",
    9: "int64",
    10: "bool",
    14: "bfloat16",
    17: "uint16",
    19: "float16",
    22: "uint32",
    23: "uint64",
    24: "float8_e5m2",
    25: "float8_e4m3fn",
}
"""TensorFlow's numbers for types of numbers."""


@dataclass(frozen=True)
class Entry:
    """Where one variable lies."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    digest: tuple[object, ...]
    """Equal for two variables that very probably hold the same numbers."""


class Bundle:
    """A checkpoint: a file ``PREFIX.index`` and its shards ``PREFIX.data-00000-of-00001``."""

    def __init__(self, index: Path) -> None:
        self.prefix = index.with_name(index.name.removesuffix(".index"))
        data = memoryview(index.read_bytes())
        if bytes(data[-len(MAGIC) :]) != MAGIC:
            raise ValueError("its index does not end as it should")
        self.shards = 1
        self.entries: dict[str, Entry] = {}
        for key, start, end in _table(data):
            if not key:
                header = Message(_SCHEMA, "Header", data, start, end)
                self.shards = header.num_shards
                if header.endianness:
                    raise ValueError("its numbers are stored big end first")
                continue
            message = Message(_SCHEMA, "Entry", data, start, end)
            if message.slices:
                raise ValueError(f"{key!r} is stored in slices")
            shape = tuple(one.size for one in message.shape.dim)
            dtype = _DTYPES.get(message.dtype, f"type {message.dtype}")
            digest = (dtype, shape, message.size, _crc(message, data))
            self.entries[key] = Entry(key, dtype, shape, message.shard, message.offset, message.size, digest)

    def read(self, entry: Entry) -> Array:
        """The numbers of a variable."""
        encoding = ENCODINGS[entry.dtype]
        if min(entry.shape, default=1) < 0 or encoding.bytes_for(prod(entry.shape)) != entry.size:
            raise ValueError(f"{entry.key!r} has {entry.size} bytes, too few or many for its shape {entry.shape}")
        return encoding.numbers(self._bytes(entry), entry.shape)

    def _bytes(self, entry: Entry) -> memoryview:
        path = self.prefix.with_name(f"{self.prefix.name}.data-{entry.shard:05d}-of-{self.shards:05d}")
        with path.open("rb") as file:
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        if not 0 <= entry.offset <= entry.offset + entry.size <= len(mapped):
            raise ValueError(f"{entry.key!r} reaches beyond the end of {path.name!r}")
        return mapped[entry.offset : entry.offset + entry.size]

    def graph(self) -> tuple[dict[str, str], set[str]]:
        """The name of the variable stored under each key, and the keys of optimizers' slots; empty in old files."""
        entry = self.entries.get(GRAPH)
        if entry is None:
            return {}, set()
        data = self._bytes(entry)
        size, start = varint(data, 0, len(data))
        start += 4  # a checksum
        nodes = Message(_SCHEMA, "Graph", data, start, min(start + size, len(data))).nodes
        slots = {slot.node for node in nodes for slot in node.slots}
        names, kept = {}, set()
        for index, node in enumerate(nodes):
            for attribute in node.attributes:
                names[attribute.key] = attribute.full_name
                if index in slots:
                    kept.add(attribute.key)
        return names, kept


def _crc(message: Message, data: memoryview) -> bytes:
    """The checksum, which is four bytes without a length."""
    return b"".join(bytes(data[start:end]) for _, start, end in message._found.get(6, []))


def _table(data: memoryview) -> Iterator[tuple[str, int, int]]:
    """The entries of a sorted table, as (key, start and end of the value)."""
    footer = len(data) - _FOOTER
    if footer < 0:
        raise ValueError("its index is too short")
    place = footer
    for _ in range(2):  # the first block is about the table itself, and is not needed
        _, place = varint(data, place, len(data))
    for _, start, end in _block(data, *_handle(data, place, len(data))):
        for key, first, last in _block(data, *_handle(data, start, end)):
            yield key.decode("utf-8", "replace"), first, last


def _handle(data: memoryview, start: int, end: int) -> tuple[int, int]:
    offset, start = varint(data, start, end)
    size, _ = varint(data, start, end)
    if offset + size + _TRAILER > len(data):
        raise ValueError("its index was cut short")
    if data[offset + size] != 0:
        raise ValueError("its index is compressed")
    return offset, size


def _block(data: memoryview, offset: int, size: int) -> Iterator[tuple[bytes, int, int]]:
    (restarts,) = struct.unpack_from("<I", data, offset + size - 4)
    end = offset + size - 4 - 4 * restarts
    key, place = b"", offset
    while place < end:
        shared, place = varint(data, place, end)
        fresh, place = varint(data, place, end)
        length, place = varint(data, place, end)
        if place + fresh + length > end:
            raise ValueError("its index is damaged")
        key = key[:shared] + bytes(data[place : place + fresh])
        place += fresh
        yield key, place, place + length
        place += length
