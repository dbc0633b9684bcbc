"""The part of a summary that tells how a model was equalized; plain values, as all of it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from qvis.layers import decibels
from qvis.report.sensitivity import significant

if TYPE_CHECKING:
    from qvis.equalization.result import Equalization, Pair

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
        "predicted_before": significant(found.predicted[0]),
        "predicted_after": significant(found.predicted[1]),
        "largest_change": significant(proof.difference, 2),
        "relative_change": significant(proof.relative, 2),
        "source": proof.source,
        "kept": [
            {
                "bits": bits,
                "granularity": granularity,
                "before_db": significant(decibels(1.0, proof.before[bits, granularity].mean)),
                "before_spread_db": significant(proof.before[bits, granularity].spread_db, 2),
                "after_db": significant(decibels(1.0, proof.after[bits, granularity].mean)),
                "after_spread_db": significant(proof.after[bits, granularity].spread_db, 2),
            }
            for bits, granularity in proof.before
        ],
        "pairs": [_pair(pair) for pair in found.pairs],
        "left_alone": [asdict(skipped) for skipped in found.skipped],
        "notes": list(found.notes),
    }


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
