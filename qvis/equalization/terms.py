"""What the scales of cross-layer equalization are chosen by: the weights of layers and what enters them, by channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qvis.errors import BadArgumentError
from qvis.layers import FloatArray, IntArray


@dataclass(frozen=True, eq=False)
class LayerTerm:
    """One layer's weights, by pairs of an output and an input channel."""

    name: str
    outputs: IntArray
    """The variable that scales each output channel, or -1; (rows,)."""
    inputs: IntArray
    """The variable that scales each input channel, or -1; (groups * columns,)."""
    magnitude: FloatArray
    """The largest absolute weight over kernel positions, (rows, columns); of a grouped convolution, the columns are the
    channels of the row's group."""
    importance: FloatArray
    """The mean over samples of squared derivatives of the outputs, summed over kernel positions; (rows, columns)."""
    groups: int = 1
    """How many groups the channels are split into, the rows in their order."""

    @property
    def row(self) -> IntArray:
        """The output channel of each pair, in order, (pairs,)."""
        return np.repeat(np.arange(len(self.outputs)), self.magnitude.shape[1])

    @property
    def row_variable(self) -> IntArray:
        """The variable of each pair's output channel, (pairs,)."""
        return np.repeat(self.outputs, self.magnitude.shape[1])

    @property
    def column_variable(self) -> IntArray:
        """The variable of each pair's input channel, (pairs,)."""
        rows, columns = self.magnitude.shape
        each = rows // self.groups
        return np.repeat(self.inputs.reshape(self.groups, 1, columns), each, axis=1).reshape(-1)

    def check(self, count: int) -> None:
        """Raise a BadArgumentError where the arrays are not what they must be."""
        rows, columns = len(self.outputs), len(self.inputs)
        wanted = (rows, columns // self.groups)
        for name, matrix in (("magnitude", self.magnitude), ("importance", self.importance)):
            if np.shape(matrix) != wanted or rows % self.groups or columns % self.groups:
                raise BadArgumentError(
                    f"layers: {self.name}: {name} has shape {np.shape(matrix)}, expected {wanted} for {rows} output "
                    f"and {columns} input channels in {self.groups} groups; give one number for each pair of channels"
                )
            _check_numbers(f"layers: {self.name}", name, matrix)
        _check_variables(f"layers: {self.name}", "outputs", self.outputs, count)
        _check_variables(f"layers: {self.name}", "inputs", self.inputs, count)


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
        for name, numbers in (("range", self.range), ("importance", self.importance)):
            if np.shape(numbers) != np.shape(self.variable):
                raise BadArgumentError(
                    f"inputs: {self.name}: {name} has shape {np.shape(numbers)}, expected {np.shape(self.variable)}"
                )
            _check_numbers(f"inputs: {self.name}", name, numbers)
        _check_variables(f"inputs: {self.name}", "variable", self.variable, count)


def _check_numbers(what: str, name: str, numbers: FloatArray) -> None:
    if not np.all((numbers >= 0) & np.isfinite(numbers)):
        raise BadArgumentError(f"{what}: {name} has negative or infinite numbers or NaN; leave it out")


def _check_variables(what: str, name: str, variables: IntArray, count: int) -> None:
    if len(variables) and (np.min(variables) < -1 or np.max(variables) >= count):
        raise BadArgumentError(f"{what}: {name} has numbers outside -1 to {count - 1}, those of the variables")


def check_terms(count: int, layers: Sequence[LayerTerm], inputs: Sequence[InputTerm] = ()) -> None:
    """Raise a BadArgumentError that names the first layer whose arrays are not what they must be."""
    for term in layers:
        term.check(count)
    for entering in inputs:
        entering.check(count)
