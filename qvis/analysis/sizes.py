"""The records that say how small the layers of a model can be made, at what damage.

Sizes are bytes of the weights alone. Everything is counted and judged on top of rounding: what a way to make a layer
smaller keeps is stored in the model's common width, and damages are those of the layer as it would be stored.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf, log10, nan
from os import PathLike
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from qvis.analysis.damage import UNRELIABLE, Damage
from qvis.analysis.factorizing import Spectrum
from qvis.errors import BadArgumentError
from qvis.layers import FloatArray, Skipped, decibels
from qvis.running import Track, silently
from qvis.words import count

if TYPE_CHECKING:
    from qvis.report.compressibility import CompressibilityReport

METHODS = {
    "coding": "fewer bits, entropy coded",
    "rounding": "fewer bits",
    "weights": "smallest weights left out",
    "pattern": "two of four weights kept",
    "channels": "channels left out",
    "rank": "low rank",
}
"""The ways to make a layer smaller."""
TARGETS = (0.5, 0.25)
"""Of the layer's bytes: the points nearest to these are measured."""
FREE_DB = 0.01
"""To lose less than this counts as losing this much."""


class Point(NamedTuple):
    """One size of a layer."""

    setting: int
    """What is kept: bits, weights, channels or ranks."""
    bytes: int
    damage: Damage
    """Of storing the layer so, everything else being as in the model; rounding included."""


@dataclass(frozen=True, eq=False)
class Curve:
    """What a layer costs at each size, for one way to make it smaller."""

    method: str
    """A word of :data:`METHODS`."""
    points: list[Point]
    """The smallest first. Measured figures are put in as they come."""
    make: Callable[[int], FloatArray] = field(repr=False)
    """The weight (channels, elements) that a setting leaves."""

    def point(self, setting: int) -> Point:
        """The point with this setting."""
        return next(point for point in self.points if point.setting == setting)

    def nearest(self, size: float) -> Point:
        """The point nearest to so many bytes."""
        return min(self.points, key=lambda point: abs(point.bytes - size))

    def within(self, damage: float) -> Point | None:
        """The smallest point that does no more damage than this; none where a larger one was measured to do more."""
        failed = max((one.bytes for one in self.points if one.damage.measured > damage), default=0)
        fitting = (one for one in self.points if one.bytes > failed and one.damage.value <= damage)
        return min(fitting, key=lambda one: one.bytes, default=None)

    def note(self, setting: int, measured: float) -> None:
        """Put in what was measured of a setting."""
        for index, point in enumerate(self.points):
            if point.setting == setting:
                self.points[index] = point._replace(damage=replace(point.damage, measured=measured))


