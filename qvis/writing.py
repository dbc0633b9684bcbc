"""Writes files so that what was there stays until the new one is complete, or for good where something fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from qvis.errors import OutputError, QvisError


def check_target(target: Path, argument: str) -> None:
    """Refuse a file that cannot be; ``argument`` is what an error calls it.

    Raises
    ------
    OutputError
        It is a folder, or in none.
    """
    if target.is_dir() or not target.parent.is_dir():
        what = "is a folder" if target.is_dir() else "lies in a folder that does not exist"
        raise OutputError(f"{argument}: {str(target)!r} {what}; give the name of a file in a folder that exists")


@contextmanager
def replacing(target: Path, argument: str) -> Iterator[Path]:
    """A file in a folder of its own, which takes the place of the target in the end; files beside it come along.

    Raises
    ------
    OutputError
        It cannot be written.
    """
    try:
        with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
            yield Path(folder) / target.name
            # a file beside the model comes first, so that the model is there only when it is complete
            for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == target.name):
                file.replace(target.with_name(file.name))
    except QvisError:
        raise
    except OSError as error:
        why = error.strerror or str(error)
        raise OutputError(f"{argument}: {str(target)!r} cannot be written: {why}; choose another folder") from error
