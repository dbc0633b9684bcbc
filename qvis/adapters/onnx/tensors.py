"""Where the numbers of an ONNX tensor are: in the model's file, in a file beside it, or in a live ``ModelProto``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path, PureWindowsPath
from typing import Any, Protocol

import numpy as np

from qvis.adapters.encodings import ENCODINGS, Array, Encoding
from qvis.adapters.onnx.protobuf import Message, varints
from qvis.adapters.values import Loader, Tensor, mapped
from qvis.errors import BadArgumentError

TYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    8: "string",
    9: "bool",
    10: "float16",
    11: "float64",
    12: "uint32",
    13: "uint64",
    14: "complex64",
    15: "complex128",
    16: "bfloat16",
    17: "float8_e4m3fn",
    18: "float8_e4m3fnuz",
    19: "float8_e5m2",
    20: "float8_e5m2fnuz",
    21: "uint4",
    22: "int4",
    23: "float4_e2m1",
    24: "float8_e8m0fnu",
    25: "uint2",
    26: "int2",
    27: "float6_e2m3",
    28: "float6_e3m2",
}
"""What ONNX's numbers for types mean."""

_FIELDS = {"float32": "float_data", "float64": "double_data", "int64": "int64_data"}
_FIELDS.update(dict.fromkeys(("uint32", "uint64"), "uint64_data"))
"""The field that holds the numbers of a type where ``raw_data`` does not; ``int32_data`` for all others."""


class Place(Protocol):
    """A kind of model that tensors come from."""

    def loader(self, proto: Any, field: str) -> tuple[Loader, int | None]:
        """A function for the bytes of a field of a ``TensorProto``, and how many there are where that is known."""
        ...

    def folder(self, name: str) -> Path:
        """Where the external data of the tensor ``name`` is looked for."""
        ...


@dataclass(frozen=True)
class InFile:
    """A model in a file; its messages are only used while the graph is read."""

    path: Path

    def loader(self, proto: Message, field: str) -> tuple[Loader, int | None]:
        """See :class:`Place`."""
        spans = list(getattr(proto, field))
        if field in ("int32_data", "int64_data", "uint64_data"):
            return partial(_load_varints, self.path, spans), None
        return partial(_load, self.path, spans), sum(end - start for _, start, end in spans)

    def folder(self, name: str) -> Path:  # noqa: ARG002
        """See :class:`Place`."""
        return self.path.parent


@dataclass(frozen=True)
class Live:
    """A ``ModelProto`` in memory, which stays the caller's."""

    def loader(self, proto: Any, field: str) -> tuple[Loader, int | None]:
        """See :class:`Place`."""
        if field == "raw_data":
            return lambda: proto.raw_data, len(proto.raw_data)
        types = {"float_data": "<f4", "double_data": "<f8", "uint64_data": "<u8"}
        return lambda: np.array(getattr(proto, field), dtype=types.get(field, "<i8")), None

    def folder(self, name: str) -> Path:
        """See :class:`Place`."""
        raise BadArgumentError(
            f"model: the numbers of the tensor {name!r} are in a file beside the model; pass the path of the model, "
            "or load it with its external data"
        )


def tensor(proto: Any, place: Place, name: str = "") -> Tensor:
    """The tensor that a ``TensorProto`` describes.

    Raises
    ------
    BadArgumentError
        Its numbers are not there, or are in a file outside the model's folder.
    """
    name = name or proto.name
    kind = TYPES.get(proto.data_type, f"number {proto.data_type}")
    shape = tuple(int(size) for size in proto.dims)
    encoding = ENCODINGS.get(kind)
    if min(shape, default=0) < 0:
        raise BadArgumentError(f"model: the tensor {name!r} has the shape {shape}")
    if encoding is None:
        return Tensor(name, shape, kind, bytes)
    expected = encoding.bytes_for(prod(shape))
    if proto.data_location == 1:
        entries = {entry.key: entry.value for entry in proto.external_data}
        where = _External(place.folder(name), name, entries.get("location", ""), _whole(entries, name), expected)
        where.find()
        return Tensor(name, shape, kind, where.load)
    load, size = place.loader(proto, "raw_data")
    if not size and expected:
        load, size = place.loader(proto, _FIELDS.get(kind, "int32_data"))
        load = partial(_typed, load, encoding, name, expected)
    if size is not None and size < expected:
        raise BadArgumentError(f"model: the tensor {name!r} of shape {shape} holds {size} of {expected} bytes")
    return Tensor(name, shape, kind, load)


def _typed(load: Loader, encoding: Encoding, name: str, expected: int) -> bytes | memoryview | Array:
    """Numbers that a field keeps wider than their type, in the bytes that they would have in ``raw_data``."""
    content = load()
    if isinstance(content, np.ndarray) and content.dtype.kind in "iu":
        content = content.astype(f"<u{max(1, encoding.bits // 8)}")
    size = content.nbytes if isinstance(content, (np.ndarray, memoryview)) else len(content)
    if size < expected:
        raise BadArgumentError(f"model: the tensor {name!r} holds {size} of {expected} bytes")
    return content


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _load(path: Path, spans: list[tuple[int, int, int]]) -> bytes | memoryview:
    if len(spans) == 1:
        return mapped(path, spans[0][1], spans[0][2])
    return b"".join(bytes(mapped(path, start, end)) for _, start, end in spans)


def _load_varints(path: Path, spans: list[tuple[int, int, int]]) -> Array:
    # A wire type of 0 says that the number itself stands in place of its start.
    single = [np.array([start]).astype("<i8") for wire, start, _ in spans if not wire]
    packed = [varints(mapped(path, start, end)) for wire, start, end in spans if wire]
    return np.concatenate([*single, *packed, np.zeros(0, dtype=np.int64)])


def _whole(entries: dict[str, str], name: str) -> int:
    text = entries.get("offset", "0") or "0"
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise BadArgumentError(f"model: the external data of the tensor {name!r} has no offset but {text!r}")
    return int(text)


@dataclass(frozen=True)
class _External:
    """Numbers in a file beside the model."""

    folder: Path
    tensor: str
    location: str
    offset: int
    size: int

    def find(self) -> Path:
        """The file, when it lies inside the model's folder and is long enough."""
        path = self._inside()
        if not path.is_file():
            raise BadArgumentError(
                f"model: the tensor {self.tensor!r} is in the file {self.location!r}, which is not beside the model; "
                f"put it into {str(self.folder)!r}"
            )
        held = path.stat().st_size
        if self.offset + self.size > held:
            raise BadArgumentError(
                f"model: the tensor {self.tensor!r} needs {self.offset + self.size} bytes of the file "
                f"{self.location!r}, which has {held}; it was cut short, or belongs to another model"
            )
        return path

    def _inside(self) -> Path:
        """The path, which the file's author chose: never one that leads to what the user did not pass."""
        windows = PureWindowsPath(self.location)
        root = self.folder.resolve()
        leaves = not self.location or "\0" in self.location or ".." in windows.parts
        leaves = leaves or windows.drive != "" or windows.root != ""
        if not leaves:
            try:
                path = (root / self.location).resolve()
            except (OSError, RuntimeError):  # a loop of links
                leaves = True
            else:
                leaves = not path.is_relative_to(root)
        if leaves:
            raise BadArgumentError(
                f"model: the tensor {self.tensor!r} wants to be read from {self.location!r}; external data is only "
                "read from inside the model's own folder"
            )
        return path

    def load(self) -> memoryview:
        return mapped(self.find(), self.offset, self.offset + self.size)
