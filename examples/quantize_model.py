"""Quantize one model: a script to start from. ``qvis quantize`` on the command line does the same.

    python examples/quantize_model.py
    python examples/quantize_model.py --model quantized/keras/model.keras --output model.tflite \\
        --method post_training --calibration-data quantized/keras/train.npz
    python examples/quantize_model.py --model qvis.adapters.digits:load_digits_model --output digits.pt2 \\
        --method quantization_aware --train-data quantized/torch/train.npz --bits 3 --epochs 5

Without options it quantizes the network for handwritten digits that comes with qvis, to ``digits.onnx``. The files
under ``quantized/`` come from ``post_training_quantization.py``.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

import qvis
from qvis.adapters.digits import load_digits_samples

MODEL = "qvis.adapters.digits:load_digits_model"


def open_model(spec: str) -> Any:
    """What ``module:function`` returns; the path of a file stays one."""
    module, _, name = spec.rpartition(":")
    if all(part.isidentifier() for part in module.split(".")):
        return getattr(import_module(module), name)()
    return spec


def main() -> None:
    """Quantize it, and say what is in the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="a .pt2, .keras, .h5 or .onnx file, or module:function")
    parser.add_argument("--output", default="digits.onnx", help=".pt2, .safetensors, .onnx or .tflite")
    parser.add_argument("--method", default="post_training", help="such as weight_only or quantization_aware")
    parser.add_argument("--calibration-data", help="an .npz file with x, or a folder of images")
    parser.add_argument("--train-data", help="an .npz file with x and y, or a folder with one folder for each class")
    parser.add_argument("--bits", type=int, help="of weights")
    parser.add_argument("--exclude", nargs="*", default=(), help="layers to leave in float")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    chosen = parser.parse_args()
    calibration = chosen.calibration_data
    if chosen.model == MODEL and chosen.method == "post_training" and calibration is None:
        calibration, _ = load_digits_samples()
    made = qvis.quantize(
        open_model(chosen.model),
        chosen.output,
        chosen.method,
        calibration_data=calibration,
        train_data=chosen.train_data,
        bits=chosen.bits,
        exclude=chosen.exclude,
        epochs=chosen.epochs,
        learning_rate=chosen.learning_rate,
    )
    print(made.verdict)
    for note in made.notes:
        print(note)
    for operation in made.contents.leftovers:
        print(f"  in float: {operation.layer or operation.name} ({operation.kind})")
    print(made.path)


if __name__ == "__main__":
    main()
