"""From numbers to findings: how severe a layer's case is, and why, in plain words.

All that stands here is judged from the weights alone. A layer is ranked by :func:`noise_share`, what rounding costs its
channels, and not by the ratio of its widest to its narrowest channel: that ratio is largest where a channel is nearly
dead and nothing is lost.
"""

from __future__ import annotations

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
    share = np.quantile(noise / rounding.power[useful], 1 - QUARTER, method="lower")
    return min(float(share), 1.0)  # rounding to nearest never moves a weight by more than itself


def find_reasons(
    statistics: ChannelStatistics,
    rounding: RoundingNoise,
    flags: dict[str, IntArray],
    thresholds: Thresholds,
    shares: tuple[float, float],
) -> tuple[Reason, ...]:
    """What there is to say of a layer, each with the severity it stands for, the weightiest first.

    ``shares`` are the layer's noise shares on a grid per tensor and on a grid per channel.
    """
    live = int(np.count_nonzero(statistics.live))
    found = {
        "nonfinite": _of_nonfinite(statistics, flags["nonfinite"]),
        "zero": None if live else (Severity.UNUSABLE, "No channel holds a finite weight other than zero."),
        "noise": _of_noise(rounding, thresholds, shares),
        "starved": _of_starved(rounding, flags["starved"], thresholds, live),
        "near_dead": _of_near_dead(statistics, flags["near_dead"], thresholds, live),
        "outliers": _of_outliers(statistics, flags["outliers"]),
        "dead": _of_dead(statistics, flags["dead"]) if live else None,
        "single": _of_single(statistics),
    }
    reasons = [
        Reason(kind, text, severity, tuple(int(i) for i in flags.get(kind, ())))
        for kind, (severity, text) in ((kind, finding) for kind, finding in found.items() if finding)
    ]
    return tuple(sorted(reasons, key=lambda reason: -reason.severity.rank))


Finding = tuple[Severity, str] | None


def _of_nonfinite(statistics: ChannelStatistics, channels: IntArray) -> Finding:
    if not channels.size:
        return None
    bad = int(statistics.nonfinite.sum())
    total = statistics.min.size * statistics.elements
    return Severity.UNUSABLE, (
        f"{count(bad, 'weight')} of {total:,} {is_are(bad)} NaN or infinite ({listed(channels)}): no grid can hold"
        f" {'it' if bad == 1 else 'them'}. The other figures are of the finite weights."
    )


def _of_noise(rounding: RoundingNoise, thresholds: Thresholds, shares: tuple[float, float]) -> Finding:
    share, own = shares
    if not np.isfinite(share):
        return None
    kept, kept_own = decibels(1.0, share), decibels(1.0, own)
    severity = _grade(kept < thresholds.problem_db, kept < thresholds.watch_db)
    start = f"On one int{rounding.bits} grid for the tensor"
    if share == 0:
        return severity, f"{start}, most channels lose nothing to rounding."
    cure = f"would make that {percent(own)} ({kept_own:.1f} dB)" if own else "would lose nothing"
    return severity, (
        f"{start}, a quarter of the channels lose {percent(share)} or more of their power to rounding"
        f" ({kept:.1f} dB); a grid per channel {cure}."
    )


def _of_starved(rounding: RoundingNoise, channels: IntArray, thresholds: Thresholds, live: int) -> Finding:
    if not channels.size:
        return None
    # one channel, however poor, is never enough: it may be near dead, and then costs nothing
    part = channels.size / live if channels.size > 1 else 0.0
    severity = _grade(part >= thresholds.problem_starved, part >= thresholds.watch_starved)
    fewest = int(channels[np.argmin(rounding.levels[channels])])
    return severity, (
        f"{count(channels.size, 'channel')} of {rounding.levels.size} {is_are(channels.size)} starved: fewer than"
        f" {thresholds.starved_levels} of the {2**rounding.bits} levels of the tensor's grid"
        f" (channel {fewest} gets {rounding.levels[fewest]})."
    )


def _of_near_dead(statistics: ChannelStatistics, channels: IntArray, thresholds: Thresholds, live: int) -> Finding:
    if not channels.size:
        return None
    mostly = channels.size > 1 and channels.size > live / 2
    return Severity.WATCH if mostly else Severity.OK, (
        f"{count(channels.size, 'channel')} of {statistics.min.size} {is_are(channels.size)} near dead"
        f" ({listed(channels)}): below {thresholds.near_dead:g} of what is usual here. Rounding empties"
        f" {'it' if channels.size == 1 else 'them'}, which costs nothing unless a later layer scales"
        f" {'it' if channels.size == 1 else 'them'} up again; the weights alone cannot tell."
    )


def _of_outliers(statistics: ChannelStatistics, channels: IntArray) -> Finding:
    if not channels.size:
        return None
    typical = float(np.median(statistics.range[statistics.live]))
    widest = int(channels[np.argmax(statistics.range[channels])])
    times = f", {short(float(statistics.range[widest]) / typical)} times the median channel's" if typical > 0 else ""
    sets = ", which sets the step for all" if widest == int(np.nanargmax(statistics.peak)) else ""
    return Severity.OK, (
        f"{count(channels.size, 'channel')} of {statistics.min.size}"
        f" {'is an outlier' if channels.size == 1 else 'are outliers'} by range ({listed(channels)});"
        f" the widest is channel {widest}{times}{sets}."
    )


def _of_dead(statistics: ChannelStatistics, channels: IntArray) -> Finding:
    if not channels.size:
        return None
    return Severity.OK, (
        f"{count(channels.size, 'channel')} of {statistics.min.size} {is_are(channels.size)} dead ({listed(channels)}):"
        f" {'it costs' if channels.size == 1 else 'they cost'} nothing when quantized, and could be pruned."
    )


def _of_single(statistics: ChannelStatistics) -> Finding:
    if statistics.elements > 1:
        return None
    return Severity.OK, "Each channel is a single weight, so that its range is 0 and its deviation undefined."


def _grade(is_problem: bool, to_watch: bool) -> Severity:
    return Severity.PROBLEM if is_problem else Severity.WATCH if to_watch else Severity.OK
