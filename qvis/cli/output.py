"""What every command prints on stdout."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qvis.layers import Analysis
    from qvis.report import Report
    from qvis.report.document import Document


def print_table(document: Document, all_rows: bool = False) -> None:
    """The table; plain text of 80 columns where stdout is no terminal."""
    from rich.console import Console

    from qvis.report.terminal import print_document

    console = Console(highlight=False)
    # captured, since rich ends the process by itself where the reader of stdout has gone away
    with console.capture() as capture:
        print_document(document, console, all_rows=all_rows)
    sys.stdout.write(capture.get())


def print_exclusion(analysis: Analysis, tool: str) -> None:
    """How a tool is told to keep the layers that are a problem in float."""
    from qvis.excluding import TITLES, exclusions
    from qvis.words import count, visible

    if not analysis.problematic_layers:
        print(f"\nNo layer is a problem: for {TITLES[tool]} none needs to stay in float.")
        return
    found = exclusions(analysis, tool)
    print(f"\nTo leave {count(len(analysis.problematic_layers), 'layer')} in float, for {TITLES[tool]}:\n")
    if found.text:
        print(found.text, end="")
    if found.note:
        print(visible(f"{'# ' if found.text else ''}{found.note}"))


def print_report(report: Report, document: Document, *, as_json: bool, all_rows: bool) -> None:
    """A report that has been written: its JSON alone, or the table and then a path on each line."""
    paths = [str(path) for path in report.paths.values()]
    if as_json:
        print(report.to_json())
        print(*(f"wrote {path}" for path in paths), sep="\n", file=sys.stderr)
    else:
        print_table(document, all_rows)
        print("", *paths, sep="\n")
