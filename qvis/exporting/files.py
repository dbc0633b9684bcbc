"""Puts exports into files, and leaves what somebody else wrote alone."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from qvis.errors import OutputError
from qvis.exporting.plain import COLUMNS
from qvis.report.files import write_all

_MARKS = {
    "json": b'"format": "qvis bit widths"',
    "csv": ",".join(COLUMNS).encode(),
    "aimet": b'{\n "version": "',  # AIMET itself indents otherwise
    "torchao": b"import FqnToConfig, IntxWeightOnlyConfig",
    "onnxruntime": b"widths = {  # bits of each initializer",
}
"""What tells a file of each format that qvis wrote."""
_MARK_WITHIN = 1 << 20
"""Notes on many layers may stand before it."""


def check_target(path: str | PathLike[str], format: str) -> Path:
    """Raise :class:`~qvis.OutputError` where an export of this format may not be written."""
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        what = "is a folder" if target.is_dir() else "lies in a folder that does not exist"
        raise OutputError(f"path: {str(target)!r} {what}; name a file in a folder that is there")
    try:
        with target.open("rb") as file:
            start = file.read(_MARK_WITHIN)
    except FileNotFoundError:
        return target
    except OSError as error:
        raise OutputError(f"path: {str(target)!r} cannot be replaced: {error.strerror}") from error
    if start and _MARKS[format] not in start:
        raise OutputError(
            f"path: {str(target)!r} is not what qvis writes for {format}, and is left alone; remove it or name another"
        )
    return target


def write_export(path: str | PathLike[str], text: str, format: str) -> None:
    """Write the text of an export to a file, once it is complete; one that is there is replaced if it is qvis' own.

    Raises
    ------
    OutputError
        The file cannot be written, or somebody else wrote it.
    """
    target = check_target(path, format)
    try:
        write_all({target: text})
    except OutputError as error:
        raise OutputError(str(error).replace("out_dir:", "path:", 1)) from error.__cause__
