"""Whether the damage that is predicted for each layer is the damage that is done, on models that were really trained.

    python benchmarks/verdicts.py
    python benchmarks/verdicts.py --data FOLDER --models digits resnet56 --samples 64

Trains some models on first use and keeps them. For each model, every layer's weights and inputs are rounded to each
width, one layer at a time, as ``qvis.sensitivity(..., measure="all")`` does it, and the damage to the output is
compared with what was predicted from some backward passes.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from math import nan
from typing import Any

import numpy as np
from numpy.typing import NDArray
from trained import Subject
from trained.command import Script, make_parser

from qvis import adapters
from qvis.analysis.preparing import place, prepare, spread_passes
from qvis.analysis.study import Change, Study, power, rank_correlation
from qvis.data import load_batches, split
from qvis.layers import FloatArray, decibels
from qvis.noise import WeightGrid
from qvis.running import Batch, Grid, Runner, silently

BITS = (8, 6, 4, 3, 2)
"""All that are predicted and measured, as by default; the tables show the first three."""
SHOWN = (8, 6, 4)
GRIDS = tuple(WeightGrid(bits, one) for bits in BITS for one in ("tensor", "channel"))
STRETCH = 0.08
"""One rounding is one draw of its noise: another is had by a step of each layer that is larger by up to this share."""
SEED = 0
BAR, COST = 0.9, 0.1
"""What is asked of the rank correlation and of the cost, relative to measuring."""
LIMIT = 0.01
"""A layer is a problem when rounding it alone changes the output by more than this share of its power."""

Floats = NDArray[np.float64]
Key = tuple[str, int]
"""``tensor``, ``channel`` or ``inputs``, and bits."""
TITLES = {"tensor": "weights, tensor", "channel": "weights, channel", "inputs": "inputs"}
COLUMNS: tuple[Key, ...] = tuple((what, bits) for what in ("tensor", "channel", "inputs") for bits in SHOWN)


@dataclass
class Finding:
    """What was found about one model."""

    name: str
    note: str
    layers: int
    samples: int
    passes: int = 0
    ranking: dict[str, dict[Key, float]] = field(default_factory=dict)
    """Spearman's rank correlation with the measured damage, by what ranks the layers."""
    errors: dict[str, dict[Key, float]] = field(default_factory=dict)
    """By how much one damage of a layer is off the measured one, up or down, in half of the layers: 0.1 is 10 %."""
    totals: dict[Key, tuple[float, float, float]] = field(default_factory=dict)
    """All layers at once, in dB: predicted, the mean of the draws measured, and their standard deviation."""
    worst: dict[Key, tuple[str, str]] = field(default_factory=dict)
    """The layer predicted to be the worst, and the one that is."""
    problems: dict[Key, tuple[int, int, int]] = field(default_factory=dict)
    """Layers called a problem, those of them that cost more than 1 %, and those that do and were not called one."""
    flagged: int = 0
    """Layers with a channel that its relative range flags."""
    rightly: int = 0
    """Those of them that cost more than 1 % at 8 bits."""
    predicting: float = nan
    measuring: float = nan
    """Seconds of processor time, which other programs disturb less than the time on the clock."""
    figures: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Of each layer, predicted and measured."""


# ---------------------------------------------------------------------------------------------------------------------
# Predicting and measuring


def examine(subject: Subject, samples: int, probes: int, draws: int) -> Finding:
    """Predict, measure, compare."""
    batches = load_batches(subject.inputs, samples=samples)
    with quietly():
        example = split(batches[0], 2)[0]
        ready = prepare(subject.model, example=example)
        runner = adapters.runner(subject.model, ready.network)
        # before the normalizations are folded: their statistics say what inputs to make up
        made = runner.imitate(example, samples, SEED)[0] if hasattr(runner, "imitate") else []
        ready = place(ready, subject.model, runner, batches[0])
        warm_up(runner, batches, probes)
    study = Study(ready.network, runner, batches, GRIDS, silently)
    found = Finding(subject.name, subject.note, len(study.layers), study.samples)

    began = time.process_time()
    predicted, found.passes = predict(study, probes)
    found.predicting = time.process_time() - began
    began = time.process_time()
    measured = measure(study)
    found.measuring = time.process_time() - began

    rankings = {"qvis": predicted}
    if made:
        rankings["qvis without data"] = predict(Study(ready.network, runner, made, GRIDS, silently), probes)[0]
    ranges, flags = relative_ranges(study)
    seen = np.array([name in study.entering for name in study.weights])
    rankings["relative range"] = {key: ranges[seen] if key[0] == "inputs" else ranges for key in measured}
    rankings["outlier count"] = {key: flags[seen] if key[0] == "inputs" else flags for key in measured}
    rankings["weight SQNR"] = {key: weight_noise(study, key) for key in measured if key[0] != "inputs"}
    # how far two roundings agree, each of which is one draw: who knew the mean of all draws could hardly do better
    rankings["another rounding"] = measure_stretched(study)
    compare(found, study, rankings, measured)
    flagged = flags > 0
    found.flagged, found.rightly = int(flagged.sum()), int((flagged & (measured["tensor", 8] > LIMIT)).sum())
    for key in COLUMNS:
        totals = [decibels(1.0, float(one)) for one in all_at_once(study, key, draws)]
        found.totals[key] = (decibels(1.0, float(predicted[key].sum())), float(np.mean(totals)), float(np.std(totals)))
    return found


def compare(
    found: Finding, study: Study, rankings: Mapping[str, Mapping[Key, Floats]], measured: Mapping[Key, Floats]
) -> None:
    """Note how well each ranking of the layers agrees with what was measured, and what was predicted of each layer."""
    for name, ranking in rankings.items():
        found.ranking[name] = {
            key: rank_correlation(ranking[key], measured[key]) if key in ranking else nan for key in COLUMNS
        }
    for name in ("qvis", "another rounding"):
        found.errors[name] = {key: typical_error(rankings[name][key], measured[key]) for key in COLUMNS}
    for key in COLUMNS:
        names = entered(study) if key[0] == "inputs" else [*study.weights]
        predicted, real = rankings["qvis"][key], measured[key]
        found.worst[key] = (names[int(predicted.argmax())], names[int(real.argmax())])
        found.problems[key] = judged(predicted, real)
        pairs = zip(names, predicted.tolist(), real.tolist(), strict=True)
        found.figures[" ".join(map(str, key))] = {name: [p, m] for name, p, m in pairs}


def warm_up(runner: Runner, batches: Sequence[Batch], probes: int) -> None:
    """What happens once, such as compiling, counts for neither side."""
    runner.run(batches[0])
    if runner.differentiable:
        passes = spread_passes(batches, probes, SEED)
        for _ in runner.differentiate(passes[0], lambda outputs: [np.ones_like(one) for one in outputs]):
            pass


@contextmanager
def quietly() -> Iterator[None]:
    """Without what frameworks warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def predict(study: Study, probes: int) -> tuple[dict[Key, Floats], int]:
    """The damage of each layer on each grid, from backward passes, and how many these were."""
    study.calibrate()
    outcome = study.differentiate(spread_passes(study.batches, probes, SEED), SEED)
    weights, (names, inputs) = study.predict_weights(), study.predict_inputs()
    table = {(grid.granularity, grid.bits): weights.damage[:, i] for i, grid in enumerate(study.grids)}
    order = [names.index(name) for name in entered(study)]
    return table | {("inputs", bits): inputs.damage[order, i] for i, bits in enumerate(study.bits)}, outcome.passes


