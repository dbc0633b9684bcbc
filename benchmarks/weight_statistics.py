"""How fast qvis describes the channels of a model, against one pass of ``np.max`` and one of ``np.sort``.

    .venv/bin/python benchmarks/weight_statistics.py

All are given the same matrices, the Linear layers of BERT-base with random weights, and take turns; the ratios of the
best of several rounds are printed. ``np.max`` and ``np.sort`` run on one core, as they come.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import pandas as pd

from qvis.analysis import analyze_network
from qvis.analysis.blocks import pool
from qvis.analysis.statistics import channel_statistics
from qvis.layers import FloatArray, Layer, Network

SHAPES = 12 * ([(768, 768)] * 4 + [(3072, 768), (768, 3072)]) + [(768, 768)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured (default 5)")
    rounds = parser.parse_args().rounds
    random = np.random.default_rng(0)
    weights = [random.standard_normal(shape, dtype=np.float32) for shape in SHAPES]

    def describe(quartiles: bool) -> None:
        with pool() as workers:
            for weight in weights:
                channel_statistics(weight, quartiles=quartiles, pool=workers)

    network = Network("BERT-base", "NumPy", tuple(_layer(i, weight) for i, weight in enumerate(weights)))
    work: dict[str, Callable[[], object]] = {
        "np.max": lambda: [weight.max() for weight in weights],
        "np.sort along rows": lambda: [np.sort(weight, axis=1) for weight in weights],
        "qvis without quartiles": lambda: describe(False),
        "qvis with quartiles": lambda: describe(True),
        "qvis, whole analysis": lambda: analyze_network(network),
    }
    best = dict.fromkeys(work, float("inf"))
    for _ in range(rounds):
        for name, function in work.items():
            start = time.perf_counter()
            function()
            best[name] = min(best[name], time.perf_counter() - start)
    some = weights[:2]
    start = time.perf_counter()
    for weight in some:
        pd.DataFrame(weight.T).describe()
    share = sum(weight.size for weight in some) / sum(weight.size for weight in weights)
    best["pandas describe (extrapolated from 2 layers)"] = (time.perf_counter() - start) / share

    gigabytes = sum(weight.nbytes for weight in weights) / 1e9
    print(f"{gigabytes:.2f} GB of float32 in {len(weights)} layers, best of {rounds}")
    print(f"{'':46}{'ms':>8}{'GB/s':>8}{'x np.max':>10}{'x np.sort':>11}")
    for name, seconds in best.items():
        ratios = f"{seconds / best['np.max']:10.1f}{seconds / best['np.sort along rows']:11.2f}"
        print(f"{name:46}{1000 * seconds:8.0f}{gigabytes / seconds:8.2f}{ratios}")
    print("bars: without quartiles at most 3 x np.max; with quartiles at most 1 x np.sort")


def _layer(index: int, weight: FloatArray) -> Layer:
    return Layer(f"layer.{index}", "Linear", weight.shape, "float32", lambda: weight)


if __name__ == "__main__":
    main()
