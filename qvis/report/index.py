"""A page that links the reports of one folder, each with its verdict."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from qvis.report.cells import is_changes
from qvis.report.document import Document
from qvis.report.files import MARKS, make_folder, refuse_foreign, write_all
from qvis.report.frame import environment, read_widget
from qvis.version import __version__

FILE = "index.html"
ABOUT = {
    "sensitivity": "What rounding each layer does to the output, at every width, and what would help.",
    "relative_weight_ranges": "How unequal the channels of each layer are, and what one grid for all of them costs.",
    "weight_ranges": "Minimum, quartiles, mean and maximum of every channel of every layer.",
    "bit_widths": "A width for each layer instead of one for all, what that brings, and what other sizes would cost.",
    "grids": "Uniform or not, per tensor, channel or group, how many bits: levels on the weights, and what each costs.",
    "compressibility": "Low rank, pruning, fewer bits: how small each layer can be made, predicted and then measured.",
    "changes_after_optimization": "Both versions on common axes, with the difference shaded.",
    "benchmark": "What quantizing brought: bytes, time, memory and answers of files, in the engines that run them.",
    "image_quantization": "What bits are, on a picture and on layers drawn as pictures; it takes pictures of yours.",
}
STYLES = ("page", "index")


def render_index(documents: Sequence[Document], *, title: str, lead: str) -> str:
    """The page for reports that lie beside it. Its head names the model of the first.

    Parameters
    ----------
    documents
        What the reports were made from, in the order of the page; the first is about a model.
    title
        What the reports are about.
    lead
        A sentence or two above the list.
    """
    return (
        environment()
        .get_template("index.html.jinja")
        .render(
            title=title,
            lead=lead,
            version=__version__,
            css=Markup("\n".join(read_widget(f"{name}.css") for name in STYLES)),
            model=_models(documents[0])[-1],
            entries=[_entry(document) for document in documents],
        )
    )


def check_index(out_dir: str | PathLike[str]) -> None:
    """Raise :class:`~qvis.OutputError` where the page could not be written, before any report is."""
    make_folder(Path(out_dir))
    refuse_foreign(Path(out_dir) / FILE, MARKS["html"])


def write_index(out_dir: str | PathLike[str], documents: Sequence[Document], *, title: str, lead: str) -> Path:
    """Write :func:`render_index` as ``index.html`` and return its path.

    Raises
    ------
    OutputError
        The folder cannot be written, or holds an ``index.html`` that qvis did not write.
    """
    check_index(out_dir)
    path = Path(out_dir) / FILE
    write_all({path: render_index(documents, title=title, lead=lead)})
    return path


def _entry(document: Document) -> dict[str, Any]:
    models = _models(document) if "model" in document else []
    names = " → ".join(model["name"] for model in models)
    counts = models[-1].get("counts", {}) if models else {}
    about = ABOUT[document["kind"]]
    return {
        "href": quote(f"{document['kind']}.html"),
        "title": document["title"],
        "about": f"{names}. {about}" if names else about,
        "sentence": document["verdict"]["sentence"],
        "counts": [(level, number) for level, number in counts.items() if number],
    }


def _models(document: Document) -> list[dict[str, Any]]:
    model = document["model"]
    return [model["before"], model["after"]] if is_changes(document) else [model]
