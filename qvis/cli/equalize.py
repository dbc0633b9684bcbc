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


class Method(str, Enum):
    """How scales are chosen."""

    noise = "noise"
    square_root = "square-root"


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
    relu6_as_relu: Annotated[bool, typer.Option("--relu6-as-relu", help="Scale through ReLU6, and verify.")] = False,
    samples: Samples = 32,
    formats: Formats = [Format.html],  # noqa: B006 (Typer copies it)
    name: Name = None,
    as_json: AsJson = False,
) -> None:
    """Scale channels between layers so that rounding does less damage.

    The model computes the same, which is verified; where it does not help, it is left out, and that is said.
    """
    if data is None and example_inputs is None:
        raise BadArgumentError(
            "--data: needed to run the model; without data, --example-inputs 1x3x224x224 has inputs made up"
        )
    if output is not None and output.exists() and Path(model).exists() and output.samefile(model):
        raise BadArgumentError(f"--output: {str(output)!r} is the model itself, which stays as it is; name another")
    with Work() as work:
        work.say("Loading")
        from qvis.equalization.equalize import equalize as run
        from qvis.report.document import jsonable
        from qvis.report.equalization import summarize_equalization

        found = run(
            open_model(model, weights),
            data,
            example_inputs=example_inputs,
            bits=bits,
            granularity="channel" if per_channel else "tensor",
            activations=activations,
            method=method.value.replace("-", " "),
            relu6_as_relu=relu6_as_relu,
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
    for row in document["kept"]:
        print(
            f"  int{row['bits']} per {row['granularity']:8} {row['before_db']:6.1f} ± {row['before_spread_db']:.1f} dB"
            f"  ->  {row['after_db']:6.1f} ± {row['after_spread_db']:.1f} dB"
        )
    print(f"{len(found.pairs)} sites scaled, {len(found.skipped)} connections left alone; the outputs changed by")
    print(f"{found.verification.relative:.0e} of the largest, on {found.verification.source}.")
    for note in found.notes:
        print(note)
    print(*["", *paths] if paths else [], sep="\n")
