"""Which inputs of a TensorFlow Lite operator are weights, and where in them its output channels are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from qvis.adapters.matrices import Part, along
from qvis.adapters.tflite.flatbuffer import Table
from qvis.adapters.values import Value


@dataclass(frozen=True)
class Operator:
    """One operator of a graph."""

    op: str
    inputs: tuple[int, ...]
    """Numbers of tensors, -1 for none."""
    outputs: tuple[int, ...]
    options: Table | None

    def flag(self, field: int) -> int:
        """An option that is a number of one byte."""
        return 0 if self.options is None else self.options.number(field, "b")


Inputs = Sequence["Value | None"]
Rule = Callable[[Operator, Inputs], Iterable[Part]]
"""(an operator, its inputs where they are constant) -> its weights."""


def _get(inputs: Inputs, index: int, axes: int = 2) -> Value | None:
    value = inputs[index] if index < len(inputs) else None
    return value if value is not None and value.floating and len(value.shape) >= axes else None


def _axis(operator: Operator, inputs: Inputs, axis: int, axes: int = 2) -> Iterable[Part]:  # noqa: ARG001
    value = _get(inputs, 1, axes)
    return [] if value is None else [along(value, [axis])]


def _gather(operator: Operator, inputs: Inputs) -> Iterable[Part]:
    """An embedding, when rows of it are chosen by what flows through the graph."""
    value = _get(inputs, 0)
    axis = 0 if operator.options is None else operator.options.number(0, "i")
    constant = len(inputs) > 1 and inputs[1] is not None
    return [] if value is None or constant or axis != 0 else [along(value, [0])]


def _matmul(operator: Operator, inputs: Inputs) -> Iterable[Part]:
    """Each matrix of a stack makes its own output channels."""
    left, right = _get(inputs, 0), _get(inputs, 1)
    value = right if right is not None else left
    if value is None:
        return []
    stack = [axis for axis in range(len(value.shape) - 2) if value.shape[axis] > 1]
    turned = operator.flag(1 if right is not None else 0)
    rows = (-2 if turned else -1) if right is not None else (-1 if turned else -2)
    return [along(value, [*stack, rows])]


def _gates(operator: Operator, inputs: Inputs, starts: Sequence[tuple[int, str]]) -> Iterable[Part]:  # noqa: ARG001
    """Four matrices for the input and four for the state, each a tensor of its own, then a projection."""
    for start, way in starts:
        names = [*(f"W.{gate}" for gate in "ifco"), *(f"R.{gate}" for gate in "ifco")]
        places = [*range(start, start + 8), start + 15]
        for index, name in zip(places, [*names, "P"], strict=True):
            value = _get(inputs, index)
            if value is not None:
                yield along(value, [0], f"{way}{name}")


def _plain_gates(operator: Operator, inputs: Inputs, starts: Sequence[tuple[int, str]]) -> Iterable[Part]:  # noqa: ARG001
    for start, way in starts:
        for index, name in ((start, "W"), (start + 1, "R")):
            value = _get(inputs, index)
            if value is not None:
                yield along(value, [0], f"{way}{name}")


RULES: dict[str, Rule] = {
    "CONV_2D": partial(_axis, axis=0),
    "DEPTHWISE_CONV_2D": partial(_axis, axis=-1, axes=4),
    "FULLY_CONNECTED": partial(_axis, axis=0),
    "TRANSPOSE_CONV": partial(_axis, axis=0),
    "CONV_3D": partial(_axis, axis=-1, axes=5),
    "CONV_3D_TRANSPOSE": partial(_axis, axis=-2, axes=5),
    "EMBEDDING_LOOKUP": partial(_axis, axis=0),
    "GATHER": _gather,
    "BATCH_MATMUL": _matmul,
    "LSTM": partial(_gates, starts=[(1, "")]),
    "UNIDIRECTIONAL_SEQUENCE_LSTM": partial(_gates, starts=[(1, "")]),
    "RNN": partial(_plain_gates, starts=[(1, "")]),
    "UNIDIRECTIONAL_SEQUENCE_RNN": partial(_plain_gates, starts=[(1, "")]),
    "BIDIRECTIONAL_SEQUENCE_LSTM": partial(_gates, starts=[(1, "forward."), (18, "backward.")]),
    "BIDIRECTIONAL_SEQUENCE_RNN": partial(_plain_gates, starts=[(1, "forward."), (5, "backward.")]),
    "SVDF": partial(_plain_gates, starts=[(1, "")]),
}
"""By the operator's name."""
