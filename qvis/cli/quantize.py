"""``qvis quantize``: a quantized file, by the quantizer of the framework."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from qvis.cli.models import open_model
from qvis.cli.options import MODEL_HELP, AsJson, ExampleInputs, Name, Weights
from qvis.cli.progress import Work
from qvis.errors import BadArgumentError

EXAMPLES = (
    "qvis quantize --model model.keras --output model.tflite --method post_training --calibration-data images/",
    "qvis quantize --model net.py:make --weights trained.pt --output net.onnx --method post_training "
    "--calibration-data val.npz",
    "qvis quantize --model net.py:make --weights trained.pt --output net.pt2 --method quantization_aware --bits 4 "
    "--train-data train.npz --epochs 10",
)
SHOWN = 6
"""So many operations that compute with floats are named on the terminal."""


def quantize(
    model: Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help=MODEL_HELP, show_default=False)],
    output: Annotated[
        Path,
        typer.Option("--output", metavar="FILE", help="The file to write: .tflite, .onnx, .pt2 or .safetensors."),
    ],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="METHOD",
            help="weight_only, dynamic, post_training, quantization_aware; for Keras dynamic_range, float16, "
            "post_training, int16x8, quantization_aware.",
        ),
    ] = "post_training",
    calibration_data: Annotated[
        str | None,
        typer.Option(
            "--calibration-data",
            metavar="DATA",
            help="Find ranges of activations on this: an .npz or .npy file, a folder of images, module:function.",
        ),
    ] = None,
    train_data: Annotated[
        str | None,
        typer.Option("--train-data", metavar="DATA", help="Train on this; .npz with x and y, a folder of classes, ..."),
    ] = None,
    weights: Weights = None,
    example_inputs: ExampleInputs = None,
    bits: Annotated[
        str | None,
        typer.Option(
            "--bits", metavar="BITS", help="Width of weights, such as 4, or a file of qvis bits --export json=FILE."
        ),
    ] = None,
    per_tensor: Annotated[
        bool, typer.Option("--per-tensor/--per-channel", help="What shares a step of weights. [default: per channel]")
    ] = False,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", metavar="PATTERN", help="Leave these layers in float. Repeat it for more."),
    ] = None,
    equalize: Annotated[bool, typer.Option("--equalize", help="Equalize first, where that helps.")] = False,
    samples: Annotated[int, typer.Option(min=1, help="Take so many samples of the calibration data at most.")] = 256,
    train_samples: Annotated[int, typer.Option(min=1, help="And so many of the training data.")] = 100_000,
    epochs: Annotated[int, typer.Option(min=0, help="Times to go through the training data.")] = 5,
    learning_rate: Annotated[float, typer.Option(help="The first one; it falls to zero along a cosine.")] = 1e-4,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples of a step of training, or of calibration.")] = 32,
    loss: Annotated[
        str | None, typer.Option(metavar="LOSS", help="cross_entropy or mse. [default: what suits the labels]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order of training.")] = 0,
    name: Name = None,
    as_json: AsJson = False,
) -> None:
    """Quantize a model for real.

    Hands it to the quantizer of its framework, opens the file that comes out, and says what is in it: which operations
    compute with integers, and which are left in float.
    """
    width = read_bits(bits)
    with Work() as work:
        work.say("Loading")
        from qvis.quantization.quantize import quantize as run
        from qvis.words import count, listed_names, visible

        made = run(
            open_model(model, weights, argument="--model"),
            output,
            method,
            calibration_data=calibration_data,
            train_data=train_data,
            example_inputs=example_inputs,
            bits=width,
            granularity="tensor" if per_tensor else None,
            exclude=exclude or (),
            equalize=equalize,
            samples=samples,
            train_samples=train_samples,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            loss=loss,
            seed=seed,
            name=name,
            track=work.steps,
            watch=work.train,
        )
    if as_json:
        print(json.dumps(made.to_dict(), ensure_ascii=False))
        print(f"wrote {made.path}", file=sys.stderr)
        return
    print(visible(made.verdict))
    if made.equalization is not None:
        print(f"Equalized first: {made.equalization.verdict}")
    if made.epochs:
        first, last = made.epochs[0], made.epochs[-1]
        right = (
            ""
            if last.accuracy is None or first.accuracy is None
            else (f", right answers from {100 * first.accuracy:.1f} to {100 * last.accuracy:.1f} %")
        )
        losses = f"loss from {first.loss:.4f} to {last.loss:.4f}"
        print(f"{count(last.number, 'epoch')}: {losses}{right}, on the training data.")
    for kind, how in dict.fromkeys((one.kind, one.arithmetic) for one in made.contents.leftovers):
        same = [one for one in made.contents.leftovers if (one.kind, one.arithmetic) == (kind, how)]
        names = listed_names([visible(one.layer or one.name) for one in same], SHOWN)
        print(f"  {kind} {'with integer weights, on floats' if how == 'hybrid' else 'in float'}: {names}")
    print(
        *map(visible, (*made.notes, *made.contents.notes)),
        sep="\n",
        end="\n" if made.notes or made.contents.notes else "",
    )
    print("", made.path, sep="\n")
    print(f"Measure it: {measuring(model, weights, output, calibration_data or train_data)}", file=sys.stderr)


def measuring(model: str, weights: Path | None, output: Path, data: str | None) -> str:
    """The command that measures what was made beside the model.

    >>> measuring("net.py:make", Path("net.pt"), Path("net.onnx"), "val.npz")
    'qvis benchmark --model net.onnx --baseline net.py:make --weights net.pt --data val.npz'
    >>> measuring("net.py:make", Path("net.pt"), Path("net.safetensors"), None)
    'qvis benchmark --model net.py:make --weights net.safetensors --baseline net.py:make --weights-baseline net.pt'
    """
    if output.suffix == ".safetensors":  # weights alone, for which the factory makes the model
        parts = ["--model", model, "--weights", output, "--baseline", model]
        parts += [] if weights is None else ["--weights-baseline", weights]
    else:
        parts = ["--model", output, "--baseline", model, *([] if weights is None else ["--weights", weights])]
    parts += [] if data is None else ["--data", data]
    return shlex.join(["qvis", "benchmark", *map(str, parts)])


def read_bits(typed: str | None) -> int | str | None:
    """A width, or the path of a file of widths."""
    if typed is None:
        return None
    if typed.isascii() and typed.isdecimal():
        return int(typed)
    if not Path(typed).is_file():
        raise BadArgumentError(
            f"--bits: got {typed!r}, expected a width such as 4, or a file that qvis bits --export json=FILE wrote"
        )
    return typed
