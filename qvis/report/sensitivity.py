"""The part of a summary that tells what quantization does to the output of the model; plain values, as all of it."""

from __future__ import annotations

from math import nan
from typing import Any

import numpy as np

from qvis.analysis.calibration import METHODS, Candidate, candidates, coarse
from qvis.analysis.damage import Damage, Draws, LayerSensitivity, Sensitivity
from qvis.excluding import TITLES, TOOLS, find_setting
from qvis.layers import Analysis, FloatArray, LayerAnalysis, Thresholds, decibels
from qvis.noise import Granularity, Histogram
from qvis.words import count, is_are, listed_names, percent, visible

BARS = 64
"""Of a histogram in a summary."""

Document = dict[str, Any]


def summarize_sensitivity(analysis: Analysis) -> Document | None:
    """What is known of the whole model; None where nothing was run."""
    known = analysis.sensitivity
    if known is None:
        return None
    return {
        "evidence": known.evidence,
        "samples": known.samples,
        "passes": known.passes,
        "settled": known.settled,
        "agreement": significant(known.agreement, 3),
        "loss": known.loss,
        "bits": list(known.bits),
        "granularities": list(known.granularities),
        "judged": known.granularities[0],
        "predicted_total": {
            one: [significant(known.predicted_total(bits, one)) for bits in known.bits] for one in known.granularities
        },
        "total": {one: _draws([known.total[bits, one] for bits in known.bits]) for one in known.granularities},
        "total_inputs": _draws([known.total_inputs[bits] for bits in known.bits]),
        "total_both": {
            one: _draws([known.total_both[bits, one] for bits in known.bits]) for one in known.granularities
        },
        "total_spread_db": {
            one: [significant(known.total[bits, one].spread_db, 2) for bits in known.bits]
            for one in known.granularities
        },
        "operations": sum(layer.operations for layer in known.layers),
        "notes": list(known.notes),
        "methods": METHODS,
    }


def _draws(found: list[Draws]) -> list[float]:
    return [significant(one.mean) for one in found]


def summarize_layer(layer: LayerAnalysis, analysis: Analysis) -> Document | None:
    """What is known of one layer; None where it was not run."""
    known, result = analysis.sensitivity, layer.sensitivity
    if known is None or result is None:
        return None
    total = sum(one.operations for one in known.layers)
    judged = result.damage(analysis.bits, known.granularities[0])
    entering = result.damage(analysis.bits, what="inputs")
    return {
        "damage": significant(judged.value),
        "damage_db": significant(decibels(1.0, judged.value)),
        "spread": significant(judged.spread, 2),
        "confidence": judged.confidence,
        "damage_inputs": significant(entering.value),
        "weights": {one: _figures(result, known, one) for one in known.granularities},
        "inputs": _columns([result.damage(bits, what="inputs") for bits in known.bits]) if result.inputs else None,
        "without": {one: significant(result.without.get((analysis.bits, one), nan)) for one in known.granularities},
        "predicted_without": {
            one: significant(known.predicted_total(analysis.bits, one) - result.damage(analysis.bits, one).predicted)
            for one in known.granularities
        },
        "output_sqnr_db": {one: significant(kept) for one, kept in result.output_sqnr.items()},
        "operations": result.operations,
        "share_of_operations": result.operations / total if total else 0.0,
        "entering": _entering(result, analysis),
        "weight_grids": _weight_grids(result, analysis),
    }


def significant(value: float, digits: int = 4) -> float:
    """Rounded to so many digits that count: more of them would differ from machine to machine, and tell nothing."""
    return float(f"{value:.{digits}g}")


def _significant(values: FloatArray) -> FloatArray:
    with np.errstate(divide="ignore", invalid="ignore"):
        power = np.where(values != 0, 10.0 ** (np.floor(np.log10(np.abs(values))) - 2), 1.0)
        rounded: FloatArray = np.rint(values / power) * power
    return rounded


def summarize_exclusions(analysis: Analysis) -> list[Document]:
    """What each tool is told to keep layers in float, in parts that the page composes for any of them.

    A layer that is written as its name in single quotes is not among the ``items``, to keep the summary small.
    """
    if analysis.sensitivity is None:
        return []
    found: list[Document] = []
    for tool in TOOLS:
        setting = find_setting(analysis, tool)
        names = [layer.name for layer in analysis.layers]
        items = {name: list(setting.items(name)) for name in names}
        usable = any(items.values())
        reasons = dict.fromkeys(setting.told.missing.values())
        found.append(
            {
                "tool": tool,
                "title": TITLES[tool],
                "language": setting.language,
                "prefix": setting.before if usable else "",
                "separator": setting.between if usable else "",
                "suffix": setting.after if usable else "",
                "note": setting.hint if usable else "; ".join(reasons),
                "usable": usable,
                "items": {name: item for name, item in items.items() if item != [f"'{name}'"]} if usable else {},
                "missing": dict(setting.told.missing) if usable else {},
            }
        )
    return [one for one in found if one["tool"] != "nncf"]


