"""Reads tensors that torch has mapped from a file, each through a map of its own.

Torch maps a file as a whole, and every page that was once looked at stays: after a pass over all tensors the process is
as large as the file. A map that goes with the tensor keeps it at the size of one.
"""

from __future__ import annotations

import mmap
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qvis.adapters.checkpoint.stored import Array, reading
from qvis.adapters.encodings import ENCODINGS, Encoding
from qvis.adapters.torch.archive import mapped

if TYPE_CHECKING:
    from torch import Tensor


def readers(path: Path, tensors: Iterable[Tensor]) -> dict[int, Callable[[], Array]]:
    """What reads a tensor of the file anew, by its ``id``; nothing where its place in the file is not certain."""
    plain = [one for one in tensors if _is_plain(one)]
    places = _places(path)
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in plain}
    base = _base(storages, places)
    if base is None:
        return {}
    found: dict[int, Callable[[], Array]] = {}
    for one in plain:
        start = one.untyped_storage().data_ptr() - base + int(one.storage_offset()) * one.element_size()
        found[id(one)] = partial(_read, path, start, one)
    return found


def _is_plain(tensor: Tensor) -> bool:
    """Whether its numbers are the bytes of its storage."""
    import torch

    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized or tensor.numel() == 0:
        return False
    return not tensor.is_neg() and str(tensor.dtype).removeprefix("torch.") in ENCODINGS


def _places(path: Path) -> dict[int, int]:
    """The size of each storage by where in the file it starts; none where its bytes are in another order than here."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entries = archive.infolist()
        for entry in entries:
            if entry.filename.endswith("/byteorder") and archive.read(entry) != sys.byteorder.encode():
                return {}
        places = {}
        for entry in entries:
            if "/data/" in entry.filename and entry.compress_type == zipfile.ZIP_STORED:
                file.seek(entry.header_offset + 26)
                places[entry.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))] = entry.file_size
    return places


def _base(storages: dict[int, int], places: dict[int, int]) -> int | None:
    """The address at which the file is mapped: the only one at which every storage is an entry of the file."""
    first = min(storages, default=0)
    fitting = [
        first - start
        for start in places
        if (first - start) % mmap.PAGESIZE == 0
        and all(places.get(address - first + start) == size for address, size in storages.items())
    ]
    return fitting[0] if len(fitting) == 1 else None


def _read(path: Path, start: int, tensor: Tensor) -> Array:
    with reading(path, "no longer what it was", "do not change a file while it is read"):
        count = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        with np.errstate(invalid="ignore"):  # of NaNs that were meant to signal
            flat = _encoding(tensor).numbers(mapped(path, start, count * tensor.element_size()), (count,))
        strides = tuple(stride * flat.itemsize for stride in tensor.stride())
        return np.lib.stride_tricks.as_strided(flat, tuple(tensor.shape), strides, writeable=False)


def _encoding(tensor: Tensor) -> Encoding:
    return ENCODINGS[str(tensor.dtype).removeprefix("torch.")]
