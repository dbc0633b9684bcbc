"""``qvis equalize``: a model that rounds better and computes the same."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from qvis.cli.models import open_model
from qvis.cli.options import AsJson, Bits, Data, ExampleInputs, Format, Formats, Model, Name, Samples, Weights
from qvis.cli.progress import Work
from qvis.errors import BadArgumentError

EXAMPLES = (
    "qvis equalize model.onnx --data val.npz --output equalized.onnx --report review",
    "qvis equalize net.py:make --weights trained.pt --example-inputs 1x3x224x224 --output equalized.safetensors",
    "qvis equalize model.keras --data images/ --per-channel --bits 4 --output equalized.keras",
)


SHOWN = 8
"""So many connections that were left alone are named on the terminal."""


class Method(str, Enum):
    """How scales are chosen."""

    noise = "noise"
    square_root = "square-root"


class Means(str, Enum):
    """Where the means of what enters layers come from."""

    inputs = "inputs"
    analytic = "analytic"


def equalize(
    model: Model,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write the equalized model. [default: nothing]")
    ] = None,
    data: Data = None,
    example_inputs: ExampleInputs = None,
    weights: Weights = None,
    out: Annotated[
        Path | None, typer.Option("--report", "-o", metavar="DIR", help="Write the comparison. [default: nothing]")
    ] = None,
    bits: Bits = 8,
    per_channel: Annotated[
        bool, typer.Option("--per-channel", help="For grids per channel. [default: one grid per tensor]")
    ] = False,
    activations: Annotated[bool, typer.Option("--activations", help="Also for activations of the same width.")] = False,
    method: Annotated[Method, typer.Option(help="How scales are chosen.")] = Method.noise,
    replace_relu6: Annotated[
        bool, typer.Option("--replace-relu6", help="Put ReLU in place of ReLU6 where that helps.")
    ] = False,
    multiply: Annotated[
        list[str] | None,
        typer.Option(
            "--multiply", metavar="LAYER", help="Insert a multiplication before a Linear; 'offered': where it pays."
        ),
    ] = None,
    absorb_biases: Annotated[
        bool, typer.Option("--absorb-biases", help="Absorb high biases where that helps; with --activations.")
    ] = False,
    correct_biases: Annotated[
        Means | None, typer.Option(help="Take the mean of what rounding does out of biases, where that helps.")
    ] = None,
    samples: Samples = 32,
    formats: Formats = [Format.html],  # noqa: B006 (Typer copies it)
    name: Name = None,
    as_json: AsJson = False,
) -> None:
    """Scale channels between layers so that rounding does less damage.

    The model computes the same, which is verified; where it does not help, it is left out, and that is said.
    """
    if data is None and example_inputs is None and method is Method.noise:
        raise BadArgumentError(
            "--data: needed to run the model; without data, --example-inputs 1x3x224x224 has inputs made up, and "
            "--method square-root runs nothing"
        )
    if output is not None and output.exists() and Path(model).exists() and output.samefile(model):
        raise BadArgumentError(f"--output: {str(output)!r} is the model itself, which stays as it is; name another")
    with Work() as work:
        work.say("Loading")
        from qvis.equalization.equalize import equalize as run
        from qvis.report.document import jsonable
        from qvis.report.equalization import summarize_equalization
        from qvis.words import count

        found = run(
            open_model(model, weights),
            data,
            example_inputs=example_inputs,
            bits=bits,
            granularity="channel" if per_channel else "tensor",
            activations=activations,
            method=method.value.replace("-", " "),
            replace_relu6=replace_relu6,
            multiply="offered" if multiply == ["offered"] else multiply or (),
            absorb_biases=absorb_biases,
            correct_biases=None if correct_biases is None else correct_biases.value,
            samples=samples,
            name=name,
            track=work.steps,
        )
        work.say("Writing")
        paths: list[Path] = []
        if output is not None:
            found.save(output)
            paths.append(output)
        if out is not None:
            paths += found.write(out, [one.value for one in formats]).paths.values()
    document = jsonable(summarize_equalization(found))
    if as_json:
        print(json.dumps(document, ensure_ascii=False))
        print(*(f"wrote {path}" for path in paths), sep="\n", file=sys.stderr)
        return
    print(found.verdict)
    for row in (document["verified"] or {"kept": ()})["kept"]:
        print(
            f"  int{row['bits']} per {row['granularity']:8} {row['before_db']:6.1f} ± {row['before_spread_db']:.1f} dB"
            f"  ->  {row['after_db']:6.1f} ± {row['after_spread_db']:.1f} dB"
        )
    left = [f"  {one.name}: {one.reason}" for one in found.skipped[:SHOWN]]
    more = f"  and {len(found.skipped) - SHOWN} more, which --report and --json name"
    sites, connections = count(len(found.pairs), "site"), count(len(found.skipped), "connection")
    print(f"{sites} scaled, {connections} left alone{':' if left else '.'}")
    print(*left, *[more] * (len(found.skipped) > SHOWN), sep="\n", end="\n" if left else "")
    if found.verification is not None:
        print(
            f"The outputs change by {found.verification.relative:.0e} of the largest, on {found.verification.source}."
        )
    print(*found.steps, *found.notes, sep="\n", end="\n" if found.steps or found.notes else "")
    if found.offers and not multiply:
        print("A multiplication inserted by --multiply would help:")
        print(*(f"  {offer}" for offer in found.offers), sep="\n")
    print(*["", *paths] if paths else [], sep="\n")
