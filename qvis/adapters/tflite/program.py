"""What a TensorFlow Lite file does: its operators in order, with the types of what they take and return."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qvis.adapters.tflite import TYPES, Walk, names, walked
from qvis.adapters.tflite.flatbuffer import Table
from qvis.layers import Layer

_ACTIVATIONS = {1: "relu", 2: "relu_n1_to_1", 3: "relu6", 4: "tanh", 5: "sign_bit"}
_FUSED = {
    "CONV_2D": 3,
    "DEPTHWISE_CONV_2D": 4,
    "FULLY_CONNECTED": 0,
    "TRANSPOSE_CONV": 3,
    "CONV_3D": 4,
    "CONV_3D_TRANSPOSE": 4,
}
"""The field of an operator's options that says which activation it ends with."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a graph."""

    index: int
    name: str
    type: str
    constant: bool
    """Whether its numbers are in the file."""
    quantized: bool
    """Whether its integers stand for real numbers."""

    @property
    def floating(self) -> bool:
        """Whether it holds floats."""
        return self.type.startswith(("float", "bfloat"))


@dataclass(frozen=True)
class Step:
    """One operator."""

    kind: str
    name: str
    """Of its first result, in short."""
    graph: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    layers: tuple[Layer, ...]
    """Those whose weights it uses."""
    activation: str
    """What it ends with: ``relu``, ``relu6``, ...; empty for nothing."""


@dataclass(frozen=True)
class Program:
    """All graphs of a file; the first is the model, and the others are bodies of its loops and branches."""

    steps: tuple[Step, ...]
    bytes_by_type: dict[str, int]
    """Bytes of the constants, each once, by type."""


def read_program(path: Path) -> Program:
    """What a file does.

    Raises
    ------
    BadArgumentError
        The file is damaged, or no TensorFlow Lite model.
    """
    walk = walked(path)
    order = {id(layer): layer for layer in walk.finish()}
    layers = {key: layer for key, layer in walk.layers.items() if id(layer) in order}
    steps: list[Step] = []
    stored: dict[int, tuple[str, int]] = {}
    for number, graph in enumerate(walk.model.tables(2)):
        tensors = [_tensor(walk, index, table, stored) for index, table in enumerate(graph.tables(0))]
        for table in graph.tables(3):
            kind = walk.codes[table.number(0, "I")]
            taken, made = (
                tuple(tensors[index] for index in table.numbers(field, "<i4") if 0 <= index < len(tensors))
                for field in (1, 2)
            )
            used = tuple(layers[key] for key in walk.uses.get(len(steps), ()) if key in layers)
            name = names.clean(made[0].name) if made else ""
            steps.append(Step(kind, name, number, taken, made, used, _activation(kind, table.table(4))))
    found: dict[str, int] = {}
    for kind, size in stored.values():
        found[kind] = found.get(kind, 0) + size
    return Program(tuple(steps), found)


def _tensor(walk: Walk, index: int, table: Table, stored: dict[int, tuple[str, int]]) -> TensorInfo:
    """A tensor; the size of its buffer is noted down."""
    kind = TYPES.get(table.number(1, "b"), "unknown")
    where, constant = table.number(2, "I"), False
    if 0 < where < len(walk.buffers) and not table.number(5, "b"):
        start, end = walk.span(walk.buffers[where])
        constant = end > start
        if constant:
            stored.setdefault(where, (kind, end - start))
    details = table.table(4)
    quantized = details is not None and bool(details.vector(2, 4)[1] or details.number(4, "B"))
    return TensorInfo(index, table.text(3), kind, constant, quantized and not kind.startswith(("float", "bfloat")))


def _activation(kind: str, options: Table | None) -> str:
    if options is None or kind not in _FUSED:
        return ""
    return _ACTIVATIONS.get(options.number(_FUSED[kind], "b"), "")
