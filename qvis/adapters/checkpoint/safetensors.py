"""Reads ``.safetensors`` files with NumPy alone, each tensor by itself and only when it is asked for.

A file is eight bytes that give the length of a header, the header, which is JSON, and the numbers. The package
``safetensors`` checks the same things, but hands out bfloat16 and float8 only together with a framework.
"""

from __future__ import annotations

import json
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from qvis.adapters.checkpoint.stored import Array, Contents, Stored, integers, natural, reading
from qvis.adapters.encodings import ENCODINGS, Encoding
from qvis.adapters.torch.archive import mapped
from qvis.errors import BadArgumentError

LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the package ``safetensors``."""
MOST_AXES = 32
"""What every version of NumPy can hold."""

_WHAT, _WAY_OUT = "no .safetensors file", "save it anew with safetensors' save_file"

_TORCHAO = ("IntxUnpackedToInt8Tensor", "Int8Tensor")
"""Its tensors that are read: one integer in each byte."""

_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "BOOL": "bool",
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}


def recognizes(start: bytes) -> bool:
    """Whether a file that starts with these bytes looks like one."""
    return len(start) > 8 and 2 <= int.from_bytes(start[:8], "little") <= LONGEST_HEADER and start[8:9] == b"{"


def load(path: Path) -> Contents:
    """The tensors of a file, in the natural order of their names: the file has them in an order of its own.

    Raises
    ------
    BadArgumentError
        The file is cut short, damaged, or of another kind.
    """
    with reading(path, _WHAT, _WAY_OUT):
        header, start, size = _header(path)
        metadata = header.pop("__metadata__", {})
        header = _joined(header, metadata)
        tensors = [_stored(path, name, header[name], start) for name in sorted(header, key=natural)]
        _check_cover([entry["data_offsets"] for entry in header.values()], size)
    made_by = {"pt": "PyTorch", "tf": "TensorFlow", "flax": "Flax", "np": "NumPy", "mlx": "MLX"}
    kind = made_by.get(str(metadata.get("format")), "")
    names = set(header)
    ties = {one: kept for one, kept in metadata.items() if kept in names and one not in names}
    return Contents(f"safetensors ({kind})" if kind else "safetensors", tuple(tensors), ties=ties)


def _joined(header: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """The header with the names that others give to the parts of a tensor of integers, in place of torchao's.

    They are ``a._weight_qdata`` and ``a._weight_scale`` where the weight is ``a.weight``, and the metadata tell which.
    """
    names: dict[str, str] = {}
    for name, text in metadata.items():
        if not isinstance(text, str) or not any(f'"{kind}"' in text for kind in _TORCHAO):
            continue
        owner, _, last = name.rpartition(".")
        for part in ("qdata", "scale", "zero_point"):
            names[f"{owner}._{last}_{part}"] = name if part == "qdata" else f"{name}_{part}"
    renamed = {names.get(name, name): entry for name, entry in header.items()}
    return renamed if len(renamed) == len(header) else header


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header, where the numbers start, and how many bytes of them there are."""
    size = path.stat().st_size
    if not size:
        raise BadArgumentError(f"model: {str(path)!r} is empty; {_WAY_OUT}")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(LONGEST_HEADER, size - 8):
            raise ValueError(f"it has {size} bytes, and its header should have {length}")
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique)
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise ValueError("its header is no table of tensors")
    return header, 8 + length, size - 8 - length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is in its header twice")
    return table


def _stored(path: Path, name: str, entry: dict[str, Any], start: int) -> Stored:
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(code, str) and _counts(shape) and _counts(offsets) and len(offsets) == 2):
        raise ValueError(f"{name!r} has no proper type, shape and place")
    shape, (begin, end) = tuple(shape), offsets
    encoding = ENCODINGS.get(_TYPES.get(code, ""))
    if encoding is None:
        return Stored(name, shape, code, partial(_unknown, name, code), obstacle=f"has a type unknown here ({code})")
    count = _product(shape)
    if encoding.bytes_for(count) != end - begin:
        raise ValueError(f"{name!r} is {code} of shape {list(shape)} and has {end - begin} bytes")
    if len(shape) > MOST_AXES:
        raise ValueError(f"{name!r} has {len(shape)} axes")
    return Stored(
        name,
        shape,
        encoding.name,
        partial(_read, path, start + begin, end - begin, encoding, shape),
        obstacle="" if encoding.floating else integers(encoding.name),
    )


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)


def _product(shape: tuple[int, ...]) -> int:
    """The count of numbers, and an error instead of a number of millions of digits."""
    count = 1
    for size in shape:
        count *= size
        if count > 2**63:
            raise ValueError(f"a tensor of shape {list(shape)[:8]} fits into no file")
    return count


def _check_cover(places: list[list[int]], size: int) -> None:
    """The tensors must follow one another without a gap, and end where the file ends."""
    ordered = sorted(tuple(place) for place in places)
    for (_, end), (begin, _) in pairwise([(0, 0), *ordered]):
        if begin != end:
            raise ValueError(f"its tensors {'overlap' if begin < end else 'leave a gap'} at byte {min(begin, end)}")
    last = ordered[-1][1] if ordered else 0
    if last != size:
        raise ValueError(f"its numbers should have {last} bytes and have {size}")


def _read(path: Path, start: int, size: int, encoding: Encoding, shape: tuple[int, ...]) -> Array:
    with reading(path, "no longer what it was", "do not change a file while it is read"):
        if not size:
            return encoding.numbers(b"", shape)
        data = mapped(path, start, size)
        misaligned = start % max(1, encoding.bits // 8)
        with np.errstate(invalid="ignore"):  # of NaNs that were meant to signal
            return encoding.numbers(bytes(data) if misaligned else data, shape)


def _unknown(name: str, code: str) -> Array:
    raise BadArgumentError(f"model: the numbers of {name!r} are of a type unknown here ({code})")
