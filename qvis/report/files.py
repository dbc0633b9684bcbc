"""Writes reports: all of their files or none, and never over what somebody else wrote."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from qvis.errors import OutputError

MARKS = {
    "html": b'<meta name="generator" content="qvis ',
    "json": b'"qvis": "',
    "md": b"<!-- qvis ",
}
"""What tells a file that qvis wrote; it stands within the first :data:`MARK_WITHIN` bytes."""
MARK_WITHIN = 4096


def check_targets(out_dir: Path, name: str, formats: Iterable[str]) -> None:
    """Before long work, raise what would keep its result from being written; nothing is made yet."""
    there = next(one for one in (out_dir.absolute(), *out_dir.absolute().parents) if os.path.exists(one))
    if not there.is_dir():
        raise OutputError(f"out_dir: {str(out_dir)!r} is a file or lies below one, expected a folder")
    if not os.access(there, os.W_OK):
        raise OutputError(f"out_dir: {str(out_dir)!r} cannot be written to; choose another folder")
    for one in formats:
        refuse_foreign(out_dir / f"{name}.{one}", MARKS[one])


def make_folder(folder: Path) -> None:
    """Make the folder to write to, with those above it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputError(f"out_dir: {str(folder)!r} is a file or lies below one, expected a folder") from error
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise OutputError(f"out_dir: cannot make {str(folder)!r}: {why}; choose another folder") from error


def refuse_foreign(path: Path, mark: bytes) -> None:
    """Never overwrite what somebody else wrote."""
    try:
        with path.open("rb") as file:
            start = file.read(MARK_WITHIN)
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"out_dir: {str(path)!r} cannot be replaced: {error.strerror}") from error
    if mark not in start and start:
        raise OutputError(
            f"out_dir: {str(path)!r} was not written by qvis and is left alone; remove it or choose another folder"
        )


def write_all(files: Mapping[Path, str | bytes]) -> None:
    """Write beside the targets first, then rename, so that a failure leaves all as it was."""
    written: list[tuple[str, Path]] = []
    replaced: list[tuple[Path, bytes | None]] = []
    target = Path()
    try:
        for target, content in files.items():
            handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
            written.append((temporary, target))
            with os.fdopen(handle, "wb") as file:
                file.write(content if isinstance(content, bytes) else content.encode("utf-8", errors="replace"))
            os.chmod(temporary, 0o666 & ~_umask())
        for temporary, target in written:
            before = target.read_bytes() if target.exists() else None
            os.replace(temporary, target)
            replaced.append((target, before))
    except BaseException as error:
        for done, before in replaced:
            _restore(done, before)
        if not isinstance(error, OSError):
            raise
        raise OutputError(f"out_dir: cannot write {str(target)!r}: {error.strerror}; choose another folder") from error
    finally:
        for temporary, _ in written:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def _restore(path: Path, content: bytes | None) -> None:
    with contextlib.suppress(OSError):
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
