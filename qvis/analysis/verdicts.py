"""Judges layers by what quantization does to the output of the model, where that is known."""

from __future__ import annotations

from dataclasses import replace

from qvis.analysis.damage import Damage, LayerSensitivity, Sensitivity
from qvis.analysis.remedies import find_remedies
from qvis.errors import BadArgumentError
from qvis.layers import Analysis, LayerAnalysis, Reason, Severity, Thresholds, decibels
from qvis.words import percent

STILL_DECIDES = ("nonfinite", "zero")
"""Findings from the weights that no run can overrule: there is nothing to round."""


def judge(analysis: Analysis, sensitivity: Sensitivity | None) -> Analysis:
    """The analysis with its verdicts by the best evidence at hand, and with what would help.

    A layer whose damage is known is judged by it: what the weights alone suggest then only explains.
    """
    if sensitivity is not None:
        _check(analysis, sensitivity)
        layers = tuple(
            _judged(layer, analysis, sensitivity, sensitivity.by_name[layer.name])
            if layer.name in sensitivity.by_name
            else layer
            for layer in analysis.layers
        )
        analysis = replace(analysis, layers=layers, sensitivity=sensitivity, evidence=sensitivity.evidence)
    return replace(
        analysis, layers=tuple(replace(layer, remedies=find_remedies(layer, analysis)) for layer in analysis.layers)
    )


def _check(analysis: Analysis, sensitivity: Sensitivity) -> None:
    """Refuse what was found for another model, or at other widths."""
    if analysis.bits not in sensitivity.bits:
        looked_at = ", ".join(map(str, sensitivity.bits))
        raise BadArgumentError(
            f"sensitivity: it was found at {looked_at} bits, not at {analysis.bits}; find it with bits={analysis.bits}"
        )
    if not any(layer.name in sensitivity.by_name for layer in analysis.layers):
        raise BadArgumentError(
            f"sensitivity: none of its layers is one of {analysis.name}'s; it was found for {sensitivity.name}"
        )


def _judged(layer: LayerAnalysis, analysis: Analysis, known: Sensitivity, result: LayerSensitivity) -> LayerAnalysis:
    bits, thresholds = analysis.bits, analysis.thresholds
    found = [
        reason if reason.kind in STILL_DECIDES else replace(reason, severity=Severity.OK) for reason in layer.reasons
    ]
    weights = result.damage(bits, known.granularities[0])
    if weights.value == weights.value:
        found.append(_of_weights(weights, result, known, bits, thresholds))
    inputs = result.damage(bits, what="inputs")
    if inputs.value == inputs.value:
        found.append(_of_inputs(inputs, result, known, bits, thresholds))
    found.sort(key=lambda reason: (-reason.severity.rank, reason.kind not in ("damage", "inputs")))
    severity = max((reason.severity for reason in found), key=lambda one: one.rank, default=Severity.OK)
    return replace(layer, reasons=tuple(found), severity=severity, sensitivity=result)


def _of_weights(
    damage: Damage, result: LayerSensitivity, known: Sensitivity, bits: int, thresholds: Thresholds
) -> Reason:
    grid = "one grid for the tensor" if known.granularities[0] == "tensor" else "a grid per channel"
    text = f"Rounding its weights to int{bits} on {grid} {_changes(damage, known)}"
    if known.granularities == ("tensor", "channel"):
        other = result.damage(bits, "channel").value
        text += f"; with a grid per channel {percent(other)} ({decibels(1.0, other):.1f} dB)"
    local = result.output_sqnr.get(known.granularities[0])
    own = "" if local is None else f" Its own output keeps {local:.1f} dB."
    severity = grade(damage.value, thresholds)
    return Reason("damage", f"{text}.{own}", severity, (), _evidence(damage, known))


def _of_inputs(
    damage: Damage, result: LayerSensitivity, known: Sensitivity, bits: int, thresholds: Thresholds
) -> Reason:
    assert result.entering is not None
    histogram = result.entering.histogram
    ends = f"{histogram.low:.3g} to {histogram.high:.3g}"
    text = f"Rounding what enters it ({ends}) to {bits} bits {_changes(damage, known)}."
    return Reason("inputs", text, grade(damage.value, thresholds), (), _evidence(damage, known))


def grade(damage: float, thresholds: Thresholds) -> Severity:
    """How severe a damage is: a problem where it alone leaves fewer dB of the output than ``problem_db``."""
    kept = decibels(1.0, damage)
    if kept < thresholds.problem_db:
        return Severity.PROBLEM
    return Severity.WATCH if kept < thresholds.watch_db else Severity.OK


def _changes(damage: Damage, known: Sensitivity) -> str:
    kept = f"{decibels(1.0, damage.value):.1f} dB"
    sure = {"low": ", a rough guess", "fair": ", within 2.5 times"}.get(damage.confidence, "")
    return f"changes the {known.what} by {percent(damage.value)} of its power ({kept}{sure})"


def _evidence(damage: Damage, known: Sensitivity) -> str:
    """What this figure rests on, which may be better than what most do."""
    if damage.measured == damage.measured:
        return known.measured
    return known.evidence
