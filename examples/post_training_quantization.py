"""Quantize trained models without training them again, and measure what that brought and cost.

    python examples/post_training_quantization.py
    python examples/post_training_quantization.py --frameworks torch --output quantized

For PyTorch it takes the network for handwritten digits that comes with qvis, for Keras it trains one first. Each
becomes 8-bit integers, for which some hundred samples are enough: they tell the ranges of the activations. Then the
files are run in the engines that they are for, beside the float model, on pictures that were held out. The page says
what that brought: ``quantized/torch/benchmark.html`` and ``quantized/keras/benchmark.html``. Beside them lie the models
and the pictures, for ``quantize_model.py`` and ``benchmark.py``.

Needs ``pip install "qvis[quantize,tensorflow]" scikit-learn`` and takes about a minute.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from digits_models import load_data, load_model, save_data

import qvis

WAYS = {
    "torch": (("post_training", "int8.pt2"), ("post_training", "int8.onnx")),
    "keras": (("dynamic_range", "weights.tflite"), ("post_training", "int8.tflite")),
}
"""Methods, and the files that they write."""


def run(framework: str, output: Path, batch_sizes: Sequence[int], keras_epochs: int) -> None:
    """Quantize a model of one framework in each way, and write the page."""
    folder = output / framework
    folder.mkdir(parents=True, exist_ok=True)
    data = load_data(framework)
    save_data(data, folder)
    model = load_model(framework, data, keras_epochs)
    if framework == "keras":
        model.save(folder / "model.keras")

    print(f"\n{framework}")
    files = []
    for method, name in WAYS[framework]:
        calibration = data.train_x if method == "post_training" else None
        made = qvis.quantize(
            model, folder / name, method, calibration_data=calibration, example_inputs=data.train_x[:2]
        )
        files.append(made.path)
        print(f"  {method} to {name}: {made.verdict}")

    found = qvis.benchmark(files, model, data=data.test_x, labels=data.test_y, batch_sizes=batch_sizes)
    print(f"  {found.verdict}")
    print(f"  {found.write(folder).paths['html']}")


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frameworks", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--output", type=Path, default=Path("quantized"), help="the folder to write to")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 32], help="to time (default 1 32)")
    parser.add_argument("--keras-epochs", type=int, default=20, help="of the Keras model's own training (default 20)")
    chosen = parser.parse_args()
    for framework in chosen.frameworks:
        run(framework, chosen.output, chosen.batch_sizes, chosen.keras_epochs)


if __name__ == "__main__":
    main()
