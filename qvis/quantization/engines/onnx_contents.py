"""Tells what is in an ONNX file: the graph that ONNX Runtime makes of it says what computes with integers.

A product whose activations are rounded at run time (``DynamicQuantizeMatMul``) counts as hybrid, since they are floats
in the file; ``MatMulIntegerToFloat`` behind a QuantizeLinear takes integers in, and counts as integer.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qvis.adapters.encodings import ENCODINGS
from qvis.adapters.onnx.names import shared_name
from qvis.adapters.onnx.prepared import Prepared, prepare
from qvis.adapters.onnx.protos import unused
from qvis.adapters.onnx.tensors import TYPES
from qvis.errors import NotRunnableError
from qvis.quantization.contents import Arithmetic, Contents, Operation
from qvis.words import listed_names

_MOVING = frozenset((
    "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Concat", "QLinearConcat", "Split",
    "Slice", "Gather", "GatherElements", "GatherND", "Pad", "Expand", "Tile", "Shape", "Size", "Cast", "CastLike",
    "Constant", "ConstantOfShape", "Range", "DepthToSpace", "SpaceToDepth", "ReverseSequence", "Dropout", "NonZero",
    "ScatterElements", "ScatterND", "Where", "QLinearWhere", "QuantizeLinear", "DequantizeLinear",
    "DynamicQuantizeLinear", "ReorderInput", "ReorderOutput", "SequenceAt", "SplitToSequence", "ConcatFromSequence",
    "If", "Loop", "Scan", "OneHot", "EyeLike", "Optional", "OptionalGetElement", "GatherBlockQuantized",
))  # fmt: skip
"""Operators that compute nothing, or only what is in the graphs inside them."""
_INTEGER = frozenset(("MatMulInteger", "ConvInteger", "MatMulIntegerToFloat", "MatMulInteger16", "QGemm", "QAttention"))
"""Operators on integers, besides those called QLinear; hybrid where the integers are made at run time."""
_HYBRID = frozenset(("DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "MatMulNBits", "MatMulBnb4", "QMoE"))
_REAL = ("float32", "float64", "float16", "bfloat16")
_SMALL = ("int8", "uint8", "int4", "uint4", "int16", "uint16")


def contents_of(path: Path) -> Contents:
    """What is in a file.

    Raises
    ------
    NotRunnableError
        ONNX Runtime cannot load the model.
    """
    import onnx

    stored = onnx.load(path, load_external_data=False)
    tensors = [*_tensors(stored.graph.node, stored.graph)]
    tensors += [one for function in stored.functions for one in _tensors(function.node)]
    sizes: dict[str, int] = {}
    for tensor in tensors:
        kind = TYPES.get(tensor.data_type, "unknown")
        if kind in ENCODINGS:
            sizes[kind] = sizes.get(kind, 0) + ENCODINGS[kind].bytes_for(prod(tensor.dims))
    beside = {entry.value for one in tensors for entry in one.external_data if entry.key == "location"}
    bytes_beside = sum((path.parent / name).stat().st_size for name in beside)
    operations = tuple(_operations(path))
    return Contents(operations, sizes, path.stat().st_size + bytes_beside, tuple(_notes(operations)))


def _notes(operations: tuple[Operation, ...]) -> Iterator[str]:
    stored = [one for one in operations if one.arithmetic is Arithmetic.HYBRID and one.kind not in _HYBRID | _INTEGER]
    if not stored:
        return
    note = f"{listed_names([one.layer or one.name for one in stored])}: integers in the file alone, of which ONNX "
    note += "Runtime makes floats in each call"
    if not any(one.arithmetic is Arithmetic.INTEGER or one.kind in _HYBRID | _INTEGER for one in operations):
        note += "; with its session option session.disable_quant_qdq=1 it does so once, when it loads the model"
    yield note


def _tensors(nodes: Any, graph: Any = None) -> Iterator[Any]:
    """All stored tensors, those of inner graphs too."""
    if graph is not None:
        yield from graph.initializer
    for node in nodes:
        for one in node.attribute:
            if one.HasField("t"):
                yield one.t
            for inner in (one.g, *one.graphs):
                yield from _tensors(inner.node, inner)


def _operations(path: Path) -> Iterator[Operation]:
    given = prepare(path, NotRunnableError)
    taken: set[str] = set()
    for node in given.model.graph.node:
        node.name = unused(node.name or f"{node.op_type}_{len(taken)}", taken)
        taken.add(node.name)
    layers: dict[str, list[str]] = {}
    for use in given.uses:
        if use.node in given.nodes:
            layers.setdefault(given.nodes[use.node].name, []).append(use.layer)
    optimized = prepare(_optimized(given.model), NotRunnableError)
    known = {layer for names in layers.values() for layer in names}
    after: dict[str, list[str]] = {}
    for use in optimized.uses:
        if use.layer in known:
            after.setdefault(use.node, []).append(use.layer)
    types = {name: TYPES.get(info.tensor_type.elem_type, "") for name, info in optimized.infos.items()}
    types.update({name: kind for name, kind in _types(optimized.model.graph).items() if kind})
    for node, outer in _nodes(optimized.model.graph, types):
        result = next(filter(None, node.output), "")
        names = layers.get(node.name) or after.get(result) or []
        yield Operation(node.name or result, node.op_type, _arithmetic(node, outer, optimized), shared_name(names))


def _optimized(model: Any) -> Any:
    """The graph that ONNX Runtime computes, but for the layouts that are this processor's own."""
    import onnx

    from qvis.quantization.engines.onnx import load_session

    with TemporaryDirectory() as folder:
        file = Path(folder) / "optimized.onnx"
        load_session(model.SerializeToString(), 1, file)
        return onnx.load(file)


