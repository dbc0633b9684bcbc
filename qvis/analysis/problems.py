"""From numbers to findings: how severe a layer's case is, and why, in plain words.

All that stands here is judged from the weights alone. A layer is ranked by :func:`noise_share`, what rounding costs its
channels, and not by the ratio of its widest to its narrowest channel: that ratio is largest where a channel is nearly
dead and nothing is lost.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qvis.layers import BoolArray, ChannelStatistics, IntArray, Reason, RoundingNoise, Severity, Thresholds, decibels
from qvis.words import count, is_are, listed, percent, short

QUARTER = 0.25
"""The noise share of a layer is what this part of its channels loses, or more."""


def find_flags(statistics: ChannelStatistics, rounding: RoundingNoise, thresholds: Thresholds) -> dict[str, IntArray]:
    """The channels that each finding is about, as sorted indices."""
    near_dead = _near_dead(statistics, thresholds)
    # a channel of equal weights needs one level only
    needy = statistics.live & ~near_dead & (statistics.range > 0)
    masks = {
        "nonfinite": statistics.nonfinite > 0,
        "dead": statistics.dead,
        "near_dead": near_dead,
        "starved": needy & (rounding.levels < thresholds.starved_levels),
        "outliers": _outliers(statistics, thresholds),
    }
    return {name: np.flatnonzero(mask) for name, mask in masks.items()}


def _near_dead(statistics: ChannelStatistics, thresholds: Thresholds) -> BoolArray:
    # Against the upper quartile, not the largest: one outlier must not make all others look dead, nor may many dead
    # channels hide each other.
    live = statistics.live
    if not live.any():
        return np.zeros_like(live)
    typical = np.quantile(statistics.peak[live], 0.75)
    near_dead: BoolArray = live & (statistics.peak < thresholds.near_dead * typical)
    return near_dead


def _outliers(statistics: ChannelStatistics, thresholds: Thresholds) -> BoolArray:
    """AIMET's rule for a problematic channel, over live channels alone, so that a dead one hides nothing."""
    live = statistics.live
    if not live.any():
        return np.zeros_like(live)
    q1, q3 = np.quantile(statistics.relative_range[live], (0.25, 0.75))
    outliers: BoolArray = live & (statistics.relative_range > q3 + thresholds.outlier_iqr * (q3 - q1))
    return outliers


def noise_share(
    statistics: ChannelStatistics, rounding: RoundingNoise, flags: dict[str, IntArray], *, per_channel: bool = False
) -> float:
    """The part of its power that a quarter of the layer's channels lose to rounding, or more: 0 is best, 1 is all.

    For each channel that is neither dead nor near dead, the share is sum((w - w_rounded)^2) / sum(w^2); of these the
    upper quartile, never the worst channel alone, so that no single channel decides about a layer. Each channel counts
    alike because a normalization after the layer commonly scales its channels to like size. NaN where no channel
    holds a finite, nonzero weight.
    """
    useful = statistics.live.copy()
    useful[flags["near_dead"]] = False
    useful &= rounding.power > 0
    if not useful.any():
        return float("nan")
    noise = (rounding.noise_channel if per_channel else rounding.noise_tensor)[useful]
    return float(np.quantile(noise / rounding.power[useful], 1 - QUARTER, method="lower"))


def find_severity(
    statistics: ChannelStatistics, flags: dict[str, IntArray], thresholds: Thresholds, share: float
) -> Severity:
    """How much attention a layer needs, given its noise share on the grid of the whole tensor."""
    if flags["nonfinite"].size or not statistics.live.any():
        return Severity.UNUSABLE
    kept = decibels(1.0, share)
    live = np.count_nonzero(statistics.live)
    # one channel, however poor, is never enough: it may be near dead, and then costs nothing
    starved = flags["starved"].size / live if flags["starved"].size > 1 else 0.0
    if kept < thresholds.problem_db or starved >= thresholds.problem_starved:
        return Severity.PROBLEM
    mostly_near_dead = flags["near_dead"].size > 1 and flags["near_dead"].size > live / 2
    if kept < thresholds.watch_db or starved >= thresholds.watch_starved or mostly_near_dead:
        return Severity.WATCH
    return Severity.OK


def find_reasons(
    statistics: ChannelStatistics,
    rounding: RoundingNoise,
    flags: dict[str, IntArray],
    thresholds: Thresholds,
    shares: tuple[float, float],
) -> Iterator[Reason]:
    """What there is to say of a layer, the weightiest first; ``shares`` on a grid per tensor and per channel."""
    share, own = shares

    def reason(kind: str, text: str) -> Reason:
        return Reason(kind, text, tuple(int(i) for i in flags.get(kind, ())))

    total = statistics.min.size
    live = int(np.count_nonzero(statistics.live))
    grid = f"int{rounding.bits} grid"

    if flags["nonfinite"].size:
        bad = int(statistics.nonfinite.sum())
        yield reason(
            "nonfinite",
            f"{count(bad, 'weight')} of {total * statistics.elements:,} {is_are(bad)} NaN or infinite"
            f" ({listed(flags['nonfinite'])}): no grid can hold them. The other figures are of the finite weights.",
        )
    if not live:
        yield reason("zero", "No channel holds a finite weight other than zero: the layer passes nothing on.")
        return
    if np.isfinite(share):
        yield reason(
            "noise",
            f"On one {grid} for the tensor, a quarter of the channels lose {percent(share)} or more of their power to"
            f" rounding ({decibels(1.0, share):.1f} dB); a grid per channel would make that {percent(own)}"
            f" ({decibels(1.0, own):.1f} dB).",
        )
    if flags["starved"].size:
        starved = flags["starved"]
        fewest = int(starved[np.argmin(rounding.levels[starved])])
        yield reason(
            "starved",
            f"{count(starved.size, 'channel')} of {total} {is_are(starved.size)} starved: fewer than"
            f" {thresholds.starved_levels} of the {2**rounding.bits} levels"
            f" (channel {fewest} gets {rounding.levels[fewest]}).",
        )
    if flags["outliers"].size:
        outliers = flags["outliers"]
        typical = float(np.median(statistics.range[statistics.live]))
        widest = int(outliers[np.argmax(statistics.range[outliers])])
        noun = "is an outlier" if outliers.size == 1 else "are outliers"
        ratio = float(statistics.range[widest]) / typical if typical > 0 else float("nan")
        times = f", {short(ratio)} times the median channel's" if typical > 0 else ""
        sets = ", which sets the step for all" if widest == int(np.nanargmax(statistics.peak)) else ""
        yield reason(
            "outliers",
            f"{count(outliers.size, 'channel')} of {total} {noun} by range"
            f" ({listed(outliers)}); the widest is channel {widest}{times}{sets}.",
        )
    if flags["near_dead"].size:
        near_dead = flags["near_dead"]
        yield reason(
            "near_dead",
            f"{count(near_dead.size, 'channel')} of {total} {is_are(near_dead.size)} near dead ({listed(near_dead)}):"
            f" below {thresholds.near_dead:g} of what is usual here. Rounding empties them, which costs nothing unless"
            " a later layer scales them up again; the weights alone cannot tell.",
        )
    if flags["dead"].size:
        dead = flags["dead"]
        yield reason(
            "dead",
            f"{count(dead.size, 'channel')} of {total} {is_are(dead.size)} dead ({listed(dead)}):"
            " they cost nothing when quantized, and could be pruned.",
        )
    if statistics.elements == 1:
        yield reason("single", "Each channel is a single weight, so that its range is 0 and its deviation undefined.")
