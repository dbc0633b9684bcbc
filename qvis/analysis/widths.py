"""The records that say which width each layer of a model should have, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite, nan
from os import PathLike
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qvis.analysis.damage import Draws
from qvis.errors import BadArgumentError, OutputError
from qvis.layers import FloatArray, Network, Skipped, decibels
from qvis.noise import Granularity, WeightGrid
from qvis.quantization.grids import SCALE_BITS

if TYPE_CHECKING:
    from qvis.exporting import Exported
    from qvis.report.bit_widths import WidthsReport

FLOAT_BYTES = 4
"""Of a number that is not rounded."""


class Option(NamedTuple):
    """A layer on one of the grids that were looked at."""

    grid: WeightGrid
    bytes: int
    """What its weights take; see :func:`stored_bytes`."""
    damage: float
    """What rounding this layer alone does to the output, predicted; the sum over layers is that of all of them."""
    spread: float
    """How sure that is: the standard error of its logarithm."""


@dataclass(frozen=True)
class LayerWidths:
    """What each width would cost one layer."""

    name: str
    op: str
    shape: tuple[int, ...]
    channels: int
    elements: int
    """Weights in each channel."""
    options: tuple[Option, ...]
    """Every width at every granularity that was looked at."""

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return self.channels * self.elements

    def stored_bits(self, grid: WeightGrid) -> int:
        """What it takes on a grid; see :func:`stored_bits`."""
        return stored_bits(self.channels, self.elements, grid)

    def option(self, bits: int, granularity: Granularity = "channel") -> Option:
        """One of the options.

        Raises
        ------
        BadArgumentError
            This one was not looked at.
        """
        found = next((one for one in self.options if one.grid == WeightGrid(bits, granularity)), None)
        if found is None:
            known = ", ".join(f"{one.grid.bits} {one.grid.granularity!r}" for one in self.options)
            raise BadArgumentError(f"bits, granularity: got {bits!r}, {granularity!r}, expected one of {known}")
        return found


class Accuracy(NamedTuple):
    """How many answers are right, from 0 to 1; the mean over draws of the rounding."""

    share: float
    error: float
    """Standard error of the difference to the model that is not rounded, or to what it is compared with."""


@dataclass(frozen=True)
class Mix:
    """A width for each layer, and what it costs."""

    grids: Mapping[str, WeightGrid] = field(repr=False)
    """By the name of the layer."""
    bytes: int
    """What all these weights take."""
    average_bits: float
    """Of a weight, the scales not counted."""
    predicted: float = nan
    """Damage of all layers together, by the noise model; NaN where it was not predicted."""
    measured: Draws | None = None
    """The same measured, the mean over draws of the rounding; None where it was not."""
    accuracy: Accuracy | None = None
    """None without labels, or where it was not measured."""

    @property
    def predicted_db(self) -> float:
        """What the output should keep, in dB."""
        return decibels(1.0, self.predicted)

    @property
    def measured_db(self) -> float:
        """What the output keeps, in dB; NaN where it was not measured."""
        return nan if self.measured is None else decibels(1.0, self.measured.mean)


@dataclass(frozen=True)
class Verified:
    """What a run with rounded weights showed of the chosen widths, beside one width for all layers at equal size."""

    sqnr_db: float
    """What the output keeps; the mean over draws of the rounding."""
    spread_db: float
    """Standard deviation of the draws."""
    uniform_db: float
    """What it keeps with one width for all layers that takes as many bytes: where that is between two widths, their dB
    are interpolated by size. NaN where the chosen mix is smaller than the narrowest width, or larger than the widest.
    """
    accuracy: Accuracy | None = None
    """How many answers are right; its error is that of the difference to :attr:`uniform_accuracy`."""
    uniform_accuracy: float = nan
    """The same with one width for all, interpolated likewise."""
    float_accuracy: float = nan
    """The same with nothing rounded."""
    answers: int = 0
    """How many answers the accuracies rest on."""

    @property
    def gain_db(self) -> float:
        """How many dB the mix keeps more than one width for all."""
        return self.sqnr_db - self.uniform_db


@dataclass(frozen=True)
class BitWidths:
    """A width for each layer of a model; made by :func:`qvis.bit_widths`."""

    name: str
    framework: str
    layers: tuple[LayerWidths, ...]
    """In the model's own order, with what every width would cost."""
    chosen: Mix
    """The widths that were chosen."""
    verified: Verified
    """What a run showed of them."""
    frontier: tuple[Mix, ...]
    """The best mixes for other sizes, from the smallest to the largest. Some are measured, and what is predicted of the
    others is corrected by these."""
    uniform: tuple[Mix, ...]
    """One width for all layers, from the narrowest to the widest, measured."""
    asked: str
    """What was asked for, in words: ``5 bits on average``."""
    granularities: tuple[Granularity, ...]
    """What may share a step; :attr:`uniform` has the first."""
    corrected: tuple[str, ...] = ()
    """What became of the attempts to win back accuracy, where it did not follow; empty where it did."""
    replaced: Mix | None = None
    """The mix of least damage, where one with better answers was chosen instead."""
    rest_bytes: int = 0
    """What the numbers take that are not rounded, at :data:`FLOAT_BYTES` each: biases, and layers left out."""
    samples: int = 0
    source: str = ""
    """What it rests on: ``64 samples``, ``made-up inputs``."""
    notes: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    """Layers that stay in float, and why."""
    network: Network | None = field(default=None, repr=False, compare=False)
    """The layers as they were judged, with normalizations folded in."""

    @cached_property
    def bits(self) -> dict[str, int]:
        """The chosen width of each layer, by name."""
        return {name: grid.bits for name, grid in self.chosen.grids.items()}

    @property
    def predicted(self) -> float:
        """What the output should keep with the chosen widths by the noise model, in dB."""
        return self.chosen.predicted_db

    @property
    def bytes(self) -> int:
        """What the whole model takes with the chosen widths."""
        return self.chosen.bytes + self.rest_bytes

    @cached_property
    def by_name(self) -> dict[str, LayerWidths]:
        """Each layer by its name."""
        return {layer.name: layer for layer in self.layers}

    @property
    def verdict(self) -> str:
        """What was chosen and what it brings, in one sentence."""
        found = self.verified
        text = f"At {self.chosen.average_bits:.2f} bits on average the output keeps {found.sqnr_db:.1f} dB"
        if isfinite(found.gain_db):
            gain = f"{abs(found.gain_db):.1f} dB {'more' if found.gain_db > 0 else 'less'} than"
            text += (
                f", {'as much as' if abs(found.gain_db) < 0.05 else gain} with one width for all layers at equal size"
            )
        if found.accuracy is not None:
            right, exact = (f"{100 * one:.1f} %" for one in (found.accuracy.share, found.float_accuracy))
            text += f"; {right} of the answers are right, {exact} in float"
        return text + "."

    def write(self, out_dir: str | PathLike[str], formats: Sequence[str] = ("html",)) -> WidthsReport:
        """Write the page into ``out_dir`` as ``bit_widths.html``; see :meth:`qvis.Report.write`."""
        from qvis.report.bit_widths import WidthsReport

        return WidthsReport(self).write(out_dir, formats)

    def export(self, path: str | PathLike[str], format: str = "json") -> tuple[str, ...]:
        """Write the chosen widths down for a tool; see :func:`qvis.exporting.export_widths`.

        Parameters
        ----------
        path
            The file. One that is there is replaced if it is such an export of qvis, else left alone.
        format
            ``json``, ``csv``, ``aimet``, ``torchao`` or ``onnxruntime``.

        Returns
        -------
        tuple of str
            By the names of layers, what the file does not tell or tells otherwise, and why; then how to use it.

        Raises
        ------
        BadArgumentError
            There is no such format, or the model's layers are not at hand.
        OutputError
            The tool cannot be told any of the layers, the file cannot be written, or somebody else wrote it.
        """
        from qvis.exporting.files import write_export

        made = self.write_down(format)
        write_export(path, made.text, format)
        return made.notes

    def write_down(self, format: str) -> Exported:
        """What :meth:`export` puts into a file; raises what it raises."""
        from qvis.exporting import export_widths

        if self.network is None:
            raise BadArgumentError("export: the layers of the model are not at hand; call qvis.bit_widths once more")
        made = export_widths(self.network, self.chosen.grids, format)
        if not made.text:
            raise OutputError(f"format: {format!r} cannot be told any of the layers; {'; '.join(made.notes)}")
        return made

    def __repr__(self) -> str:
        return f"<bit widths of {self.name}, {self.source}, {self.asked}: {self.verdict}>"


def stored_bits(channels: int, elements: int, grid: WeightGrid) -> int:
    """What the codes and scales of a layer take on a grid, packed without gaps."""
    groups = 1 if isinstance(grid.granularity, str) else -(-elements // grid.granularity)
    scales = 1 if grid.granularity == "tensor" else channels * groups
    return channels * elements * grid.bits + scales * SCALE_BITS


def stored_bytes(channels: int, elements: int, grid: WeightGrid) -> int:
    """The same in whole bytes, as :attr:`qvis.quantization.grids.Fitted.bytes` has it."""
    return -(-stored_bits(channels, elements, grid) // 8)


def interpolate(at: float, sizes: FloatArray, values: FloatArray) -> float:
    """The value at a size between others, (points,), linear; NaN outside of them."""
    order = np.argsort(sizes)
    return float(np.interp(at, sizes[order], values[order], left=nan, right=nan))
