"""Measure models beside a baseline: a script to start from. ``qvis benchmark`` on the command line does the same.

    python examples/benchmark.py --model quantized/keras/int8.tflite --baseline quantized/keras/model.keras \\
        --data quantized/keras/test.npz --report review
    python examples/benchmark.py --model quantized/torch/int8.onnx quantized/torch/int8.pt2 \\
        --baseline qvis.adapters.digits:load_digits_model --data quantized/torch/test.npz --report review

The files under ``quantized/`` come from ``post_training_quantization.py``. The page is ``review/benchmark.html``.
"""

from __future__ import annotations

import argparse

from quantize_model import open_model

import qvis


def main() -> None:
    """Measure them, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", required=True, help=".tflite, .onnx, .pt2, .keras, or module:function")
    parser.add_argument("--baseline", help="what to compare with, usually the float model")
    parser.add_argument("--data", required=True, help="an .npz file with x and y, or a folder of images")
    parser.add_argument("--report", default="qvis-report", help="the folder to write the page to")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=(1, 32))
    parser.add_argument("--calls", type=int, default=50, help="of each model that are timed (default 50)")
    chosen = parser.parse_args()
    found = qvis.benchmark(
        [open_model(one) for one in chosen.model],
        open_model(chosen.baseline) if chosen.baseline else None,
        data=chosen.data,
        batch_sizes=chosen.batch_sizes,
        calls=chosen.calls,
    )
    print(found.verdict)
    for variant in found.variants:
        right = variant.answers.top1 if variant.answers is not None else None
        times = ", ".join(f"{one.median * 1e3:.2f} ms for {one.batch}" for one in variant.latencies)
        print(
            f"  {variant.name}: {variant.parameter_bytes / 1e3:.1f} kB of numbers"
            f"{'' if right is None else f', {right:.1%} right'}, {times or 'not timed: ' + variant.simulated}"
        )
    print(found.write(chosen.report).paths["html"])


if __name__ == "__main__":
    main()
