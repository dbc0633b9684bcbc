"""Whether the damage that is predicted for each grid is the damage that is done, and how long a comparison takes.

    python benchmarks/grids.py --data FOLDER --models resnet56 mobilenet
    python benchmarks/grids.py --models mobilenet --layers 12

For each model every default grid is predicted for all layers from some backward passes, as ``qvis.compare_grids`` does
it. Then all layers are rounded to each grid at once, and some layers alone, and the damage to the output is compared
with what was predicted.
"""

from __future__ import annotations

import time

import numpy as np
from trained import Subject
from trained.command import Script, make_parser

from qvis.analysis.gridding import find_grids
from qvis.analysis.preparing import open_model
from qvis.analysis.schemes import default_schemes
from qvis.analysis.study import Study, rank_correlation
from qvis.layers import FloatArray
from qvis.noise import WeightGrid
from qvis.running import silently

SEVERE = 0.3
"""Beyond this damage a prediction of first order says no more than that."""
ALONE = (
    "4-bit uniform, per channel",
    "4-bit uniform, per channel, mse",
    "4-bit kmeans, per tensor",
    "8-bit uniform, per tensor",
)
"""Grids whose damage to single layers is measured."""


def examine(subject: Subject, samples: int, layers: int) -> str:
    """Predict, measure, tell."""
    opened = open_model(subject.model, subject.inputs, None, samples=samples)
    began = time.process_time()
    found = find_grids(opened.ready, default_schemes(), opened=opened, progress=iter, track=silently)
    lines = [
        f"{subject.name}: {len(found.layers)} layers, {opened.source}, {found.passes} passes",
        f"  comparing {len(found.schemes)} grids took {time.process_time() - began:.0f} s of processor time",
    ]
    study = Study(opened.ready.network, opened.runner, opened.batches, [WeightGrid(8, "channel")], silently)
    study.calibrate(locally=False)
    exact = [study.runner.run(batch) for batch in study.batches]
    known = {layer.name: place for place, layer in enumerate(found.layers)}

    def measure(place: int, names: list[str]) -> float:
        rounded = {name: found.schemes[place].fit(study.weights[name]).rounded() for name in names}
        noise = [
            study.relative_noise(study.runner.run(batch, weights=rounded), outputs)
            for batch, outputs in zip(study.batches, exact, strict=True)
        ]
        return float(sum(noise)) / study.samples

    everything = [name for name in study.weights if name in known]
    predicted = np.array([one.damage.predicted for one in found.totals])
    measured = np.array([measure(place, everything) for place in range(len(found.schemes))])
    lines.append(tell("all layers at once", predicted, measured))
    chosen = everything[:: max(1, len(everything) // layers)]
    for label in ALONE:
        place = found.labels.index(label)
        alone = np.array([measure(place, [name]) for name in chosen])
        told = np.array([found.layers[known[name]].results[place].damage.predicted for name in chosen])
        lines.append(tell(f"{len(chosen)} layers alone, {label}", told, alone))
    return "\n".join(lines)


def tell(what: str, predicted: FloatArray, measured: FloatArray) -> str:
    """How far predictions are off, as factors, and how well they rank."""
    usable = (predicted > 0) & (measured > 0) & (measured < SEVERE)
    if not usable.any():
        return f"  {what}: all damages are severe or none"
    factors = predicted[usable] / measured[usable]
    off = np.exp(np.abs(np.log(factors)))
    return (
        f"  {what}: {usable.sum()} of {len(usable)} below {100 * SEVERE:.0f} %; predicted / measured: median"
        f" {np.median(factors):.2f}, from {factors.min():.2f} to {factors.max():.2f}; off by {np.median(off):.2f} times"
        f" in half of them; Spearman's {rank_correlation(predicted[usable], measured[usable]):.2f}"
    )


def main() -> None:
    """Run from the command line."""
    parser = make_parser(__doc__, models=("digits", "mobilenet"), samples=64)
    parser.add_argument("--layers", type=int, default=12, help="so many layers are rounded alone (default 12)")
    script = Script(parser)
    for subject in script.subjects():
        script.show(examine(subject, script.chosen.samples, script.chosen.layers) + "\n")
    script.write()


if __name__ == "__main__":
    main()
