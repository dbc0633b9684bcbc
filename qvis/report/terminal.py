"""From a document to a table in a terminal."""

from __future__ import annotations

import io
from itertools import chain
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qvis.report.cells import Column, columns, is_changes, left_out, ranked, severity, shorten
from qvis.report.document import Document
from qvis.words import visible

if TYPE_CHECKING:
    from collections.abc import Sequence

ROWS = 20
"""Rows shown, unless all are asked for."""
NAMED = 5
"""Left-out layers named, unless all are asked for."""
NARROWEST_NAME = 24
"""Columns are dropped before a name gets less room than this."""
GAP = 2

STYLES = {"": "", "strong": "bold", "ok": "", "watch": "yellow", "problem": "bold red", "unusable": "bold magenta"}
PLAIN = str.maketrans({"○": "o", "▲": "!", "◆": "#", "✕": "x", "→": ">", "×": "x", "−": "-", "…": "~", "∞": "inf"})
"""For terminals that know no Unicode."""


def render_terminal(document: Document, *, width: int = 80, all_rows: bool = False) -> str:
    """The table as text without colours."""
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    print_document(document, console, all_rows=all_rows)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def print_document(document: Document, console: Console, *, all_rows: bool = False) -> None:
    """Print the verdict, the table, worst layer first, and what was left out.

    Columns that do not fit the width of the console are dropped, the least telling first.
    """
    layers = ranked(document)
    shown = layers if all_rows else layers[:ROWS]

    def show(*parts: tuple[str, str], indent: str = "") -> None:
        text = Text.assemble(*((fit(part, console), STYLES[style]) for part, style in parts))
        for line in text.wrap(console, console.width - len(indent)):
            line.rstrip()
            console.print(Text(indent) + line, soft_wrap=True)

    show((_title(document), "strong"))
    show(*((visible(text), style) for text, style in document["verdict"]["sentence"]))
    for detail in document["verdict"]["details"]:
        show((visible(detail), ""))
    if shown:
        console.print()
        console.print(_table(shown, columns(document), console))
    if len(shown) < len(layers):
        show((f"and {len(layers) - len(shown):,} more (--all)", ""), indent="  ")
    for heading, items in left_out(document):
        console.print()
        show((heading, "strong"))
        most = len(items) if all_rows else NAMED
        for item in items[:most]:
            name = shorten(visible(item["name"]), max(NARROWEST_NAME, console.width // 2))
            show((f"{name}: {visible(item['reason'])}", ""), indent="  ")
        if len(items) > most:
            show((f"and {len(items) - most:,} more (--all)", ""), indent="  ")


def _title(document: Document) -> str:
    model = document["model"]
    if is_changes(document):
        return f"{visible(model['before']['name'])} → {visible(model['after']['name'])}: {document['title'].lower()}"
    return f"{visible(model['name'])}: {document['title'].lower()}"


def _table(layers: Sequence[dict[str, Any]], available: Sequence[Column], console: Console) -> Table:
    levels = [fit(severity(layer), console) for layer in layers]
    texts = {column: [fit(column.cell(layer), console) for layer in layers] for column in available}
    room = console.width - max(map(cell_len, ["Severity", *levels]))
    widths = {column: _width(column, cells) for column, cells in texts.items()}
    name = available[0]
    needed = dict(widths)
    needed[name] = min(widths[name], NARROWEST_NAME)
    for column in sorted(available, key=lambda column: column.keep):
        if column.keep < name.keep and sum(needed.values()) + GAP * len(needed) > room:
            del needed[column]
    rest = sum(width for column, width in needed.items() if column is not name) + GAP * len(needed)
    longest = max(1, min(widths[name], room - rest))

    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("Severity", no_wrap=True)
    for column in needed:
        # headers have two lines at most, and break where the title has its space
        title = Text("\n".join(column.title.rsplit(" ", 1)))
        table.add_column(title, no_wrap=True, justify="right" if column.right else "left", overflow="crop")
    texts[name] = [fit(shorten(text, longest), console) for text in texts[name]]
    for i, layer in enumerate(layers):
        style = STYLES[layer["severity"]]
        table.add_row(Text(levels[i], style=style), *(Text(texts[column][i]) for column in needed))
    return table


def _width(column: Column, cells: Sequence[str]) -> int:
    return max(map(cell_len, chain(column.title.rsplit(" ", 1), cells)))


def fit(text: str, console: Console) -> str:
    """The text in characters that the console can show."""
    try:
        text.encode(console.encoding)
    except UnicodeEncodeError:
        text = text.translate(PLAIN).encode(console.encoding, "backslashreplace").decode(console.encoding)
    return text
