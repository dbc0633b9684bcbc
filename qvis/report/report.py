"""What a visualization returns: the findings, and the files that show them."""

from __future__ import annotations

import html
import json
import webbrowser
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import TypeVar

from qvis.analysis.comparison import LayerChange
from qvis.errors import BadArgumentError
from qvis.layers import LayerAnalysis, Severity
from qvis.report.document import Document, jsonable
from qvis.report.files import MARKS, make_folder, refuse_foreign, write_all

FORMATS = ("html", "json", "md")

Self = TypeVar("Self", bound="DocumentReport")


class Page:
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


class DocumentReport(Page):
    """A report that a document holds all of; its files are named after what kind it is.

    Attributes
    ----------
    document
        What all forms of the report are made from.
    """

    def __init__(self, document: Document) -> None:
        super().__init__()
        self.document = document

    @property
    def verdict(self) -> str:
        """The finding in one sentence."""
        return str(self.document["verdict"]["text"])

    def to_dict(self) -> Document:
        """The whole summary as plain dicts, lists, strings and numbers; see "The JSON report" in the documentation."""
        plain: Document = jsonable(self.document)
        return plain

    def to_json(self, *, indent: int | None = None) -> str:
        """The summary as JSON text; NaN and infinite numbers are ``null``."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False, allow_nan=False)

    def to_markdown(self) -> str:
        """The summary for a pull request."""
        raise NotImplementedError

    def write(self: Self, out_dir: str | PathLike[str], formats: Sequence[str] = ("html",)) -> Self:
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
        targets = {name: folder / f"{self.document['kind']}.{name}" for name in formats}
        make_folder(folder)
        for name, target in targets.items():
            refuse_foreign(target, MARKS[name])
        texts = {name: render[name]() for name in formats}
        write_all({targets[name]: text for name, text in texts.items()})
        self.paths = targets
        return self


class Report(DocumentReport):
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
        super().__init__(document)
        self.layers = list(layers)

    @property
    def problematic_layers(self) -> list[LayerAnalysis | LayerChange]:
        """The layers that are a problem or unusable, worst first."""
        ranks = {layer["name"]: layer["rank"] for layer in self.document["layers"]}
        found = [layer for layer in self.layers if layer.severity.rank >= Severity.PROBLEM.rank]
        return sorted(found, key=lambda layer: ranks[layer.name])

    def to_markdown(self) -> str:
        """The summary for a pull request: verdict first, ten rows, the rest folded away."""
        from qvis.report.markdown import render_markdown

        return render_markdown(self.document)

    def to_html(self) -> str:
        """The page."""
        from qvis.report.html import render_html

        return render_html(self.document)
