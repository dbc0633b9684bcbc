"""What a visualization returns: the findings, and the files that show them."""

from __future__ import annotations

import contextlib
import html
import json
import os
import tempfile
import webbrowser
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path

from qvis.analysis.comparison import LayerChange
from qvis.errors import BadArgumentError, OutputError
from qvis.layers import LayerAnalysis, Severity
from qvis.report.document import Document, jsonable

FORMATS = ("html", "json", "md")
MARKS = {
    "html": b'<meta name="generator" content="qvis ',
    "json": b'"qvis": "',
    "md": b"<!-- qvis ",
}
"""What tells a file that qvis wrote; it stands within the first :data:`MARK_WITHIN` bytes."""
MARK_WITHIN = 4096


class Written:
    """Something with a page, and the files that were written of it.

    Attributes
    ----------
    path
        The HTML page, or the first file written; ``None`` as long as nothing is written.
    paths
        Every file written, by format.
    """

    def __init__(self) -> None:
        self.paths: dict[str, Path] = {}

    @property
    def path(self) -> Path | None:
        """The HTML page if there is one, else the first file."""
        return self.paths.get("html") or next(iter(self.paths.values()), None)

    @property
    def verdict(self) -> str:
        """The finding in one sentence."""
        raise NotImplementedError

    def to_html(self) -> str:
        """The page."""
        raise NotImplementedError

    def open(self) -> None:
        """Show the page in the browser.

        Raises
        ------
        BadArgumentError
            No page has been written.
        """
        if "html" not in self.paths:
            raise BadArgumentError("open: no page was written, expected 'html' among the formats; call write(out_dir)")
        webbrowser.open(self.paths["html"].resolve().as_uri())

    def __repr__(self) -> str:
        where = f" in {str(self.path)!r}" if self.path else ""
        return f"<qvis report{where}: {self.verdict}>"

    def _repr_html_(self) -> str:
        """The page inside a notebook's cell, in a frame of its own so that neither disturbs the other."""
        page = html.escape(self.to_html(), quote=True)
        return (
            f'<iframe srcdoc="{page}" sandbox="allow-scripts allow-downloads allow-modals" title="qvis report"'
            ' style="width: 100%; height: 800px; border: 0"></iframe>'
        )


class Report(Written):
    """The result of one of the visualizations.

    Attributes
    ----------
    path
        The HTML page, or the first file written; ``None`` as long as nothing is written.
    paths
        Every file written, by format.
    layers
        The findings, one for each layer, in the model's own order. Each has ``name``, ``op``, ``shape``,
        ``severity``, ``reasons`` and ``statistics``; those of a comparison have ``before`` and ``after`` as well.
    """

    def __init__(self, document: Document, layers: Sequence[LayerAnalysis | LayerChange]) -> None:
        super().__init__()
        self._document = document
        self.layers = list(layers)

    @property
    def verdict(self) -> str:
        """The finding in one sentence."""
        return str(self._document["verdict"]["text"])

    @property
    def problematic_layers(self) -> list[LayerAnalysis | LayerChange]:
        """The layers that are a problem or unusable, worst first."""
        ranks = {layer["name"]: layer["rank"] for layer in self._document["layers"]}
        found = [layer for layer in self.layers if layer.severity.rank >= Severity.PROBLEM.rank]
        return sorted(found, key=lambda layer: ranks[layer.name])

    def to_dict(self) -> Document:
        """The whole summary as plain dicts, lists, strings and numbers; see "The JSON report" in the documentation."""
        plain: Document = jsonable(self._document)
        return plain

    def to_json(self, *, indent: int | None = None) -> str:
        """The summary as JSON text; NaN and infinite numbers are ``null``."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False, allow_nan=False)

    def to_markdown(self) -> str:
        """The summary for a pull request: verdict first, ten rows, the rest folded away."""
        from qvis.report.markdown import render_markdown

        return render_markdown(self._document)

    def to_html(self) -> str:
        """The page."""
        from qvis.report.html import render_html

        return render_html(self._document)

    def write(self, out_dir: str | PathLike[str], formats: Sequence[str] = ("html",)) -> Report:
        """Write the report into ``out_dir`` (made when missing) and return it. Either all files are written, or none.

        Raises
        ------
        BadArgumentError
            ``formats`` is empty or has an entry other than ``html``, ``json`` and ``md``.
        OutputError
            The folder cannot be written, or holds a file of the same name that qvis did not write.
        """
        formats = (formats,) if isinstance(formats, str) else tuple(formats)
        unknown = [name for name in formats if name not in FORMATS]
        if unknown or not formats:
            wrong = repr(unknown[0]) if unknown else "none"
            raise BadArgumentError(f"formats: got {wrong}, expected some of {', '.join(map(repr, FORMATS))}")
        render: dict[str, Callable[[], str]] = {
            "html": self.to_html,
            "json": lambda: self.to_json() + "\n",
            "md": self.to_markdown,
        }
        folder = Path(out_dir)
        targets = {name: folder / f"{self._document['kind']}.{name}" for name in formats}
        make_folder(folder)
        for name, target in targets.items():
            refuse_foreign(target, MARKS[name])
        texts = {name: render[name]() for name in formats}
        write_all({targets[name]: text for name, text in texts.items()})
        self.paths = targets
        return self


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
