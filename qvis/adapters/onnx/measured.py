"""Shapes and sizes that a model computes on its way: found by running it once, where the rules of ONNX do not tell."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from qvis.adapters.onnx.inputs import split
from qvis.adapters.onnx.prepared import Prepared
from qvis.adapters.onnx.protos import captured_names
from qvis.adapters.onnx.sessions import compute, session
from qvis.errors import QvisError
from qvis.running import Batch

_CHOOSING = ("NonZero", "Unique", "Compress", "NonMaxSuppression", "If", "Loop", "Scan")
"""Operators that make as much of data as its numbers say."""
_SHAPED = (
    "Reshape", "Expand", "Slice", "Split", "Tile", "Pad", "Resize", "Upsample", "TopK", "OneHot", "Range",
    "ConstantOfShape", "CenterCropPad",
)  # fmt: skip
"""Operators that take the shape of what they make from their later inputs, or from all of them."""
_SEQUENCES = ("SplitToSequence", "SequenceConstruct", "SequenceInsert", "SequenceErase", "SequenceEmpty", "SequenceMap")


def measure(prepared: Prepared, example: Batch, shapes: Iterable[str], numbers: Iterable[str]) -> None:
    """Note shapes and numbers of values for the samples of ``example`` in ``prepared``.

    Left out is what other samples of the same shapes would give another shape or other numbers. Where the model cannot
    be run on the example, nothing is known.
    """
    loose = _loose(prepared)
    shapes = [name for name in dict.fromkeys(shapes) if name not in loose]
    numbers = [name for name in dict.fromkeys(numbers) if name not in loose]
    if not (shapes or numbers):
        return
    try:
        running = session(_shown(prepared, shapes, numbers))
        types = {one.name: one.type for one in running.get_inputs()}
        inputs, _ = split(prepared, types, example)
        found = compute(running, [*map(_size, shapes), *numbers], inputs[0])
    except QvisError:
        return
    prepared.sizes.update((name, tuple(map(int, one))) for name, one in zip(shapes, found, strict=False))
    prepared.numbers.update(zip(numbers, found[len(shapes) :], strict=True))


def _size(name: str) -> str:
    return f"qvis:size:{name}"


def _shown(prepared: Prepared, shapes: Collection[str], numbers: Collection[str]) -> Any:
    """A copy of the model whose results are what is to be known."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(prepared.model)
    graph = model.graph
    graph.node.extend(onnx.helper.make_node("Shape", [name], [_size(name)]) for name in shapes)
    del graph.output[:]
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in (*map(_size, shapes), *numbers))
    return model


def _loose(prepared: Prepared) -> set[str]:
    """The values whose shapes, or whose numbers if they are no data, depend on the numbers in the model's inputs."""
    data = {one.name for one in prepared.inputs}
    loose: set[str] = set()
    for node in prepared.model.graph.node:
        given = {*node.input, *captured_names(node)}
        shaping = node.input if node.op_type in ("Range", "ConstantOfShape") else node.input[1:]
        is_loose = node.op_type in _CHOOSING and not data.isdisjoint(given)
        is_loose |= node.op_type in _SHAPED and not data.isdisjoint(shaping)
        if is_loose or not loose.isdisjoint(given) or node.op_type in _SEQUENCES:
            loose.update(node.output)
        if node.op_type not in ("Shape", "Size") and not data.isdisjoint(given):
            data.update(node.output)
    return loose
