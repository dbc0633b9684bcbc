"""What the scales of cross-layer equalization are chosen by: the weights of layers and what enters them, by channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qvis.errors import BadArgumentError
from qvis.layers import FloatArray, IntArray


@dataclass(frozen=True, eq=False)
class LayerTerm:
    """One layer's weights, as those pairs of an output and an input channel that have any; flat arrays, (pairs,)."""

    name: str
    row_variable: IntArray
    """The variable that scales the output channel, or -1."""
    column_variable: IntArray
    """The variable that scales the input channel, or -1."""
    magnitude: FloatArray
    """The largest absolute weight over kernel positions."""
    importance: FloatArray
    """The mean over samples of squared derivatives of the outputs, summed over kernel positions."""
    row: IntArray
    """The output channel, by which grids are told apart where each has one."""

    @classmethod
    def of(
        cls,
        name: str,
        outputs: IntArray,
        inputs: IntArray,
        magnitude: FloatArray,
        importance: FloatArray,
        *,
        groups: int = 1,
    ) -> LayerTerm:
        """Take the pairs out of matrices.

        Parameters
        ----------
        name
            The layer.
        outputs, inputs
            The variable of each output and each input channel, or -1; (rows,) and (columns * groups,).
        magnitude, importance
            Of each pair, (rows, columns); in a grouped convolution, the columns are the channels of the row's group.
        groups
            How many groups the channels are split into.

        Raises
        ------
        BadArgumentError
            The shapes do not fit.
        """
        outputs, inputs, magnitude = np.asarray(outputs), np.asarray(inputs), np.asarray(magnitude)
        wanted = (len(outputs), len(inputs) // groups)
        if magnitude.shape != wanted or len(outputs) % groups or len(inputs) % groups:
            raise BadArgumentError(
                f"magnitude: {name} has shape {magnitude.shape}, expected {wanted} for {len(outputs)} output and "
                f"{len(inputs)} input channels in {groups} groups; give one number for each pair of channels"
            )
        rows, columns = wanted
        row = np.repeat(np.arange(rows), columns)
        column = row // max(1, rows // groups) * columns + np.tile(np.arange(columns), rows)
        return cls(name, outputs[row], inputs[column], magnitude.ravel(), np.asarray(importance).ravel(), row)

    def check(self, count: int) -> None:
        """Raise a BadArgumentError where the arrays are not what they must be."""
        _check_arrays(
            f"layers: {self.name}",
            {"magnitude": self.magnitude, "importance": self.importance},
            {"row_variable": self.row_variable, "column_variable": self.column_variable},
            count,
        )
        if np.shape(self.row) != np.shape(self.magnitude):
            raise BadArgumentError(
                f"layers: {self.name}: row has shape {np.shape(self.row)}, expected {np.shape(self.magnitude)}"
            )


@dataclass(frozen=True, eq=False)
class InputTerm:
    """What enters one layer, on one asymmetric grid; arrays (channels,)."""

    name: str
    variable: IntArray
    """The variable that scales each channel, or -1."""
    range: FloatArray
    """From the smallest value to the largest, or the largest absolute one."""
    importance: FloatArray
    """The mean over samples of squared derivatives of the outputs, summed over positions."""

    def check(self, count: int) -> None:
        """Raise a BadArgumentError where the arrays are not what they must be."""
        numbers = {"range": self.range, "importance": self.importance}
        _check_arrays(f"inputs: {self.name}", numbers, {"variable": self.variable}, count)


def _check_arrays(what: str, numbers: dict[str, FloatArray], variables: dict[str, IntArray], count: int) -> None:
    shape = (len(next(iter(variables.values()))),)
    for name, array in {**numbers, **variables}.items():
        if np.shape(array) != shape:
            raise BadArgumentError(f"{what}: {name} has shape {np.shape(array)}, expected {shape}")
    for name, number in numbers.items():
        if not np.all((number >= 0) & np.isfinite(number)):
            raise BadArgumentError(f"{what}: {name} has negative or infinite numbers or NaN; leave it out")
    for name, variable in variables.items():
        if len(variable) and (np.min(variable) < -1 or np.max(variable) >= count):
            raise BadArgumentError(f"{what}: {name} has numbers outside -1 to {count - 1}, those of the variables")


def check_terms(count: int, layers: Sequence[LayerTerm], inputs: Sequence[InputTerm] = ()) -> None:
    """Raise a BadArgumentError that names the first layer whose arrays are not what they must be."""
    for term in layers:
        term.check(count)
    for entering in inputs:
        entering.check(count)