def _types(graph: Any) -> dict[str, str]:
    """The type of each value, as far as it is known."""
    infos = (*graph.input, *graph.output, *graph.value_info)
    found = {one.name: TYPES.get(one.type.tensor_type.elem_type, "") for one in infos}
    found.update({one.name: TYPES.get(one.data_type, "") for one in graph.initializer})
    return found


def _nodes(graph: Any, types: dict[str, str]) -> Iterator[tuple[Any, dict[str, str]]]:
    """The nodes of a graph and of those inside them, with the types of all values that they see."""
    for node in graph.node:
        yield node, types
        for one in node.attribute:
            for inner in (one.g, *one.graphs):
                yield from _nodes(inner, {**types, **_types(inner)})


def _arithmetic(node: Any, types: dict[str, str], optimized: Prepared) -> Arithmetic:
    makers = [optimized.nodes.get(name) for name in node.input if name]
    kind = node.op_type
    if kind in _MOVING:
        return Arithmetic.NONE
    if kind in _HYBRID:
        return Arithmetic.HYBRID
    if kind in _INTEGER:
        at_run_time = any(maker is not None and maker.op_type == "DynamicQuantizeLinear" for maker in makers)
        return Arithmetic.HYBRID if at_run_time else Arithmetic.INTEGER
    if kind.startswith("QLinear"):
        return Arithmetic.INTEGER
    found = {types.get(name, "") for name in (*node.input, *node.output) if name}
    if found & set(_REAL) or found == {""}:
        stored = any(_is_stored(maker, optimized) for maker in makers)
        return Arithmetic.HYBRID if stored else Arithmetic.FLOAT
    return Arithmetic.INTEGER if found & set(_SMALL) else Arithmetic.NONE


def _is_stored(maker: Any, optimized: Prepared) -> bool:
    """Whether a value is made of stored integers, as a matrix at least."""
    while maker is not None and maker.op_type in ("Transpose", "Reshape", "Cast", "Squeeze", "Unsqueeze"):
        maker = optimized.nodes.get(maker.input[0])
    if maker is None or maker.op_type != "DequantizeLinear" or maker.input[0] not in optimized.constants:
        return False
    return bool(sum(size > 1 for size in optimized.constants[maker.input[0]].dims) > 1)
