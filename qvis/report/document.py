"""The one summary behind every report: plain dicts, lists, numbers and words, with a version.

HTML, JSON, Markdown and the terminal all read what :func:`summarize` or :func:`summarize_changes` returns; none
computes a figure of its own. The fields are described in the documentation under "The JSON report".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from qvis.analysis.comparison import Comparison, LayerChange
from qvis.layers import Analysis, FloatArray, LayerAnalysis, Severity, decibels
from qvis.report.equalization import summarize_equalization
from qvis.report.sensitivity import summarize_exclusions, summarize_layer, summarize_sensitivity, tell_totals
from qvis.version import __version__
from qvis.words import count, is_are, percent, visible

if TYPE_CHECKING:
    from qvis.equalization.result import Equalization

SCHEMA_VERSION = 1
"""Raised when a field changes its meaning or goes; new fields do not raise it."""

STATISTICS = ("min", "q25", "q50", "mean", "q75", "max", "std", "range", "relative_range")
"""Names of the arrays, one value for each channel, under ``statistics`` of a layer."""

Document = dict[str, Any]
Sentence = list[tuple[str, str]]
"""Text in parts, each with a style: ``""``, ``strong``, or a severity."""

TITLES = {
    "sensitivity": "Sensitivity",
    "weight_ranges": "Weight ranges",
    "relative_weight_ranges": "Relative weight ranges",
    "changes_after_optimization": "Changes after optimization",
}


def summarize(analysis: Analysis, kind: str) -> Document:
    """Summarize the analysis of one model for the report ``kind``, a key of :data:`TITLES`."""
    ranks = {layer.name: rank for rank, layer in enumerate(analysis.ranked, 1)}
    return {
        **_head(kind, analysis),
        "model": _model(analysis),
        "verdict": _verdict(analysis),
        "folding": _folding(analysis),
        "sensitivity": summarize_sensitivity(analysis),
        "layers": [
            {"rank": ranks[layer.name], **_layer(layer), "sensitivity": summarize_layer(layer, analysis)}
            for layer in analysis.layers
        ],
        "exclusions": summarize_exclusions(analysis),
        "skipped": [asdict(skipped) for skipped in analysis.skipped],
    }


def summarize_changes(comparison: Comparison, equalization: Equalization | None = None) -> Document:
    """Summarize what changed between two models; each layer carries ``before`` and ``after``.

    ``equalization`` is what turned the one into the other, if that was it.
    """
    before, after = comparison.before, comparison.after
    ranks = {change.name: rank for rank, change in enumerate(comparison.ranked, 1)}
    return {
        **_head("changes_after_optimization", after),
        "model": {"before": _model(before), "after": _model(after)},
        "verdict": _verdict_on_changes(comparison, equalization),
        "equalization": None if equalization is None else summarize_equalization(equalization),
        "layers": [{"rank": ranks[change.name], **_change(change)} for change in comparison.layers],
        "unmatched": [asdict(unmatched) for unmatched in comparison.unmatched],
        "skipped": [asdict(skipped) for skipped in after.skipped],
    }


def _head(kind: str, analysis: Analysis) -> Document:
    return {
        "schema_version": SCHEMA_VERSION,
        "qvis": __version__,
        "kind": kind,
        "title": TITLES[kind],
        "evidence": analysis.evidence,
        "bits": analysis.bits,
        "thresholds": asdict(analysis.thresholds),
    }


def _model(analysis: Analysis) -> Document:
    return {
        "name": analysis.name,
        "framework": analysis.framework,
        "parameters": analysis.parameters,
        "weights": sum(layer.weights for layer in analysis.layers),
        "fingerprint": analysis.fingerprint,
        "counts": {str(level): sum(layer.severity is level for layer in analysis.layers) for level in Severity},
    }


def _folding(analysis: Analysis) -> Document:
    """Which weights are shown: what a quantized model would hold, or what this one holds."""
    folded = [layer.name for layer in analysis.layers if layer.norms]
    text = ""
    if folded:
        text = f"The weights of {count(len(folded), 'layer')} are shown with the normalization beside them folded in:"
        text += " those are the ones that get rounded."
    return {
        "graph": "" if analysis.graph is None else analysis.graph.source,
        "no_graph": analysis.no_graph,
        "folded": folded,
        "refused": [{"name": name, "reason": reason} for name, reason in analysis.refused.items()],
        "text": text,
    }


def _layer(layer: LayerAnalysis) -> Document:
    statistics, rounding = layer.statistics, layer.rounding
    live = statistics.relative_range[statistics.live]
    return {
        "name": layer.name,
        "op": layer.op,
        "shape": list(layer.shape),
        "dtype": layer.dtype,
        "aliases": list(layer.aliases),
        "notes": list(layer.notes),
        "weights": layer.weights,
        "channels": int(statistics.min.size),
        "channels_from": layer.channels,
        "elements": statistics.elements,
        "severity": str(layer.severity),
        "reasons": [{**asdict(reason), "severity": str(reason.severity)} for reason in layer.reasons],
        "remedies": [asdict(remedy) for remedy in layer.remedies],
        "norms": list(layer.norms),
        "stored": None if layer.stored is None else _stored(layer.stored),
        "noise_share": layer.noise_share,
        "noise_share_channel": layer.noise_share_channel,
        "sqnr_tensor_db": rounding.sqnr_tensor,
        "sqnr_channel_db": rounding.sqnr_channel,
        "step": rounding.step,
        "largest_relative_range": float(live.max()) if live.size else float("nan"),
        "relative_range_statistics": describe(live),
        "median_levels": float(np.median(rounding.levels[statistics.live])) if live.size else 0.0,
        "flags": {name: [int(i) for i in channels] for name, channels in layer.flags.items()},
        "digest": layer.digest,
        "statistics": {name: getattr(statistics, name) for name in STATISTICS},
        "levels": rounding.levels,
    }


def _stored(layer: LayerAnalysis) -> Document:
    """A layer as the model holds it, as far as it differs when a normalization is folded in."""
    full = _layer(layer)
    kept = ("noise_share", "noise_share_channel", "sqnr_tensor_db", "sqnr_channel_db", "step", "median_levels")
    more = ("largest_relative_range", "relative_range_statistics", "flags", "digest", "statistics", "levels")
    return {name: full[name] for name in (*kept, *more)}


def describe(values: FloatArray) -> dict[str, float]:
    """What ``pandas.Series.describe`` says of ``values``, as numbers; NaN where there is nothing to say."""
    nan = float("nan")
    if values.size == 0:
        return {"count": 0, "mean": nan, "std": nan, "min": nan, "q25": nan, "q50": nan, "q75": nan, "max": nan}
    q25, q50, q75 = (float(q) for q in np.quantile(values, (0.25, 0.5, 0.75)))
    return {
        "count": int(values.size),
        "mean": float(values.mean()),
        "std": float(values.std(ddof=1)) if values.size > 1 else nan,
        "min": float(values.min()),
        "q25": q25,
        "q50": q50,
        "q75": q75,
        "max": float(values.max()),
    }


def _change(change: LayerChange) -> Document:
    before, after = _layer(change.before), _layer(change.after)
    shared = ("name", "op", "channels", "channels_from", "elements", "weights")
    return {
        **{key: after[key] for key in shared},
        "name_before": change.name_before,
        "severity": after["severity"],
        "severity_before": before["severity"],
        "verdict": change.verdict,
        "gain_db": change.gain_db,
        "damage_before": change.damages[0],
        "damage_after": change.damages[1],
        "text": change.text,
        "before": before,
        "after": after,
    }


def _verdict(analysis: Analysis) -> Document:
    total = len(analysis.layers)
    by_level = {level: [x for x in analysis.ranked if x.severity is level] for level in Severity}
    broken, problems, watched = (by_level[s] for s in (Severity.UNUSABLE, Severity.PROBLEM, Severity.WATCH))
    evidence = analysis.evidence[0].upper() + analysis.evidence[1:]
    grid = f"int{analysis.bits} with one grid per tensor"
    start = f"{evidence}: "
    together = _together(analysis)
    sentence: Sentence
    if broken:
        word = "is" if len(broken) == 1 else "are"
        sentence = [(start, ""), (f"{count(len(broken), 'layer')} of {total} {word} unusable", "unusable")]
        sentence += [(" (NaN, infinite or all zero)", "")]
        if problems:
            sentence += [(" and ", ""), (f"{len(problems)} will suffer", "problem"), (f" at {grid}", "")]
        sentence += [(".", "")]
    elif problems:
        sentence = [(start, ""), (f"{len(problems)} of {count(total, 'layer')} will suffer", "problem")]
        sentence += [(f" at {grid}, ", ""), (visible(problems[0].name), "strong"), (" most.", "")]
    elif watched:
        sentence = [(start, ""), ("no layer is a problem", "strong"), (f" at {grid}; {len(watched)} of {total} ", "")]
        sentence += [("deserve a look" if len(watched) > 1 else "deserves a look", "watch"), (".", "")]
    else:
        layers = f"all {count(total, 'layer')}" if total > 1 else "the only layer"
        sentence = [(start, ""), (f"{grid} suits {layers}", "strong"), (".", "")]
    if together and not broken and not problems:
        sentence = [*sentence[:-1], ("; but ", ""), (together, "problem"), (".", "")]
    return {"sentence": sentence, "text": plain(sentence), "details": list(_details(analysis))}


def _together(analysis: Analysis) -> str:
    """What is to be said of many small damages that add up; empty where they do not."""
    known = analysis.sensitivity
    if known is None:
        return ""
    total = known.total_both[analysis.bits, known.granularities[0]].mean
    kept = decibels(1.0, total)
    limit = analysis.thresholds.problem_db
    return f"all layers together, measured, leave {kept:.1f} dB of the {known.what}" if kept < limit else ""


def _details(analysis: Analysis) -> list[str]:
    folding = _folding(analysis)
    shown = [folding["text"]] if folding["text"] else []
    known = analysis.sensitivity
    if known is not None:
        return [*_details_of_damage(analysis), *tell_totals(known, analysis.bits, analysis.thresholds), *shown]
    return [*_details_of_weights(analysis), *shown]


def _details_of_damage(analysis: Analysis) -> list[str]:
    known = [x for x in analysis.ranked if x.sensitivity is not None and analysis.badness(x) >= 0]  # not NaN
    worst = max(known, key=analysis.badness, default=None)
    if worst is None or analysis.sensitivity is None:
        return []
    damage = analysis.badness(worst)
    what = "the weights of" if damage == analysis.damage(worst) else "what enters"
    details = [
        f"Rounding {what} {visible(worst.name)} alone does the most damage: it changes the"
        f" {analysis.sensitivity.what} by {percent(damage)} of its power ({decibels(1.0, damage):.1f} dB)."
    ]
    if worst.remedies and worst.severity in (Severity.PROBLEM, Severity.WATCH):
        details.append(f"What helps it: {worst.remedies[0].text}")
    return details


def _details_of_weights(analysis: Analysis) -> list[str]:
    usable = [layer for layer in analysis.layers if layer.severity is not Severity.UNUSABLE]
    worst = max(usable, key=lambda layer: layer.noise_share, default=None)
    details = []
    if worst is not None and worst.noise_share > 0:
        kept = decibels(1.0, worst.noise_share)
        details.append(
            f"In the noisiest {'' if len(usable) == len(analysis.layers) else 'usable '}layer, {visible(worst.name)},"
            f" a quarter of the channels lose {percent(worst.noise_share)} or more of their power to rounding"
            f" ({kept:.1f} dB)."
        )
        fixed = [x for x in analysis.layers if x.severity in (Severity.PROBLEM, Severity.WATCH)]
        if fixed:
            limit = 10 ** (-analysis.thresholds.watch_db / 10)
            cured = sum(layer.noise_share_channel <= limit for layer in fixed)
            details.append(f"A grid per channel would bring {_part(cured, len(fixed))} below {percent(limit)}.")
    done = sum(layer.rounded for layer in usable)
    if done:
        details.append(
            f"{count(done, 'layer')} {'lies' if done == 1 else 'lie'} on an integer grid already: the noise is what"
            " rounding again would add, not what the first rounding has cost."
        )
    details.append(
        "No data was run: the weights alone do not tell how much of a layer's noise reaches the output of the model."
    )
    return details


def _part(number: int, total: int) -> str:
    """``it``, ``both``, ``all 5``, ``2 of these 5``, ``none of these 5``."""
    if number < total:
        return f"{number or 'none'} of these {total}" if total > 1 else "it down, but not"
    return {1: "it", 2: "both"}.get(total, f"all {total}")


def _verdict_on_changes(comparison: Comparison, equalization: Equalization | None) -> Document:
    total = len(comparison.layers)
    better, worse, same = (comparison.count(verdict) for verdict in ("better", "worse", "same"))
    unchanged, rounded = comparison.count("unchanged"), comparison.count("rounded")
    evidence = comparison.after.evidence[0].upper() + comparison.after.evidence[1:]
    sentence: Sentence = [(f"{evidence}: at int{comparison.after.bits} with one grid per tensor ", "")]
    if total == 0:
        sentence += [("no layer of the two models could be matched", "strong"), (".", "")]
    elif unchanged == total:
        sentence += [(f"nothing changed in {count(total, 'layer')}", "strong"), (".", "")]
    elif rounded + unchanged == total:
        newer = all(change.after.rounded for change in comparison.layers if change.verdict == "rounded")
        which = "the new model" if newer else "one of the models"
        sentence = [(f"{evidence}: ", ""), (f"{rounded} of {count(total, 'layer')}", "strong")]
        sentence += [(f" {is_are(rounded)} rounded already in {which}, so that the noise cannot be compared.", "")]
    else:
        sentence += [(f"{better} of {count(total, 'layer')} will round better", "strong"), (" than before", "")]
        sentence += [(" and ", ""), (f"{worse} worse", "problem" if worse else "")]
        rest = same + unchanged
        stays = "stays as it was" if rest == 1 else "stay as they were"
        already = f"; {rounded} {is_are(rounded)} rounded already in one of the two"
        sentence += [(f"; {rest} {stays}" if rest else "", ""), (already if rounded else "", ""), (".", "")]
    details = []
    for level in (Severity.UNUSABLE, Severity.PROBLEM, Severity.WATCH):
        was = sum(change.before.severity is level for change in comparison.layers)
        now = sum(change.after.severity is level for change in comparison.layers)
        if was or now:
            details.append(f"{str(level).capitalize()}: {was} before, {now} after.")
    if comparison.unmatched:
        named = "it is" if len(comparison.unmatched) == 1 else "they are"
        details.append(f"{count(len(comparison.unmatched), 'layer')} could not be compared; {named} named below.")
    if rounded:
        details.append("What rounding has cost shows in the outputs of the models, not in weights that lie on a grid.")
    for side, analysis in (("Before", comparison.before), ("After", comparison.after)):
        if analysis.sensitivity is not None:
            details.append(f"{side}: {tell_totals(analysis.sensitivity, analysis.bits, analysis.thresholds)[0]}")
    if equalization is not None:
        details.insert(0, plain(sentence))
        sentence = [(equalization.verdict, "strong")]
    elif comparison.before.sensitivity is None or comparison.after.sensitivity is None:
        details.append("No data was run: whether the two models compute the same is not known from the weights alone.")
    return {"sentence": sentence, "text": plain(sentence), "details": details}


def plain(sentence: Sentence) -> str:
    """The sentence without its styles."""
    return "".join(text for text, _ in sentence)


def jsonable(value: Any, *, statistics: bool = True) -> Any:
    """``value`` as JSON can hold it: arrays become lists, NaN and infinities ``null``.

    Parameters
    ----------
    value
        A document or a part of one.
    statistics
        Without them the arrays that have one value for each channel are left out.
    """
    if isinstance(value, np.ndarray):
        return jsonable(value.tolist())
    if isinstance(value, Mapping):
        return {k: jsonable(v, statistics=statistics) for k, v in value.items() if statistics or not _per_channel(v)}
    if isinstance(value, (str, int)) or value is None:
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, Sequence):
        return [jsonable(item, statistics=statistics) for item in value]
    raise TypeError(f"{type(value).__name__} has no place in a document")


def _per_channel(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and all(isinstance(item, np.ndarray) for item in value.values())
    return isinstance(value, np.ndarray)
