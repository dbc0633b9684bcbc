"""What changed between two versions of a model, layer by layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from math import isnan, nan

import numpy as np

from qvis.analysis.matching import match_layers
from qvis.layers import Analysis, ChannelStatistics, LayerAnalysis, Reason, Severity, Skipped, decibels
from qvis.words import percent

NOTICEABLE_DB = 0.5
"""A change of the noise below this is no change: another rounding of the same weights moves it as much."""


@dataclass(frozen=True)
class LayerChange:
    """One layer, before and after. Reads like the layer after, so that it can stand where a layer does."""

    before: LayerAnalysis
    after: LayerAnalysis
    damages: tuple[float, float] = (nan, nan)
    """What rounding its weights does to the output, before and after; NaN where a model was not run."""

    @property
    def name(self) -> str:
        """The name in the model after."""
        return self.after.name

    @property
    def name_before(self) -> str:
        """The name in the model before; another one where an exporter renamed the layer."""
        return self.before.name

    @property
    def op(self) -> str:
        """The kind of layer, after."""
        return self.after.op

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the framework's tensor."""
        return self.after.shape

    @property
    def severity(self) -> Severity:
        """The severity after."""
        return self.after.severity

    @property
    def reasons(self) -> tuple[Reason, ...]:
        """The reasons for the severity after."""
        return self.after.reasons

    @property
    def statistics(self) -> ChannelStatistics:
        """The statistics after."""
        return self.after.statistics

    @property
    def gain_db(self) -> float:
        """How many dB more are kept on the grid that is judged; negative where it got worse.

        Of the output of the model where both were run, else of a quarter of the layer's channels. NaN where the layer
        is unusable before or after, or rounded already in one of the two, unless it is unchanged.
        """
        if self.before.digest == self.after.digest:
            return 0.0
        if self._unusable or self.before.rounded != self.after.rounded:
            return float("nan")
        shares = self.damages if self.run else (self.before.noise_share, self.after.noise_share)
        before, after = (decibels(1.0, share) for share in shares)
        return 0.0 if before == after else after - before

    @property
    def verdict(self) -> str:
        """``better``, ``worse``, ``same`` (below :data:`NOTICEABLE_DB`), ``unchanged`` (the same bytes) or ``rounded``.

        The last is said where the weights lie on a grid already in one of the two, so that their noise tells nothing.
        """
        if self.before.digest == self.after.digest:
            return "unchanged"
        if self._unusable:
            difference = self.before.severity.rank - self.after.severity.rank
            return "better" if difference > 0 else "worse" if difference < 0 else "same"
        if self.before.rounded != self.after.rounded:
            return "rounded"
        if abs(self.gain_db) < NOTICEABLE_DB:
            return "same"
        return "better" if self.gain_db > 0 else "worse"

    @property
    def run(self) -> bool:
        """Whether both models were run, so that the change is judged by their outputs."""
        return not any(isnan(damage) for damage in self.damages)

    @property
    def _unusable(self) -> bool:
        return Severity.UNUSABLE in (self.before.severity, self.after.severity)

    @property
    def text(self) -> str:
        """The change in one sentence."""
        if self.verdict == "unchanged":
            return "The weights are the same, bit for bit."
        before, after = self.before.noise_share, self.after.noise_share
        if self.verdict == "rounded":
            when, other, share = ("after", "Before", before) if self.after.rounded else ("before", "After", after)
            return (
                f"The weights lie on a grid already {when}, and do not show what rounding them has cost."
                f" {other}, a quarter of the channels lose {percent(share)} or more on one grid for the tensor."
            )
        if self._unusable:
            return f"{str(self.before.severity).capitalize()} before, {self.after.severity} after."
        gain = f" ({self.gain_db:+.1f} dB)" if np.isfinite(self.gain_db) else ""
        if self.run:
            before, after = self.damages
            return (
                f"Rounding its weights changes the output by {percent(after)} of its power; before it was"
                f" {percent(before)}{gain}."
            )
        return (
            f"A quarter of the channels lose {percent(after)} or more of their power to rounding on one grid for the"
            f" tensor; before it was {percent(before)}{gain}."
        )


@dataclass(frozen=True)
class Comparison:
    """Two analyses, side by side."""

    before: Analysis
    after: Analysis
    layers: tuple[LayerChange, ...]
    """The layers that both have, in the order of the model after."""
    unmatched: tuple[Skipped, ...]
    """Layers that could not be compared, and why."""

    @cached_property
    def ranked(self) -> tuple[LayerChange, ...]:
        """Worst first: by severity after, then by what got worse most."""
        order = sorted(
            range(len(self.layers)),
            key=lambda i: (-self.layers[i].severity.rank, np.nan_to_num(self.layers[i].gain_db, nan=-np.inf), i),
        )
        return tuple(self.layers[i] for i in order)

    def count(self, verdict: str) -> int:
        """How many layers have this :attr:`LayerChange.verdict`."""
        return Counter(change.verdict for change in self.layers)[verdict]


def compare(before: Analysis, after: Analysis) -> Comparison:
    """Pair the layers of two analyses (see :func:`qvis.analysis.matching.match_layers`), and name those left over."""
    pairs, unmatched = match_layers(before, after)
    changes = (LayerChange(old, new, (before.damage(old), after.damage(new))) for old, new in pairs)
    return Comparison(before, after, tuple(changes), tuple(unmatched))
