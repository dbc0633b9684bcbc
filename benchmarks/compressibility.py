"""Whether a smaller layer does the damage that is predicted, on models that were really trained.

    python benchmarks/compressibility.py
    python benchmarks/compressibility.py --data FOLDER --models digits resnet56 --scores 200

Predicts size against damage for every layer and every way to make it smaller, as ``qvis.compressibility`` does, makes
the most promising changes for real, and prints by how many dB the predictions are off, apart for what keeps more than
20 dB, 10 to 20 dB, and less.
"""

from __future__ import annotations

import time
import warnings
from itertools import islice

import numpy as np
from trained import Subject
from trained.command import Script, make_parser

import qvis
from qvis.analysis.sizes import METHODS, Compressibility, kept_db
from qvis.analysis.study import rank_correlation

KEPT = ((20.0, 99.0), (10.0, 20.0), (-99.0, 10.0))
"""dB kept, measured."""


def examine(subject: Subject, samples: int, scores: int) -> str:
    """Predict, measure, compare."""
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = qvis.compressibility(subject.model, subject.inputs, labels=subject.labels, samples=samples)
        predicting = time.process_time() - began
        for _ in islice(found.measure(), scores):
            pass
    measuring = time.process_time() - began - predicting
    head = f"{subject.name}: {len(found.layers)} layers, {found.samples} samples, {found.passes} backward passes"
    lines = [f"{head}; {subject.note}", f"  {found.verdict}"]
    lines += describe_together(found)
    lines.append(f"  {'one layer smaller':26}{'keeps':>12}{'scores':>8}{'off by':>9}{'bias':>8}{'90 %':>7}{'ranks':>8}")
    for method, title in METHODS.items():
        lines += describe_method(found, method, title)
    lines.append(
        f"  processor time: predicting {predicting:.0f} s, measuring {len(found.scores)} scores {measuring:.0f} s"
    )
    return "\n".join(lines)


def describe_together(found: Compressibility) -> list[str]:
    """All layers at once: how much is left, and the dB kept."""
    lines = []
    for one in sorted(found.scores, key=lambda one: -one.trial.share):
        if one.trial.all_layers:
            kept = f"{kept_db(one.trial.predicted):.1f} dB predicted, {kept_db(one.damage):.1f} measured"
            right = "" if np.isnan(one.accuracy) else f", {100 * one.accuracy:.1f} % right"
            lines.append(f"  all layers in {100 * one.trial.share:.0f} % of the bytes: {kept}{right}")
    return lines


def describe_method(found: Compressibility, method: str, title: str) -> list[str]:
    """By how many dB a method's predictions are off; above zero the layer did better on paper."""
    pairs = [(kept_db(one.trial.predicted), kept_db(one.damage)) for one in found.scores if one.trial.method == method]
    table = np.array([pair for pair in pairs if np.isfinite(pair).all()]).reshape(-1, 2)
    lines = []
    for low, high in KEPT:
        part = table[(table[:, 1] >= low) & (table[:, 1] < high)]
        if len(part) < 3:
            continue
        off = part[:, 0] - part[:, 1]
        kept = f"above {low:.0f}" if high == 99 else f"below {high:.0f}" if low == -99 else f"{low:.0f} to {high:.0f}"
        figures = f"{np.median(np.abs(off)):6.1f} dB{np.median(off):+8.1f}{np.quantile(np.abs(off), 0.9):7.1f}"
        lines.append(f"  {title:26}{kept:>12}{len(part):8}{figures}{rank_correlation(part[:, 0], part[:, 1]):8.2f}")
    return lines


def main() -> None:
    """Print the tables."""
    parser = make_parser(__doc__, samples=32)
    parser.add_argument("--scores", type=int, default=300, help="measured of each model, the best (default 300)")
    script = Script(parser)
    for subject in script.subjects():
        script.show(examine(subject, script.chosen.samples, script.chosen.scores) + "\n")
    script.write()


if __name__ == "__main__":
    main()
