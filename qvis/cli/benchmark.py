"""``qvis benchmark``: what quantizing brought, measured."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from qvis.cli.models import open_model
from qvis.cli.options import MODEL_HELP, All, AsJson, Data, ExampleInputs, Format, Formats, Open, check_open
from qvis.cli.progress import Work
from qvis.errors import BadArgumentError

EXAMPLES = (
    "qvis benchmark --model model.tflite --baseline model.keras --data val.npz --report review",
    "qvis benchmark --model int8.onnx --model int4.onnx --baseline float.onnx --data images/ --threads 1,2",
    "qvis benchmark --model net.pt2 --baseline net.py:make --weights trained.pt --data val.npz --json",
)


def benchmark(
    models: Annotated[
        list[str],
        typer.Option("--model", "-m", metavar="MODEL", help=f"{MODEL_HELP} Repeat it for more.", show_default=False),
    ],
    baseline: Annotated[
        str | None, typer.Option("--baseline", "-b", metavar="MODEL", help="Compare with this, usually the float one.")
    ] = None,
    data: Data = None,
    example_inputs: ExampleInputs = None,
    weights: Annotated[
        list[Path] | None,
        typer.Option(
            "--weights",
            metavar="FILE",
            help="Weights for a factory among the models, else for the baseline's; repeat it for several factories.",
        ),
    ] = None,
    weights_baseline: Annotated[
        Path | None, typer.Option("--weights-baseline", metavar="FILE", help="Weights for the baseline's factory.")
    ] = None,
    batch_sizes: Annotated[
        str, typer.Option("--batch-sizes", metavar="SIZES", help="Samples of a call; one series of calls for each.")
    ] = "1,32",
    threads: Annotated[
        str, typer.Option("--threads", metavar="NUMBERS", help="Threads to compute with; one series for each.")
    ] = "1",
    calls: Annotated[int, typer.Option("--calls", min=1, help="Time so many calls of each model in a series.")] = 50,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Make so many before.")] = 5,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Take so many samples of the data at most.")] = 512,
    names: Annotated[
        list[str] | None,
        typer.Option("--name", metavar="NAME", help="What to call the models: once for each, the baseline's first."),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers/--no-layers", help="Compare single layers as well.")] = True,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Run each file in a process of its own as well.")
    ] = True,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the order of calls.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--report", "-o", metavar="DIR", help="Write the page as well. [default: nothing]")
    ] = None,
    formats: Formats = [Format.html],  # noqa: B006 (Typer copies it)
    as_json: AsJson = False,
    open_page: Open = False,
    all_rows: All = False,
) -> None:
    """Measure what quantizing brought and cost.

    Runs models in the engines that run them, beside a baseline: bytes, time, memory, right answers, changed answers,
    and what each layer lost. Calls of all models take turns.
    """
    check_open(open_page, formats)
    sizes, numbers = read_numbers("--batch-sizes", batch_sizes), read_numbers("--threads", threads)
    if data is None and example_inputs is None:
        raise BadArgumentError(
            "--data: needed to run the models; without data, --example-inputs 1x3x224x224 has them run on noise, for "
            "size, time and memory alone"
        )
    if open_page and out is None:
        raise BadArgumentError("--open: needs the page, expected '--report DIR' as well")
    own, of_baseline = share_weights(models, baseline, weights or [], weights_baseline)
    typed = list(zip(models, own, strict=True))
    with Work() as work:
        work.say("Loading")
        from qvis.benchmarking.benchmark import benchmark as run
        from qvis.report.benchmark import BenchmarkReport
        from qvis.report.benchmark_text import terminal_lines
        from qvis.report.files import check_targets

        if out is not None:
            check_targets(out, "benchmark", [one.value for one in formats])
        opened = [open_model(spec, file, argument="--model") for spec, file in typed]
        compared = None
        if baseline is not None:
            compared = open_model(baseline, of_baseline, argument="--baseline", option="--weights-baseline")
        found = run(
            opened,
            compared,
            data=data,
            example_inputs=example_inputs,
            batch_sizes=sizes,
            threads=numbers,
            calls=calls,
            warmup=warmup,
            samples=samples,
            names=names or own_names(typed if baseline is None else [(baseline, of_baseline), *typed]),
            layers=layers,
            memory=memory,
            seed=seed,
            track=work.steps,
        )
        work.say("Writing")
        report = BenchmarkReport(found)
        if out is not None:
            report.write(out, [one.value for one in formats])
    paths = [str(path) for path in report.paths.values()]
    if as_json:
        print(report.to_json())
        print(*(f"wrote {path}" for path in paths), sep="\n", end="\n" if paths else "", file=sys.stderr)
    else:
        print(*terminal_lines(report.document, all_rows=all_rows), sep="\n")
        print(*["", *paths] if paths else [], sep="\n", end="\n" if paths else "")
    if open_page:
        report.open()


def read_numbers(option: str, typed: str) -> tuple[int, ...]:
    """Whole numbers of 1 or more, typed with commas between them.

    >>> read_numbers("--threads", "1, 4")
    (1, 4)
    """
    parts = [part.strip() for part in typed.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) < 7 and int(part) for part in parts):
        raise BadArgumentError(f"{option}: got {typed!r}, expected whole numbers of 1 or more such as 1,32")
    return tuple(int(part) for part in parts)


def share_weights(
    models: Sequence[str], baseline: str | None, weights: Sequence[Path], of_baseline: Path | None
) -> tuple[list[Path | None], Path | None]:
    """Which model the files of weights are for: the factories among the models in turn, else the baseline's."""
    factories = [place for place, spec in enumerate(models) if _is_factory(spec)]
    if of_baseline is not None and (baseline is None or not _is_factory(baseline)):
        raise BadArgumentError(
            f"--weights-baseline: got {str(of_baseline)!r}, but no factory as --baseline, such as net.py:make"
        )
    given: list[Path | None] = [None] * len(models)
    if not weights:
        return given, of_baseline
    if not factories and baseline is not None and _is_factory(baseline) and len(weights) == 1 and of_baseline is None:
        return given, weights[0]
    if len(weights) != len(factories):
        found = [models[place] for place in factories]
        raise BadArgumentError(
            f"--weights: got {len(weights)}, and {len(found)} factories as --model; give one for each, in their order, "
            "and that of the baseline as --weights-baseline"
        )
    for place, file in zip(factories, weights, strict=True):
        given[place] = file
    return given, of_baseline


def own_names(typed: Sequence[tuple[str, Path | None]]) -> list[str] | None:
    """What tells the models apart: files and functions by their names, else as typed; None where neither does.

    >>> own_names([("nets/net.py:make", None), ("out/net.pt2", None)])
    ['make', 'net.pt2']
    """
    whole = [spec if weights is None else str(weights) for spec, weights in typed]
    for names in ([Path(one.rpartition(":")[2]).name for one in whole], whole):
        if len(set(names)) == len(names) and all(names):
            return names
    return None


def _is_factory(spec: str) -> bool:
    return ":" in spec and not Path(spec).exists()
