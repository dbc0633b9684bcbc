"""What equalizing a model gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any

from qvis.analysis.damage import Draws, Key
from qvis.equalization.offers import Offer
from qvis.equalization.scales import PredictedDamage
from qvis.layers import Analysis, FloatArray, Network, Skipped, decibels
from qvis.noise import Granularity
from qvis.running import Batch

if TYPE_CHECKING:
    from qvis.report import Report

KEPT = 1e-5
"""How far outputs may move, relative to the largest."""
NOTICEABLE_DB = 0.5
"""Less than this is within what another draw of the rounding changes."""


@dataclass(frozen=True)
class Pair:
    """Channels that were scaled: what makes them, and what takes them."""

    producers: tuple[str, ...]
    """Layers and normalizations whose output channels were multiplied; none where a multiplication was inserted."""
    consumers: tuple[str, ...]
    """Layers, and normalizations by fixed numbers, whose input channels were divided."""
    through: tuple[str, ...]
    """Operations in between."""
    scales: FloatArray
    """The factors, (channels,)."""

    def __str__(self) -> str:
        return f"{', '.join(self.producers) or 'a multiplication'} -> {', '.join(self.consumers)}"


@dataclass(frozen=True)
class Verification:
    """Whether the function was kept, and what it brought."""

    difference: float
    """The largest change of an output."""
    relative: float
    """The same relative to the largest output."""
    judged: tuple[Draws, Draws]
    """Damage before and after of what it was equalized for, by which it is accepted: of all weights rounded at once,
    and of what enters layers where activations were to be rounded too."""
    samples: int
    source: str
    """What it was run on: ``32 samples``, ``made-up inputs``."""
    measure: Callable[[], tuple[Mapping[Key, Draws], Mapping[Key, Draws]]] = field(repr=False)

    @property
    def before(self) -> Mapping[Key, Draws]:
        """Damage of all weights rounded at once, of the folded model; the mean over draws of the rounding.

        At 8, 6 and 4 bits and the width it was equalized for, per tensor and per channel; measured when asked for.
        """
        return self._widths[0]

    @property
    def after(self) -> Mapping[Key, Draws]:
        """The same of the scaled model, with the same draws."""
        return self._widths[1]

    @cached_property
    def _widths(self) -> tuple[Mapping[Key, Draws], Mapping[Key, Draws]]:
        return self.measure()

    def gain_db(self, bits: int = 8, granularity: Granularity = "tensor") -> float:
        """How many dB of the output more are kept."""
        before, after = self.sqnr_db(bits, granularity)
        return after - before

    def sqnr_db(self, bits: int = 8, granularity: Granularity = "tensor") -> tuple[float, float]:
        """What is kept of the output before and after, in dB."""
        return decibels(1.0, self.before[bits, granularity].mean), decibels(1.0, self.after[bits, granularity].mean)


@dataclass(frozen=True)
class Step:
    """Something that changes the function a little, which was asked for."""

    kind: str
    """``ReLU6``, ``absorption`` or ``bias correction``."""
    kept: bool
    """Whether it is in the model: only where it helps."""
    text: str
    before: Draws | None = None
    """The damage without it, as in :attr:`Verification.judged`; None where there was nothing to do."""
    after: Draws | None = None
    """The damage with it, of what it changes in the function too."""

    def __str__(self) -> str:
        if self.before is None or self.after is None:
            return self.text
        before, after = decibels(1.0, self.before.mean), decibels(1.0, self.after.mean)
        result = "kept" if self.kept else "left out, since it does not help"
        return f"{self.text} {before:.1f} dB become {after:.1f}: {result}."


@dataclass(frozen=True)
class Equalization:
    """The result of :func:`qvis.equalize`."""

    model: Any
    """The equalized model, a copy; with normalizations folded, and not equalized where that would not have helped."""
    pairs: list[Pair]
    """What was scaled."""
    skipped: list[Skipped]
    """What was not, and why."""
    verification: Verification | None
    """How well the function is kept, and what it brought; None where there was nothing to run the model on."""
    found: int
    """How many sites there are where channels can be scaled."""
    accepted: bool
    """Whether the scales are in the model: they are left out where they do not help, or change the function."""
    method: str
    """``noise`` or ``square root``."""
    bits: int
    """What it was equalized for."""
    granularity: Granularity
    """``tensor`` or ``channel``."""
    activations: bool = False
    """Whether it was judged with activations rounded too."""
    function_kept: bool = True
    """Whether the scaled model computes the same."""
    predicted: tuple[PredictedDamage, PredictedDamage] | None = None
    """Damage by the noise model, before and after; None where there was nothing to run the model on."""
    offers: list[Offer] = field(default_factory=list)
    """Multiplications that could be inserted with ``multiply``, the most helpful one first."""
    steps: list[Step] = field(default_factory=list)
    """What became of the options that change the function."""
    notes: tuple[str, ...] = ()
    sides: tuple[Network | Analysis, Network] = field(repr=False, kw_only=True)
    source: object = field(repr=False, kw_only=True)
    """The model that was given."""
    example: Batch | None = field(default=None, repr=False)
    """A sample to run the model on."""

    @cached_property
    def before(self) -> Analysis:
        """The weights before, normalizations folded."""
        side = self.sides[0]
        return side if isinstance(side, Analysis) else self._analyzed(side)

    @cached_property
    def after(self) -> Analysis:
        """The weights after."""
        return self._analyzed(self.sides[1])

    def _analyzed(self, network: Network) -> Analysis:
        from qvis.analysis import analyze_network

        return analyze_network(network, bits=self.bits)

    @property
    def verdict(self) -> str:
        """Whether it was worth it, in one sentence."""
        if not self.found:
            return "Nothing was equalized: no channels can be scaled without changing the function."
        if self.verification is None:
            return "Scaled by the square-root rule, unseen: give inputs, and it is verified and measured."
        before, after = (decibels(1.0, draws.mean) for draws in self.verification.judged)
        spread = self.verification.judged[1].spread_db
        grid = "one grid per tensor" if self.granularity == "tensor" else "a grid per channel"
        grid += " and rounded activations" if self.activations else ""
        if not self.function_kept:
            return "Left out: the scaled model does not compute the same."
        if not self.accepted:
            return f"Not worth it, and left out: the output would keep {after:.1f} dB instead of {before:.1f}, {grid}."
        worth = "worth it" if after - before > NOTICEABLE_DB else "hardly worth it"
        return (
            f"At int{self.bits} with {grid}, the output keeps {after:.1f} dB instead of {before:.1f}"
            f" (± {spread:.1f}): {worth}."
        )

    def write(self, out_dir: str | PathLike[str], formats: Sequence[str] = ("html",)) -> Report:
        """Write the comparison of the model before and after; see :meth:`qvis.Report.write`."""
        from qvis.analysis.comparison import compare
        from qvis.report import Report
        from qvis.report.document import summarize_changes

        comparison = compare(self.before, self.after)
        return Report(summarize_changes(comparison, self), comparison.layers).write(out_dir, formats)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the model to a file, in a format that suits its framework; the suffix decides.

        Raises
        ------
        OutputError
            The format does not suit, ``path`` is the file that the model came from, or it cannot be written.
        """
        from qvis import adapters

        adapters.save(self.model, path, example=self.example, source=self.source)

    def __repr__(self) -> str:
        return f"<equalization, {len(self.pairs)} sites: {self.verdict}>"