def entered(study: Study) -> list[str]:
    """The layers whose inputs were seen, in the model's order; nothing enters a table."""
    return [name for name in study.weights if name in study.entering]


def measure(study: Study) -> dict[Key, Floats]:
    """The same by rounding each layer by itself."""
    changes = [Change({layer.name: grid}) for grid in study.grids for layer in study.layers]
    for i in range(len(study.bits)):
        changes += [Change(inputs={name: study.entering[name].grids[i]}) for name in entered(study)]
    values = iter(study.measure(changes))
    table = {(grid.granularity, grid.bits): np.array([next(values) for _ in study.layers]) for grid in study.grids}
    return table | {("inputs", bits): np.array([next(values) for _ in study.entering]) for bits in study.bits}


def measure_stretched(study: Study) -> dict[Key, Floats]:
    """Rounding each layer by itself with another step, for the widths that are shown."""
    found: dict[Key, Floats] = {}
    generator = np.random.default_rng(SEED)
    for key in COLUMNS:
        names = entered(study) if key[0] == "inputs" else [*study.weights]
        stretch = {name: 1 + STRETCH * generator.uniform(0.5, 1) for name in names}
        found[key] = damages(study, [stretched(study, key, {name: stretch[name]}) for name in names])
    return found


def all_at_once(study: Study, key: Key, draws: int) -> Floats:
    """The damage of all layers rounded at once, once for each draw of the rounding."""
    generator = np.random.default_rng(SEED)
    names = entered(study) if key[0] == "inputs" else [*study.weights]
    each = [{name: 1 + STRETCH * generator.random() for name in names} for _ in range(draws)]
    return damages(study, [stretched(study, key, stretch) for stretch in each])


