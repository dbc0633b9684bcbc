"""Measure what a few bits cost the model that comes with qvis when one layer is rounded, for ``qvis image``.

    python examples/measure_layers.py --output qvis/models/digits_layers.npz

For two layers, every other one left as it is: the numbers of :data:`BITS`, on the grids of :data:`GRIDS`. The pictures
are the 128 that come with the model. Needs ``pip install "qvis[torch]"``; a test measures the same anew.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvis.adapters.digits import load_digits_model, load_digits_samples
from qvis.analysis.preparing import open_model
from qvis.analysis.study import Study
from qvis.layers import FloatArray
from qvis.quantization.grids import Scheme
from qvis.running import silently

LAYERS = ("head.conv", "blocks.0.depthwise")
"""An ordinary one, and one whose channels differ in size, once normalizations are folded in."""
BITS = (8, 6, 4, 3, 2, 1)
GRIDS = ("tensor", "channel", "codebook", "sign")
"""Even steps with one range, the same for each channel, a learned codebook for the whole layer, and the sign of each
weight times the mean size of its channel, which is 1 bit whatever the bits."""


def round_to(weight: FloatArray, grid: str, bits: int) -> FloatArray:
    """A weight (channels, elements) on one of the :data:`GRIDS`."""
    if grid == "sign":
        return np.where(weight < 0, -1, 1) * np.abs(weight).mean(axis=1, keepdims=True)
    kind, granularity = ("kmeans", "tensor") if grid == "codebook" else ("offset", grid)
    return Scheme(kind, bits, granularity).fit(weight.astype(np.float64)).rounded()


def measure(layers: tuple[str, ...] = LAYERS, bits: tuple[int, ...] = BITS) -> dict[str, NDArray[Any]]:
    """Weights and names of the layers; what each grid costs in dB kept, and how many digits are read right.

    ``db`` and ``right`` are (layers, grids, bits); ``right_before`` is that of the model as it is.
    """
    pictures, digits = load_digits_samples()
    opened = open_model(load_digits_model(), pictures, None, samples=len(pictures))
    study = Study(opened.ready.network, opened.runner, opened.batches, [], silently)
    study.calibrate(locally=False)

    def run(**weights: FloatArray) -> list[FloatArray]:
        return [
            np.concatenate(one) for one in zip(*(study.runner.run(b, **weights) for b in study.batches), strict=True)
        ]

    exact = run()
    found: dict[str, NDArray[Any]] = {
        "names": np.array(layers),
        "bits": np.array(bits),
        "grids": np.array(GRIDS),
        "samples": np.array(len(digits)),
        "right_before": np.array((exact[0].argmax(axis=1) == digits).sum()),
        "db": np.zeros((len(layers), len(GRIDS), len(bits)), dtype=np.float32),
        "right": np.zeros((len(layers), len(GRIDS), len(bits)), dtype=np.int32),
    }
    for one, name in enumerate(layers):
        weight = study.weights[name]
        found[f"weight_{one}"] = weight.astype(np.float32)
        for two, grid in enumerate(GRIDS):
            for three, width in enumerate(bits):
                rounded = round_to(weight, grid, width).astype(weight.dtype)
                outputs = run(weights={name: rounded})
                damage = study.relative_noise(outputs, exact) / study.samples
                found["db"][one, two, three] = -10 * np.log10(damage)
                found["right"][one, two, three] = (outputs[0].argmax(axis=1) == digits).sum()
    return found


def main() -> None:
    """Write the file, and say what it holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="qvis/models/digits_layers.npz")
    arguments = parser.parse_args()
    found = measure()
    np.savez_compressed(arguments.output, **found)
    for one, name in enumerate(found["names"]):
        print(f"{name}, weights {found[f'weight_{one}'].shape}")
        for two, grid in enumerate(found["grids"]):
            cells = zip(found["bits"], found["db"][one, two], found["right"][one, two], strict=True)
            print(f"  {grid:9}", *(f"{bits}: {db:5.1f} dB {right:3}" for bits, db, right in cells))
    print(f"{found['right_before']} of {found['samples']} read right before")


if __name__ == "__main__":
    main()
