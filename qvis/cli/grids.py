"""``qvis grids``: which grid of numbers to round each layer to."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qvis.cli.models import open_model
from qvis.cli.options import (
    All,
    AsJson,
    ChannelAxis,
    Data,
    ExampleInputs,
    Format,
    Formats,
    Layers,
    Model,
    Name,
    Open,
    OutDir,
    Samples,
    Stored,
    Weights,
    channel_axes,
    check_open,
)
from qvis.cli.progress import Work

EXAMPLES = (
    "qvis grids model.safetensors",
    "qvis grids net.py:make_net --weights trained.safetensors --data val.npz -o review",
    "qvis grids model.onnx --data images/ --bits 4 --bits 3 --layers 'features.*'",
)


def grids(
    model: Model,
    data: Data = None,
    example_inputs: ExampleInputs = None,
    weights: Weights = None,
    out: OutDir = Path("qvis-report"),
    layers: Layers = None,
    bits: Annotated[
        list[int] | None,
        typer.Option("--bits", min=2, max=16, help="A width to try. Repeat it for more. [default: 8, 6, 4, 3, 2]"),
    ] = None,
    keep_db: Annotated[
        float, typer.Option("--keep-db", help="What a layer is to keep, of the output with data, else of its weights.")
    ] = 30.0,
    samples: Samples = 64,
    stored: Stored = False,
    formats: Formats = [Format.html],  # noqa: B006 (Typer copies it)
    name: Name = None,
    channel_axis: ChannelAxis = None,
    as_json: AsJson = False,
    open_page: Open = False,
    all_rows: All = False,
) -> None:
    """Compare grids of numbers for each layer.

    Uniform or not, per tensor, channel or group, how many bits: rounds the weights to each grid, and says what that
    costs in bytes and in noise; with data, in damage to the output.
    """
    check_open(open_page, formats)
    axes = channel_axes(channel_axis)
    with Work() as work:
        work.say("Loading")
        from qvis.analysis.schemes import default_schemes
        from qvis.report.files import check_targets
        from qvis.report.grids import compare_grids

        check_targets(out, "grids", [one.value for one in formats])

        report = compare_grids(
            open_model(model, weights),
            out,
            schemes=None if not bits else default_schemes(bits),
            inputs=data,
            example_inputs=example_inputs,
            selected_layers=layers,
            keep_db=keep_db,
            samples=samples,
            fold=not stored,
            name=name,
            formats=[one.value for one in formats],
            channel_axis=axes,
            progress=work.layers,
            track=work.steps,
        )
    paths = [str(path) for path in report.paths.values()]
    if as_json:
        print(report.to_json())
        print(*(f"wrote {path}" for path in paths), sep="\n", file=sys.stderr)
    else:
        _print(report.document, all_rows)
        print("", *paths, sep="\n")
    if open_page:
        report.open()


def _print(document: dict[str, object], all_rows: bool) -> None:
    from rich.console import Console

    from qvis.report.grids_text import print_grids

    console = Console(highlight=False)
    # captured, since rich ends the process by itself where the reader of stdout has gone away
    with console.capture() as capture:
        print_grids(document, console, all_rows=all_rows)
    sys.stdout.write(capture.get())
