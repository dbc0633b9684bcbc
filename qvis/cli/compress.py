"""``qvis compress``: how small each layer can be made, and what that does to the output."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated

import typer

from qvis.cli.models import open_model
from qvis.cli.options import (
    All,
    AsJson,
    Bits,
    Data,
    ExampleInputs,
    Format,
    Formats,
    Layers,
    Model,
    Name,
    Open,
    Samples,
    Stored,
    Weights,
    check_open,
)
from qvis.cli.progress import Work
from qvis.errors import BadArgumentError

if TYPE_CHECKING:
    from qvis.analysis.sizes import Compressibility

EXAMPLES = (
    "qvis compress net.py:make_net --weights trained.safetensors --data val.npz --report review",
    "qvis compress model.onnx --data images/ --report review --budget 600",
    "qvis compress model.keras --data val.npz --keep-db 25 --no-measure",
)

EVERY_SECONDS = 2.0
"""The page is written so often at most while scores are measured, and takes a tenth of the time at most."""


def compress(
    model: Model,
    data: Data = None,
    example_inputs: ExampleInputs = None,
    weights: Weights = None,
    out: Annotated[
        Path | None,
        typer.Option("--report", "-o", metavar="DIR", help="Write the page, as results come. [default: nothing]"),
    ] = None,
    layers: Layers = None,
    bits: Bits = 8,
    keep_db: Annotated[float, typer.Option("--keep-db", help="How many dB of the output are to be left.")] = 30.0,
    samples: Samples = 64,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Make the most promising changes for real, one by one.")
    ] = True,
    budget: Annotated[
        float | None, typer.Option("--budget", metavar="SECONDS", help="Measure no longer than this. [default: all]")
    ] = None,
    stored: Stored = False,
    formats: Formats = [Format.html],  # noqa: B006 (Typer copies it)
    name: Name = None,
    as_json: AsJson = False,
    open_page: Open = False,
    all_rows: All = False,
) -> None:
    """Show how small each layer can be made, and what that does to the output.

    Predicts size against damage for low rank, pruning and fewer bits from some backward passes, then measures the most
    promising ones. The page can be watched meanwhile; Ctrl-C ends the measuring, and what is there is kept.
    """
    check_open(open_page, formats)
    if data is None and example_inputs is None:
        raise BadArgumentError(
            "--data: needed to run the model; without data, --example-inputs 1x3x224x224 has inputs made up"
        )
    if open_page and out is None:
        raise BadArgumentError("--open: needs the page, expected '--report DIR' as well")
    if budget is not None and not budget > 0:
        raise BadArgumentError(f"--budget: got {budget:g}, expected a number of seconds above 0; or --no-measure")
    kinds = [one.value for one in formats]
    interrupted = False
    with Work() as work:
        work.say("Loading")
        from qvis.analysis.compressibility import compressibility
        from qvis.report.compressibility import CompressibilityReport
        from qvis.report.files import check_targets

        if out is not None:
            check_targets(out, "compressibility", kinds)

        found = compressibility(
            open_model(model, weights),
            data,
            example_inputs=example_inputs,
            bits=bits,
            keep_db=keep_db,
            samples=samples,
            fold=not stored,
            selected_layers=layers,
            name=name,
            track=work.steps,
        )
        if measure:
            found.state = "running"  # so that a page that is opened at once loads itself anew
        if out is not None:
            page = found.write(out, kinds)
        if open_page:
            page.open()
        if measure:
            try:
                _measure(found, budget, out, work)
            except KeyboardInterrupt:
                interrupted = True
        work.say("Writing")
        report = CompressibilityReport(found)
        paths = {} if out is None else report.write(out, kinds).paths
    document = report.document
    if as_json:
        print(report.to_json())
        print(*(f"wrote {path}" for path in paths.values()), sep="\n", file=sys.stderr)
    else:
        _print(document, all_rows)
        if paths:
            print("", *paths.values(), sep="\n")
    if interrupted:
        raise KeyboardInterrupt


def _measure(found: Compressibility, budget: float | None, out: Path | None, work: Work) -> None:
    """Measure, and write the page every now and then."""
    next_at = monotonic()
    seconds = float("inf") if budget is None else budget
    with closing(found.measure(seconds=seconds, track=work.steps)) as scores:
        for _ in scores:
            if out is not None and monotonic() >= next_at:
                began = monotonic()
                found.write(out, ("html",))
                next_at = monotonic() + max(EVERY_SECONDS, 10 * (monotonic() - began))


def _print(document: dict[str, object], all_rows: bool) -> None:
    """The verdict and a row for each layer; plain text where stdout is no terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from qvis.report.compressibility import tell_lines, tell_rows
    from qvis.report.terminal import ROWS, fit

    console = Console(highlight=False)
    rows = tell_rows(document)
    shown = rows if all_rows else rows[:ROWS]
    with console.capture() as capture:
        for line in tell_lines(document):
            console.print(Text(fit(line, console)))
        console.print()
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
        for title in ("Layer", "Now", "Best way", "Then", "dB kept", "Per dB"):
            right = title not in ("Layer", "Best way")
            table.add_column(title, justify="right" if right else "left", no_wrap=right, overflow="fold")
        for row in shown:
            table.add_row(*(Text(fit(cell, console)) for cell in row))
        console.print(table)
        if len(shown) < len(rows):
            console.print(f"  and {len(rows) - len(shown):,} more (--all)")
        for item in document["skipped"]:  # type: ignore[attr-defined]
            console.print(Text(fit(f"  left out: {item['name']}: {item['reason']}", console)))
    sys.stdout.write("\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n")
