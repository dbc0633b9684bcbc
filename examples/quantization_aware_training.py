"""Train models with rounding in place, and see where that brings more than quantizing them afterwards.

    python examples/quantization_aware_training.py
    python examples/quantization_aware_training.py --frameworks keras --bits 3 --epochs 10

For PyTorch it takes the network for handwritten digits that comes with qvis, for Keras it trains one first. Each is
quantized at 8 bits and at 2, once after its training and once with some epochs of training more, in which weights and
activations are rounded as they will be. All four are run in their engine on pictures that were held out.

**At 8 bits expect no gain**: rounding after training loses next to nothing there, and no training can win back more
than was lost. At 2 bits it is what makes the model usable. The page has all of them beside the float model:
``trained/torch/benchmark.html`` and ``trained/keras/benchmark.html``.

Needs ``pip install "qvis[quantize,tensorflow]" scikit-learn`` and takes about two minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from digits_models import load_data, load_model

import qvis

SUFFIXES = {"torch": ".pt2", "keras": ".tflite"}
LEARNING_RATE, BATCH_SIZE = 1e-3, 64


def run(framework: str, output: Path, bits: Sequence[int], epochs: int, keras_epochs: int) -> None:
    """Quantize a model of one framework with training and without, and write the page."""
    folder = output / framework
    folder.mkdir(parents=True, exist_ok=True)
    data = load_data(framework)
    model = load_model(framework, data, keras_epochs)

    print(f"\n{framework}")
    files, names = [], ["float"]
    for width in bits:
        # with no epoch at all it is post-training quantization, of exactly the same grids
        for more, name in ((0, "after training"), (epochs, "with training")):
            made = qvis.quantize(
                model,
                folder / f"{width}_bits_{more}_epochs{SUFFIXES[framework]}",
                "quantization_aware",
                train_data=(data.train_x, data.train_y),
                bits=width,
                epochs=more,
                learning_rate=LEARNING_RATE,
                batch_size=BATCH_SIZE,
            )
            files.append(made.path)
            names.append(f"{width} bits, {name}")

    found = qvis.benchmark(
        files, model, data=data.test_x, labels=data.test_y, names=names, batch_sizes=[1], memory=False
    )
    for variant in found.variants:
        right = variant.answers.top1 if variant.answers is not None else None
        print(f"  {variant.name:24} {'' if right is None else f'{right:6.1%} right'}")
    gains = [
        (after.answers.top1 - before.answers.top1, before.name.partition(",")[0])
        for before, after in zip(found.variants[1::2], found.variants[2::2], strict=True)
        if before.answers and after.answers and before.answers.top1 is not None and after.answers.top1 is not None
    ]
    for gain, width in gains:
        text = (
            f"training gains {100 * gain:.1f} points"
            if gain > 0.01
            else "training gains nothing that could not be chance"
        )
        print(f"  At {width} {text}.")
    print(f"  {found.verdict}")
    print(f"  {found.write(folder).paths['html']}")


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frameworks", nargs="+", choices=list(SUFFIXES), default=list(SUFFIXES))
    parser.add_argument("--output", type=Path, default=Path("trained"), help="the folder to write to")
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 2], help="of weights (default 8 2)")
    parser.add_argument("--epochs", type=int, default=4, help="of training (default 4)")
    parser.add_argument("--keras-epochs", type=int, default=20, help="of the Keras model's own training (default 20)")
    chosen = parser.parse_args()
    for framework in chosen.frameworks:
        run(framework, chosen.output, chosen.bits, chosen.epochs, chosen.keras_epochs)


if __name__ == "__main__":
    main()
