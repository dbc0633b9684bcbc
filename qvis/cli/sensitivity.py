"""``qvis sensitivity``: what quantizing each layer does to the output of a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qvis.cli.models import open_model
from qvis.cli.options import (
    All,
    AsJson,
    Bits,
    Data,
    ExampleInputs,
    ExcludeFor,
    Format,
    Formats,
    Layers,
    Loss,
    Measure,
    MeasureOption,
    Model,
    Name,
    Open,
    ProblemDb,
    Samples,
    Stored,
    WatchDb,
    Weights,
    check_open,
    make_thresholds,
)
from qvis.cli.output import print_exclusion, print_table
from qvis.cli.progress import Work
from qvis.errors import BadArgumentError

EXAMPLES = (
    "qvis sensitivity net.py:make_net --weights trained.safetensors --data val.npz --report review",
    "qvis sensitivity model.onnx --data images/ --measure top",
    "qvis sensitivity model.onnx --data val.npz --exclude-for onnxruntime",
    "qvis sensitivity model.keras --example-inputs 1x224x224x3",
)


def sensitivity(
    model: Model,
    data: Data = None,
    example_inputs: ExampleInputs = None,
    weights: Weights = None,
    out: Annotated[
        Path | None, typer.Option("--report", "-o", metavar="DIR", help="Write the page as well. [default: nothing]")
    ] = None,
    layers: Layers = None,
    bits: Bits = 8,
    samples: Samples = 64,
    measure: MeasureOption = Measure.none,
    loss: Loss = None,
    stored: Stored = False,
    formats: Formats = [Format.html],  # noqa: B006 (Typer copies it)
    name: Name = None,
    as_json: AsJson = False,
    open_page: Open = False,
    all_rows: All = False,
    exclude_for: ExcludeFor = None,
    watch_db: WatchDb = None,
    problem_db: ProblemDb = None,
) -> None:
    """Show what quantizing each layer does to the output.

    Runs the model on data, predicts the damage of every layer at every width from some backward passes, and prints the
    layers, the most damaging first.
    """
    check_open(open_page, formats)
    if data is None and example_inputs is None:
        raise BadArgumentError(
            "--data: needed to run the model; without data, --example-inputs 1x3x224x224 has inputs made up"
        )
    if exclude_for is not None and as_json:
        raise BadArgumentError("--exclude-for: not with --json, whose 'exclusions' has it for all tools")
    if open_page and out is None:
        raise BadArgumentError("--open: needs the page, expected '--report DIR' as well")
    with Work() as work:
        work.say("Loading")
        from qvis.analysis import analyze
        from qvis.report import Report
        from qvis.report.document import summarize

        analysis = analyze(
            open_model(model, weights),
            selected_layers=layers,
            bits=bits,
            thresholds=make_thresholds(watch_db, problem_db, None),
            name=name,
            inputs=data,
            example_inputs=example_inputs,
            samples=samples,
            measure=measure.value,
            loss=loss,
            fold=not stored,
            progress=work.layers,
            track=work.steps,
        )
        work.say("Writing")
        document = summarize(analysis, "sensitivity")
        report = Report(document, analysis.layers)
        if out is not None:
            report.write(out, [one.value for one in formats])
    paths = [str(path) for path in report.paths.values()]
    if as_json:
        print(report.to_json())
        for path in paths:
            print(f"wrote {path}", file=sys.stderr)
    else:
        print_table(document, all_rows)
        if paths:
            print("", *paths, sep="\n")
    if exclude_for is not None:
        print_exclusion(analysis, exclude_for.value)
    if open_page:
        report.open()