def stretched(study: Study, key: Key, stretch: Mapping[str, float]) -> dict[str, Any]:
    """What :meth:`Runner.run` takes to round these layers with larger steps."""
    what, bits = key
    if what == "inputs":
        index = study.bits.index(bits)
        return {"grids": {name: grid_of(study.entering[name].grids[index], by) for name, by in stretch.items()}}
    weights = {name: rounded(study.weights[name], bits, what == "channel", by) for name, by in stretch.items()}
    return {"weights": weights}


def damages(study: Study, changes: Sequence[Mapping[str, Any]]) -> Floats:
    """The power of what each change does to the outputs, relative to theirs, (changes,)."""
    noise, used = np.zeros(len(changes)), study.power > 0
    for batch in study.batches:
        exact = study.runner.run(batch)
        for index, change in enumerate(changes):
            pairs = zip(study.runner.run(batch, **change), exact, strict=True)
            moved = np.array([power(after.astype(np.float64) - before) for after, before in pairs])
            noise[index] += float((moved[used] / study.power[used]).mean())
    return noise / study.samples


def rounded(weight: FloatArray, bits: int, by_channel: bool, stretch: float) -> FloatArray:
    """Weights (channels, elements) on a symmetric grid with a step ``stretch`` times as large as it need be."""
    largest = np.abs(weight).max(axis=1 if by_channel else None, keepdims=True)
    step = stretch * largest / (2 ** (bits - 1) - 1)
    result: FloatArray = (np.rint(weight / np.where(step > 0, step, 1)) * step).astype(weight.dtype)
    return result


def grid_of(grid: Grid, stretch: float) -> Grid:
    """The grid with a larger step."""
    return replace(grid, step=grid.step * stretch)


# ---------------------------------------------------------------------------------------------------------------------
# What else is said to tell which layers suffer


def relative_ranges(study: Study) -> tuple[Floats, NDArray[np.bool_]]:
    """The largest relative range of each layer, and how many of its channels AIMET's rule flags.

    A channel's range over the smallest one of the layer; one above Q3 + 1.5 IQR of the layer's is flagged.
    """
    largest, flagged = [], []
    for weight in study.weights.values():
        ranges = np.ptp(weight.astype(np.float64), axis=1)
        # the smallest that is not zero, without which there would be nothing to rank by
        relative = ranges / min(ranges[ranges > 0], default=1.0)
        low, high = np.quantile(relative, (0.25, 0.75))
        largest.append(float(relative.max()))
        flagged.append(int((relative > high + 1.5 * (high - low)).sum()))
    return np.array(largest), np.array(flagged)


def weight_noise(study: Study, key: Key) -> Floats:
    """The noise in each layer's weights relative to them: the less of it, the higher their SQNR."""
    what, bits = key
    found = []
    for weight in study.weights.values():
        error = rounded(weight, bits, what == "channel", 1.0).astype(np.float64) - weight
        found.append(power(error) / (power(weight) or 1.0))
    return np.array(found)


