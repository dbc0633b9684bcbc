"""``qvis compare``: two versions of one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qvis.cli.models import labels, open_model
from qvis.cli.options import (
    MODEL_HELP,
    All,
    AsJson,
    Bits,
    ChannelAxis,
    Data,
    ExampleInputs,
    Format,
    Formats,
    Layers,
    Open,
    OutDir,
    ProblemDb,
    Samples,
    StarvedLevels,
    Stored,
    WatchDb,
    channel_axes,
    check_open,
    make_thresholds,
)
from qvis.cli.output import print_report
from qvis.cli.progress import Work

EXAMPLES = (
    "qvis compare before.pt2 after.pt2",
    "qvis compare model.keras model.tflite",
    "qvis compare net.py:make net.py:make_pruned --data val.npz --name-new pruned",
    "qvis compare net.py:make net.py:make --weights-old a.safetensors --weights-new b.safetensors",
)


def compare(
    old: Annotated[str, typer.Argument(metavar="OLD", help=MODEL_HELP, show_default=False)],
    new: Annotated[str, typer.Argument(metavar="NEW", help="The same, after the change.", show_default=False)],
    out: OutDir = Path("qvis-report"),
    weights_old: Annotated[Path | None, typer.Option(metavar="FILE", help="Weights for OLD's factory.")] = None,
    weights_new: Annotated[Path | None, typer.Option(metavar="FILE", help="Weights for NEW's factory.")] = None,
    layers: Layers = None,
    bits: Bits = 8,
    formats: Formats = [Format.html],  # noqa: B006 (Typer copies it)
    channel_axis: ChannelAxis = None,
    data: Data = None,
    example_inputs: ExampleInputs = None,
    samples: Samples = 64,
    stored: Stored = False,
    name_old: Annotated[str | None, typer.Option(help="What the report calls the old model.")] = None,
    name_new: Annotated[str | None, typer.Option(help="What the report calls the new model.")] = None,
    as_json: AsJson = False,
    open_page: Open = False,
    all_rows: All = False,
    watch_db: WatchDb = None,
    problem_db: ProblemDb = None,
    starved_levels: StarvedLevels = None,
) -> None:
    """Show what changed between two models.

    Writes a page that opens offline, layer by layer, and prints its table. Layers are matched by name, and across
    formats by their weights. With data, both are run and judged by their outputs.
    """
    check_open(open_page, formats)
    with Work() as work:
        work.say("Loading")
        from qvis.analysis import analyze
        from qvis.analysis.comparison import compare as match
        from qvis.report import Report
        from qvis.report.document import summarize_changes

        thresholds = make_thresholds(watch_db, problem_db, starved_levels)
        axes = channel_axes(channel_axis)
        label_old, label_new = labels((old, weights_old), (new, weights_new))
        before, after = (
            analyze(
                open_model(spec, weights, argument=argument, option=f"--weights-{argument.lower()}"),
                selected_layers=layers,
                bits=bits,
                thresholds=thresholds,
                name=label if name is None else name,
                channel_axis=axes,
                inputs=data,
                example_inputs=example_inputs,
                samples=samples,
                fold=not stored,
                progress=work.layers,
                track=work.steps,
            )
            for argument, spec, weights, name, label in (
                ("OLD", old, weights_old, name_old, label_old),
                ("NEW", new, weights_new, name_new, label_new),
            )
        )
        work.say("Writing")
        comparison = match(before, after)
        document = summarize_changes(comparison)
        written = Report(document, comparison.layers).write(out, [one.value for one in formats])
    print_report(written, document, as_json=as_json, all_rows=all_rows)
    if open_page:
        written.open()
