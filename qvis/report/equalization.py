"""The part of a summary that tells how a model was equalized; plain values, as all of it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from qvis.layers import decibels
from qvis.report.sensitivity import significant

if TYPE_CHECKING:
    from qvis.analysis.damage import Draws
    from qvis.equalization.result import Equalization, Pair, Step, Verification

Document = dict[str, Any]


def summarize_equalization(found: Equalization) -> Document:
    """What was scaled, what it brought, and what was left alone."""
    proof = found.verification
    return {
        "verdict": found.verdict,
        "accepted": found.accepted,
        "method": found.method,
        "bits": found.bits,
        "granularity": found.granularity,
        "activations": found.activations,
        "verified": None if proof is None else _verification(proof),
        "layers": _layers(found),
        "pairs": [_pair(pair) for pair in found.pairs],
        "left_alone": [asdict(skipped) for skipped in found.skipped],
        "steps": [_step(step) for step in found.steps],
        "offers": [
            {
                "layer": offer.layer,
                "before": significant(offer.before),
                "after": significant(offer.after),
                "share": significant(offer.share),
                "multiplications": offer.multiplications,
                "cost": significant(offer.cost),
            }
            for offer in found.offers
        ],
        "notes": list(found.notes),
    }


def _verification(proof: Verification) -> Document:
    before, after = proof.judged
    return {
        "source": proof.source,
        "largest_change": significant(proof.difference, 2),
        "relative_change": significant(proof.relative, 2),
        "judged": _change(before, after),
        "kept": [
            {"bits": bits, "granularity": granularity, **_change(before, proof.after[bits, granularity])}
            for (bits, granularity), before in proof.before.items()
        ],
    }


def _change(before: Draws, after: Draws) -> Document:
    """The dB that are kept before and after."""
    return {
        "before_db": significant(decibels(1.0, before.mean)),
        "before_spread_db": significant(before.spread_db, 2),
        "after_db": significant(decibels(1.0, after.mean)),
        "after_spread_db": significant(after.spread_db, 2),
    }


def _step(step: Step) -> Document:
    change = {} if step.before is None or step.after is None else _change(step.before, step.after)
    return {"kind": step.kind, "kept": step.kept, "text": step.text, **change}


def _layers(found: Equalization) -> list[Document]:
    """The predicted damage of each layer's weights, the largest before first."""
    if found.predicted is None:
        return []
    before, after = (predicted.layers for predicted in found.predicted)
    return [
        {"name": name, "before": significant(before[name]), "after": significant(after[name])}
        for name in sorted(before, key=lambda name: -before[name])
        if before[name] > 0 or after[name] > 0
    ]


def _pair(pair: Pair) -> Document:
    scales = np.asarray(pair.scales, np.float64)
    smallest, median, largest = (float(f(scales)) if scales.size else float("nan") for f in (np.min, np.median, np.max))
    return {
        "producers": list(pair.producers),
        "consumers": list(pair.consumers),
        "through": list(pair.through),
        "channels": int(scales.size),
        "smallest": significant(smallest),
        "median": significant(median),
        "largest": significant(largest),
        "scales": [significant(float(one), 6) for one in scales],
    }
