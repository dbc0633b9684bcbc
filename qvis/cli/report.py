"""``qvis report``: one model."""

from __future__ import annotations

from pathlib import Path

from qvis.cli.models import open_model
from qvis.cli.options import (
    All,
    AsJson,
    Bits,
    ChannelAxis,
    Data,
    ExampleInputs,
    Format,
    Formats,
    Kind,
    KindOption,
    Layers,
    Measure,
    MeasureOption,
    Model,
    Name,
    Open,
    OutDir,
    ProblemDb,
    Samples,
    StarvedLevels,
    Stored,
    WatchDb,
    Weights,
    channel_axes,
    check_open,
    make_thresholds,
)
from qvis.cli.output import print_report
from qvis.cli.progress import Work

EXAMPLES = (
    "qvis report model.pt2",
    "qvis report model.safetensors --channel-axis 'upsample.*=1'",
    "qvis report net.py:make_net --weights trained.safetensors -o review",
    "qvis report net.py:make_net --weights trained.safetensors --data images/",
    "qvis report package.nets:Net --layers 'features.*' --bits 4 --format html --format md",
)


def report(
    model: Model,
    out: OutDir = Path("qvis-report"),
    weights: Weights = None,
    layers: Layers = None,
    bits: Bits = 8,
    kind: KindOption = Kind.relative,
    formats: Formats = [Format.html],  # noqa: B006 (Typer copies it)
    name: Name = None,
    channel_axis: ChannelAxis = None,
    data: Data = None,
    example_inputs: ExampleInputs = None,
    samples: Samples = 64,
    measure: MeasureOption = Measure.none,
    stored: Stored = False,
    as_json: AsJson = False,
    open_page: Open = False,
    all_rows: All = False,
    watch_db: WatchDb = None,
    problem_db: ProblemDb = None,
    starved_levels: StarvedLevels = None,
) -> None:
    """Show which layers quantization would hurt.

    Writes a page that opens offline, and prints its table.
    """
    check_open(open_page, formats)
    with Work() as work:
        work.say("Loading")
        from qvis.analysis import analyze
        from qvis.report import Report
        from qvis.report.document import summarize

        thresholds = make_thresholds(watch_db, problem_db, starved_levels)
        analysis = analyze(
            open_model(model, weights),
            selected_layers=layers,
            bits=bits,
            thresholds=thresholds,
            name=name,
            channel_axis=channel_axes(channel_axis),
            inputs=data,
            example_inputs=example_inputs,
            samples=samples,
            measure=measure.value,
            fold=not stored,
            progress=work.layers,
            track=work.steps,
        )
        work.say("Writing")
        document = summarize(analysis, "relative_weight_ranges" if kind is Kind.relative else "weight_ranges")
        written = Report(document, analysis.layers).write(out, [one.value for one in formats])
    print_report(written, document, as_json=as_json, all_rows=all_rows)
    if open_page:
        written.open()