def typical_error(some: Floats, others: Floats) -> float:
    """See :attr:`Finding.errors`; layers that do not matter at all are left out."""
    both = (some > 0) & (others > 0)
    return float(np.expm1(np.median(np.abs(np.log(some[both] / others[both]))))) if both.any() else nan


def judged(predicted: Floats, measured: Floats) -> tuple[int, int, int]:
    """See :attr:`Finding.problems`."""
    called, real = predicted > LIMIT, measured > LIMIT
    return int(called.sum()), int((called & real).sum()), int((real & ~called).sum())


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def describe(found: Finding) -> str:
    """The findings about a model in words and numbers."""
    head = "".join(f"{TITLES[what]:>{8 * len(SHOWN)}}" for what in TITLES)
    lines = [
        f"{found.name}: {found.layers} layers, {found.samples} samples, {found.passes} backward passes; {found.note}",
        f"  {'':25}{head}",
        f"  {'bits':25}{''.join(f'{bits:8}' for _, bits in COLUMNS)}",
    ]

    def row(name: str, cells: Iterable[str]) -> None:
        lines.append(f"  {name:25}{''.join(f'{cell:>8}' for cell in cells)}")

    for name, by_key in found.ranking.items():
        row(name, (number(by_key[key]) for key in COLUMNS))
    for name, errors in found.errors.items():
        row(f"{name}, off by", (f"{errors[key]:.0%}" for key in COLUMNS))
    row("worst layer found", ("yes" if len({*found.worst[key]}) == 1 else "no" for key in COLUMNS))
    row("problems right/called", (f"{right}/{called}" for called, right, _ in (found.problems[key] for key in COLUMNS)))
    row("problems missed", (str(found.problems[key][2]) for key in COLUMNS))
    row("total predicted dB", (f"{found.totals[key][0]:.1f}" for key in COLUMNS))
    row("total measured dB", (f"{found.totals[key][1]:.1f}" for key in COLUMNS))
    row("  +/- over draws", (f"{found.totals[key][2]:.1f}" for key in COLUMNS))
    share = found.measuring / found.predicting
    lines.append(
        f"  processor time: predicting {found.predicting:.1f} s, measuring {found.measuring:.1f} s, {share:.0f}x"
    )
    lines.append(
        f"  relative ranges flag {found.flagged} layers, {found.rightly} of which cost more than {LIMIT:.0%} at 8 bits"
    )
    return "\n".join(lines)


def number(value: float) -> str:
    """A rank correlation."""
    return "-" if value != value else f"{value:.2f}"


def summarize(findings: Sequence[Finding]) -> str:
    """The bars, and where they are missed."""
    lines = []
    for found in findings:
        missed = [f"{TITLES[w]} {b} ({v:.2f})" for (w, b), v in found.ranking["qvis"].items() if v < BAR]
        share = found.predicting / found.measuring
        cost = f"{share:.0%} of the cost of measuring" + (f" (bar: {COST:.0%})" if share > COST else "")
        lines.append(f"{found.name:16}{'below 0.90: ' + ', '.join(missed) if missed else 'all 0.90 or more'}; {cost}")
    return "\n".join(lines)


def main() -> None:
    """Print the tables."""
    parser = make_parser(__doc__, samples=32, figures=True)
    parser.add_argument("--probes", type=int, default=4, help="how often each is differentiated (default 4)")
    parser.add_argument("--draws", type=int, default=8, help="roundings of all layers at once (default 8)")
    script = Script(parser)
    chosen = script.chosen
    findings: list[Finding] = []
    with quietly():
        for subject in script.subjects():
            findings.append(examine(subject, chosen.samples, chosen.probes, chosen.draws))
            script.show(describe(findings[-1]) + "\n")
    script.show(summarize(findings))
    script.write([plain(asdict(found)) for found in findings])


def plain(value: Any) -> Any:
    """The value with keys that JSON takes."""
    if isinstance(value, dict):
        return {key if isinstance(key, str) else f"{key[0]} {key[1]}": plain(one) for key, one in value.items()}
    return value


if __name__ == "__main__":
    main()
