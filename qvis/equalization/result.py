"""What equalizing a model gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

from qvis.analysis.damage import Draws, Key
from qvis.layers import Analysis, FloatArray, Skipped, decibels

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
    """Layers whose output channels were multiplied."""
    consumers: tuple[str, ...]
    """Layers whose input channels were divided."""
    through: tuple[str, ...]
    """Operations in between."""
    scales: FloatArray
    """The factors, (channels,)."""

    def __str__(self) -> str:
        return f"{', '.join(self.producers)} -> {', '.join(self.consumers)}"


@dataclass(frozen=True)
class Verification:
    """Whether the function was kept, and what it brought."""

    difference: float
    """The largest change of an output."""
    relative: float
    """The same relative to the largest output."""
    before: Mapping[Key, Draws]
    """Damage of all weights rounded at once, of the folded model; the mean over draws of the rounding."""
    after: Mapping[Key, Draws]
    """The same of the equalized model, with the same draws."""
    samples: int
    source: str
    """What it was run on: ``32 samples``, ``made-up inputs``."""

    def gain_db(self, bits: int = 8, granularity: str = "tensor") -> float:
        """How many dB of the output more are kept."""
        before, after = self.before[bits, granularity], self.after[bits, granularity]
        return decibels(1.0, after.mean) - decibels(1.0, before.mean)

    def sqnr_db(self, bits: int = 8, granularity: str = "tensor") -> tuple[float, float]:
        """What is kept of the output before and after, in dB."""
        return decibels(1.0, self.before[bits, granularity].mean), decibels(1.0, self.after[bits, granularity].mean)


@dataclass(frozen=True)
class Equalization:
    """The result of :func:`qvis.equalize`."""

    model: Any
    """The equalized model, a copy; with normalizations folded, and not equalized where that would not have helped."""
    pairs: list[Pair]
    """What was scaled."""
    skipped: list[Skipped]
    """What was not, and why."""
    verification: Verification
    """How well the function is kept, and what it brought."""
    found: int
    """How many sites there are where channels can be scaled."""
    accepted: bool
    """Whether the scales are in the model: they are left out where they do not help, or change the function."""
    method: str
    """``noise`` or ``square root``."""
    bits: int
    """What it was equalized for."""
    granularity: str
    """``tensor`` or ``channel``."""
    predicted: tuple[float, float]
    """Damage of all layers by the noise model, before and after."""
    before: Analysis = field(repr=False)
    after: Analysis = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """Whether it was worth it, in one sentence."""
        before, after = self.verification.sqnr_db(self.bits, self.granularity)
        spread = self.verification.after[self.bits, self.granularity].spread_db
        grid = "one grid per tensor" if self.granularity == "tensor" else "a grid per channel"
        if self.verification.relative > KEPT:
            return "Left out: the scaled model does not compute the same."
        if not self.accepted:
            if not self.found:
                return "Nothing was equalized: no channels can be scaled without changing the function."
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
            The format does not suit, or the file cannot be written.
        """
        from qvis import adapters

        adapters.save(self.model, path)

    def __repr__(self) -> str:
        return f"<equalization, {len(self.pairs)} sites: {self.verdict}>"