@dataclass(frozen=True)
class LayerSizes:
    """How small one layer can be made."""

    name: str
    op: str
    shape: tuple[int, ...]
    weights: int
    """How many it has."""
    channels: int
    bytes: int
    """In the common width: codes packed without gaps, and a step for each channel."""
    damage: Damage
    """Of rounding to that width."""
    entropies: Mapping[int, float]
    """Bits for each code, in the mean, that an ideal entropy coder needs, by the width of the codes."""
    zeros: int
    """Weights that round to zero in the common width."""
    dead: tuple[int, ...]
    """Channels whose largest weight is below ``Thresholds.dead`` of the layer's largest."""
    near_dead: tuple[int, ...]
    """Live channels whose largest weight is below ``Thresholds.near_dead`` of the channels' upper quartile."""
    spectrum: Spectrum | None
    """None where the matrix cannot be put in two."""
    curves: Mapping[str, Curve]
    """By method."""
    refused: Mapping[str, str]
    """Why a method does not suit the layer."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trial:
    """Something to make and to measure."""

    choice: Mapping[str, tuple[str, int]]
    """Method and setting, by layer; the other layers are as in the model."""
    saved: int
    """Bytes, against the common width."""
    share: float
    """Of the bytes of these layers that is left."""
    predicted: float
    """Damage."""
    base: float
    """The predicted damage of these layers in the common width."""
    all_layers: bool = False
    """Whether layers that are not in :attr:`choice` are rounded to the common width."""

    @property
    def layer(self) -> str:
        """The one that is changed, or nothing where it is several."""
        return "" if self.all_layers else next(iter(self.choice))

    @property
    def method(self) -> str:
        """How it is changed, or nothing where layers are changed in different ways."""
        return "" if self.all_layers else next(iter(self.choice.values()))[0]


@dataclass(frozen=True)
class Score:
    """What came of a trial."""

    trial: Trial
    damage: float
    """Measured."""
    accuracy: float = nan
    """The share of the samples that the model gets right so; NaN without labels."""


@dataclass(eq=False)
class Compressibility:
    """The finding about a whole model; made by :func:`qvis.compressibility`."""

    name: str
    framework: str
    bits: int
    """The common width."""
    keep_db: float
    """The damage that is allowed, as what is left of the output."""
    layers: tuple[LayerSizes, ...]
    """In the model's own order."""
    baseline: float
    """Measured damage of the model with all its layers in the common width."""
    accuracy: tuple[float, float]
    """The share of the samples that the model gets right, as it is and in the common width; NaN without labels."""
    stored_bytes: int
    """What these layers take in the model as it is."""
    samples: int
    passes: int
    """Backward passes."""
    evidence: str
    """What figures rest on that are not measured: ``predicted from 32 samples``."""
    notes: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    """Layers of which nothing can be said, and why."""
    trials: tuple[Trial, ...] = ()
    """What there is to measure, the most promising first."""
    scores: list[Score] = field(default_factory=list)
    """What was measured of it, in this order."""
    state: str = "predicted"
    """``predicted`` (nothing is measured yet), ``running``, ``complete``, ``interrupted`` or ``out of time``."""
    seconds: float = 0.0
    """Spent on measuring."""
    run: Callable[[Trial], tuple[float, float]] = field(default=lambda _: (nan, nan), repr=False)
    """Makes a trial and returns the damage and the accuracy."""

    @cached_property
    def by_name(self) -> dict[str, LayerSizes]:
        """Each layer by its name."""
        return {layer.name: layer for layer in self.layers}

    @property
    def bytes(self) -> int:
        """What the layers take in the common width."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def allowed(self) -> float:
        """The damage that leaves :attr:`keep_db`."""
        return float(10 ** (-self.keep_db / 10))

    @property
    def remaining_seconds(self) -> float:
        """How long what is left to measure will take; NaN before anything is measured."""
        left = len(self.trials) - len(self.scores)
        return self.seconds / len(self.scores) * left if self.scores else nan

    # -- what is worth it ---------------------------------------------------------------------------------------------

    def lost_db(self, damage: float, base: float) -> float:
        """How many dB less the model keeps in the common width if a part of it does ``damage`` instead of ``base``."""
        total = max(self.baseline, 1e-30)
        return 10 * log10(1 + max(0.0, damage - base) / total) if damage == damage else nan

    def bytes_per_db(self, saved: float, lost: float) -> float:
        """What is saved for each dB; less than :data:`FREE_DB` counts as that."""
        return saved / max(lost, FREE_DB) if lost == lost else nan

    def offer(self, layer: LayerSizes, method: str) -> Point | None:
        """The smallest size by a method that stays within the damage allowed, where it saves anything."""
        curve = layer.curves.get(method)
        found = curve.within(self.allowed) if curve is not None else None
        return found if found is not None and found.bytes < layer.bytes else None

    def best(self, layer: LayerSizes) -> tuple[str, Point] | None:
        """The method that saves the most of a layer within the damage allowed, and the point; no mere guess."""
        offers = {method: self.offer(layer, method) for method in layer.curves}
        found = {
            method: point for method, point in offers.items() if point is not None and point.damage.confidence != "low"
        }
        method = min(found, key=lambda one: found[one].bytes, default=None)
        return None if method is None else (method, found[method])

    def worth(self, layer: LayerSizes, point: Point) -> float:
        """Bytes saved per dB of a point."""
        return self.bytes_per_db(layer.bytes - point.bytes, self.lost_db(point.damage.value, layer.damage.value))

    @property
    def ranked(self) -> list[LayerSizes]:
        """The layers, those that give the most bytes per dB first."""

        def worth(layer: LayerSizes) -> float:
            best = self.best(layer)
            return -1.0 if best is None else self.worth(layer, best[1])

        return sorted(self.layers, key=lambda layer: -worth(layer))

    @property
    def together(self) -> Trial | Score | None:
        """All layers at once: the smallest that was measured to keep enough, else that is predicted to, if any."""
        measured = [one for one in self.scores if one.trial.all_layers]
        kept = [one for one in measured if one.damage <= self.allowed and one.trial.saved > 0]
        if kept:
            return max(kept, key=lambda one: one.trial.saved)
        tried = {id(one.trial) for one in measured}
        open_ = [one for one in self.trials if one.all_layers and id(one) not in tried]
        return max((one for one in open_ if one.predicted <= self.allowed), key=lambda one: one.saved, default=None)

    # -- measuring ----------------------------------------------------------------------------------------------------

    def measure(self, *, seconds: float = inf, track: Track = silently) -> Generator[Score, None, None]:
        """Make the :attr:`trials` one by one, the most promising first, and yield what comes of each.

        What was measured is in :attr:`scores` and in the curves, also when this is stopped half-way; called again, it
        goes on from there.

        Parameters
        ----------
        seconds
            Begin no trial after so many.
        track
            Shows how far the work has come.

        Raises
        ------
        BadArgumentError
            ``seconds`` is not positive.
        """
        if not seconds > 0:
            raise BadArgumentError(f"seconds: got {seconds!r}, expected a number above 0")
        return self._measure(seconds, track)

    def _measure(self, seconds: float, track: Track) -> Generator[Score, None, None]:
        began, before = monotonic(), self.seconds
        self.state = "running"
        try:
            for trial in track(self.trials[len(self.scores) :], "Measuring"):
                if monotonic() - began > seconds:
                    self.state = "out of time"
                    return
                score = Score(trial, *self.run(trial))
                if not trial.all_layers:
                    self._note(trial, score.damage)
                self.scores.append(score)
                self.seconds = before + monotonic() - began
                yield score
            self.state = "complete"
        finally:
            if self.state == "running":
                self.state = "interrupted" if len(self.scores) < len(self.trials) else "complete"

    def _note(self, trial: Trial, damage: float) -> None:
        layer = self.by_name[trial.layer]
        method, setting = trial.choice[layer.name]
        for curve in layer.curves.values():
            if curve.make == layer.curves[method].make:  # the same weights, stored in another way
                curve.note(setting, damage)

    def write(self, out_dir: str | PathLike[str], formats: Sequence[str] = ("html",)) -> CompressibilityReport:
        """Write ``compressibility.html``, ``.json`` or ``.md`` into ``out_dir`` (made when missing).

        May be called again while :meth:`measure` goes on: the page then says how far it is, and loads itself anew.

        Raises
        ------
        BadArgumentError
            ``formats`` is empty or has an entry other than ``html``, ``json`` and ``md``.
        OutputError
            The folder cannot be written, or holds a file of the same name that qvis did not write.
        """
        from qvis.report.compressibility import CompressibilityReport

        return CompressibilityReport(self).write(out_dir, formats)

    @property
    def verdict(self) -> str:
        """What could be saved at what damage, in one sentence."""
        from qvis.report.compressibility import tell_verdict

        return tell_verdict(self)

    def __repr__(self) -> str:
        return f"<compressibility, {count(len(self.layers), 'layer')}: {self.verdict}>"


def describe(layer: LayerSizes, method: str, setting: int) -> str:
    """A setting in words: ``4 bits``, ``12 of 64 channels``."""
    if method in ("rounding", "coding"):
        return f"{setting} bits"
    if method == "channels":
        return f"{setting:,} of {count(layer.channels, 'channel')}"
    if method == "rank":
        full = len(layer.spectrum.values) if layer.spectrum is not None else 0
        return f"rank {setting:,} of {full:,}"
    return f"{setting:,} of {count(layer.weights, 'weight')}"


def plan_trials(found: Compressibility, together: Sequence[Trial]) -> tuple[Trial, ...]:
    """All layers at once first, then each layer by each method that is worth it, by bytes saved per dB."""
    trials: dict[object, Trial] = {}
    for layer in found.layers:
        for method, curve in layer.curves.items():
            points = [found.offer(layer, method), *(curve.nearest(share * layer.bytes) for share in TARGETS)]
            for point in points:
                if point is None or point.bytes >= layer.bytes or point.damage.predicted > UNRELIABLE:
                    continue
                key = (curve.make, point.setting)
                saved = layer.bytes - point.bytes
                if key in trials and trials[key].saved >= saved:
                    continue
                trials[key] = Trial(
                    choice={layer.name: (method, point.setting)},
                    saved=saved,
                    share=point.bytes / layer.bytes,
                    predicted=point.damage.predicted,
                    base=layer.damage.predicted,
                )

    def worth(trial: Trial) -> float:
        lost = found.lost_db(trial.predicted, trial.base)
        return found.bytes_per_db(trial.saved, lost) if lost == lost else trial.saved

    return (*together, *sorted(trials.values(), key=lambda trial: -worth(trial)))


def kept_db(damage: float) -> float:
    """What is left of the output."""
    return decibels(1.0, damage)
