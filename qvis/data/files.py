"""Data from what can be typed on a command line: a file of arrays, a folder of images, or a function."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from qvis.data.images import Images, find_images
from qvis.errors import BadArgumentError

LABELS = ("labels", "label", "y")
"""What labels are called among inputs by name."""
_FORMS = (
    "give a .npz or .npy file, a folder of images, or 'package.module:function' or 'path/to/file.py:function' "
    "that gives data"
)


def read(path: str | PathLike[str], images: Images, notes: list[str]) -> tuple[Any, Any]:
    """The inputs and the labels that a path or a place in code stands for; None where it has no labels.

    Raises
    ------
    BadArgumentError
        There is no such file or function, or it cannot be read.
    """
    file = Path(path)
    if file.is_dir():
        return find_images(file, images, notes)
    suffix = file.suffix.lower()
    if suffix in (".npz", ".npy"):
        if not file.is_file():
            raise BadArgumentError(f"inputs: there is no file {str(path)!r}")
        return _read_npz(file) if suffix == ".npz" else (_read_npy(file), None)
    if isinstance(path, str) and ":" in path and not file.exists():
        data = _call(path)
        # a pair is what loaders of data give: pictures, and what they show
        pair = isinstance(data, tuple) and len(data) == 2
        return (data[0], data[1]) if pair else (data, None)
    raise BadArgumentError(f"inputs: {'cannot read' if file.exists() else 'there is no'} {str(path)!r}; {_FORMS}")


def _read_npy(file: Path) -> Any:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy raises many kinds for damaged files
        raise _unreadable(file, error) from error


def _read_npz(file: Path) -> tuple[Any, Any]:
    try:
        # NumPy leaves a damaged file open that it opened itself.
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files}
    except Exception as error:
        raise _unreadable(file, error) from error
    if not found:
        raise BadArgumentError(f"inputs: {str(file)!r} holds no arrays")
    if "x" in found and set(found) <= {"x", "y"}:
        return found["x"], found.get("y")
    if set(found) == {f"arr_{place}" for place in range(len(found))}:
        return tuple(found[f"arr_{place}"] for place in range(len(found))), None
    labels = [name for name in LABELS if name in found]
    lengths = {name: array.shape[:1] for name, array in found.items()}
    if len(labels) > 1 or len(set(lengths.values())) > 1:
        raise BadArgumentError(
            f"inputs: {str(file)!r} holds {', '.join(map(repr, found))}, which do not belong together; call the inputs "
            "'x' and the labels 'y', or each array as the input of the model that it is for"
        )
    return {name: array for name, array in found.items() if name not in labels}, found[labels[0]] if labels else None


def _unreadable(file: Path, error: Exception) -> BadArgumentError:
    if "pickle" in str(error) or "Python objects" in str(error):
        return BadArgumentError(
            f"inputs: {str(file)!r} is damaged or holds objects, and reading them could run code; save arrays of "
            "numbers with numpy.savez or numpy.save"
        )
    return BadArgumentError(f"inputs: {str(file)!r} cannot be read: {type(error).__name__}: {error}")


def _call(spec: str) -> Any:
    """What the function gives. This runs the code."""
    from qvis.adapters.factories import make

    try:
        data = make(spec)
    except BadArgumentError as error:
        raise BadArgumentError(f"inputs: {str(error).removeprefix('model: ')}") from error.__cause__
    if isinstance(data, (str, PathLike)):
        raise BadArgumentError(f"inputs: {spec!r} gave the path {str(data)!r}; give the path itself")
    return data
