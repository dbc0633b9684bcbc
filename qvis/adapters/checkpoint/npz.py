"""Reads ``.npz`` files, archives of NumPy arrays, member by member; arrays of Python objects are never unpickled."""

from __future__ import annotations

import zipfile
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.lib import format as npy

from qvis.adapters.checkpoint.stored import Array, Contents, Stored, integers, reading

_WHAT, _WAY_OUT = "no .npz file", "save it anew with numpy.savez"
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def load(path: Path) -> Contents:
    """The arrays of a file, in its order.

    Raises
    ------
    BadArgumentError
        The file is cut short, damaged, encrypted, or of another kind.
    """
    with reading(path, _WHAT, _WAY_OUT), zipfile.ZipFile(path) as archive:
        members = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
        names = [entry.filename for entry in members]
        if len(set(names)) < len(names):
            raise ValueError("two of its members have the same name")
        tensors = tuple(_stored(path, archive, entry) for entry in members)
    return Contents("NumPy archive", tensors)


def _stored(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Stored:
    name = entry.filename.removesuffix(".npy")
    if entry.flag_bits & 1:
        raise ValueError(f"{name!r} is encrypted")
    with archive.open(entry) as member:
        version = npy.read_magic(cast(Any, member))
        if version not in _HEADERS:
            return Stored(name, (0, 0), "unknown", _nothing, obstacle=f"is of version {version} of the .npy format")
        shape, _, dtype = _HEADERS[version](cast(Any, member))
        start = member.tell()
    obstacle = _obstacle(dtype)
    if dtype.kind != "O" and start + _product(shape) * dtype.itemsize != entry.file_size:
        raise ValueError(f"{name!r} is {dtype} of shape {shape} and has {entry.file_size - start} bytes")
    return Stored(name, shape, dtype.name, partial(_read, path, entry.filename), obstacle=obstacle)


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _obstacle(dtype: np.dtype[Any]) -> str:
    if dtype.kind == "f":
        return ""
    if dtype.kind in "biu":
        return integers(dtype.name)
    if dtype.kind == "O":
        return "holds Python objects, and unpickling them could run code"
    if dtype.kind == "c":
        return f"is complex ({dtype.name}), and qvis reads real weights"
    if dtype.kind == "V" and dtype.names is None:
        return f"holds numbers of {dtype.itemsize} bytes and does not say of which type; save them as float32"
    return f"holds no numbers ({dtype.name})"


def _read(path: Path, member: str) -> Array:
    with (
        reading(path, "no longer what it was", _WAY_OUT),
        zipfile.ZipFile(path) as archive,
        archive.open(member) as file,
    ):
        array: Array = npy.read_array(cast(Any, file), allow_pickle=False)
    if array.dtype.kind != "f":
        return array
    wide = np.float64 if array.dtype.itemsize >= 8 else np.float32
    with np.errstate(all="ignore"):  # numbers of 16 bytes may be too large
        return array.astype(wide, copy=False)


def _nothing() -> Array:
    return np.zeros((0, 0))