def _figures(result: LayerSensitivity, known: Sensitivity, granularity: Granularity) -> Document:
    return _columns([result.damage(bits, granularity) for bits in known.bits])


def _columns(damages: list[Damage]) -> Document:
    """A list of each figure, by bits."""
    return {
        "value": [significant(one.value) for one in damages],
        "predicted": [significant(one.predicted) for one in damages],
        "spread": [significant(one.spread, 2) for one in damages],
        "measured": [significant(one.measured) for one in damages],
        "confidence": [one.confidence for one in damages],
    }


def _entering(result: LayerSensitivity, analysis: Analysis) -> Document | None:
    if result.entering is None or analysis.sensitivity is None:
        return None
    known = result.entering
    found = candidates(known.histogram, analysis.bits, analysis.sensitivity.differentiated)
    grid = known.grid(analysis.bits)
    values = known.histogram.counts.sum() + known.histogram.zeros
    return {
        **_histogram(known.histogram),
        "zeros": significant(float(known.histogram.zeros / values)) if values else nan,
        "channels": int(known.low.size),
        "step": significant(grid.step, 6),
        "zero": grid.zero,
        "grids": [_candidate(one) for one in found],
        "channel_statistics": {
            "min": _significant(known.low),
            "mean": _significant(known.mean),
            "max": _significant(known.high),
        },
    }


def _weight_grids(result: LayerSensitivity, analysis: Analysis) -> Document:
    histogram = result.weight_histogram
    found = candidates(histogram, analysis.bits, 1 if result.importance.size else 0, symmetric=True)
    return {**_histogram(histogram), "grids": [_candidate(one, symmetric=True) for one in found]}


def _histogram(histogram: Histogram) -> Document:
    return {
        "low": significant(histogram.low, 6),
        "high": significant(histogram.high, 6),
        "counts": _significant(coarse(histogram.counts, BARS)),
        "importance": _significant(coarse(histogram.importance, BARS)),
    }


def _candidate(one: Candidate, *, symmetric: bool = False) -> Document:
    low, high = one.grid.ends
    high = -low if symmetric else high  # the last point of such a grid stays unused
    return {
        "method": one.method,
        "step": significant(one.grid.step, 6),
        "zero": one.grid.zero,
        "low": significant(low, 6),
        "high": significant(high, 6),
        "sqnr_db": significant(one.sqnr_db),
        "damage": significant(one.damage),
    }


def tell_totals(known: Sensitivity, bits: int, thresholds: Thresholds) -> list[str]:
    """What rounding everything at once leaves of the output, in words."""
    what = f"the {known.what}"
    first = known.granularities[0]
    grids = {"tensor": "one grid per tensor", "channel": "a grid per channel"}
    parts = [f"{_kept(known.total[bits, one])} with {grids[one]}" for one in known.granularities]
    lines = [
        f"All weights rounded to int{bits} at once, {known.measured}: {what} keeps {' and '.join(parts)} (mean ±"
        " standard deviation over draws of the rounding)."
    ]
    if any(layer.inputs for layer in known.layers):
        lines.append(
            f"What enters the layers rounded to {bits} bits, measured: {_kept(known.total_inputs[bits])};"
            f" with the weights as well {_kept(known.total_both[bits, first])}."
        )
    problem, watch = thresholds.problem_db, thresholds.watch_db
    lines.append(
        f"A layer is a problem where rounding it alone changes {what} by more than {percent(10 ** (-problem / 10))} of"
        f" its power ({problem:g} dB), and worth a look above {percent(10 ** (-watch / 10))} ({watch:g} dB)."
    )
    if known.passes:
        passes = "pass" if known.passes == 1 else "passes"
        lines.append(f"Predicted by {known.passes} backward {passes}{_agree(known)}.")
    if known.skipped:
        lines.append(
            f"{count(len(known.skipped), 'layer')} {is_are(len(known.skipped))} judged by weights alone:"
            f" {visible(listed_names([one.name for one in known.skipped]))} {known.skipped[0].reason}."
        )
    return [*lines, *known.notes]


def _agree(known: Sensitivity) -> str:
    """How well halves of the passes agree, in words."""
    saved = ", fewer than planned since the ranking had settled" if known.settled else ""
    if known.agreement != known.agreement or len(known.layers) < 3:
        return saved
    words = "alike" if known.agreement >= 0.9 else "mostly alike" if known.agreement >= 0.7 else "differently"
    return f"{saved}; two halves of them rank the layers {words} (Spearman's {known.agreement:.2f} for the whole)"


def _kept(found: Draws) -> str:
    return f"{decibels(1.0, found.mean):.1f} ± {found.spread_db:.1f} dB" if found.mean else "all"
