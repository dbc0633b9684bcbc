"""Handles the messages that an ONNX model is made of: what is in them, new numbers and nodes, and files."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qvis.adapters.encodings import Array
from qvis.errors import OutputError

LIMIT = 2**31 - 1
"""Bytes that a message of protocol buffers can have, and so a model that is handed on in memory."""
REAL = {1: np.float32, 10: np.float16, 11: np.float64}
"""ONNX's numbers for the types that can be replaced, with NumPy's."""

Slot = tuple[str, int]
"""A node, by the name of its first result, and the number of one of its inputs."""


def attribute(node: Any, name: str, default: Any) -> Any:
    """An attribute of a node, in Python's own types."""
    import onnx

    for one in node.attribute:
        if one.name == name:
            value = onnx.helper.get_attribute_value(one)
            return value.decode() if isinstance(value, bytes) else value
    return default


def number_of_type(array: Array) -> int:
    """ONNX's number for the type of an array."""
    return next(number for number, kind in REAL.items() if kind == array.dtype)


def tensors_of(graph: Any) -> Mapping[str, Any]:
    """The stored tensors of a graph, those of nodes by the name of the result."""
    found = {one.name: one for one in graph.initializer}
    for node in graph.node:
        values = [one.t for one in node.attribute if one.name == "value" and one.HasField("t")]
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx") and values:
            found[node.output[0]] = values[0]
    return found


def nodes_of(graph: Any) -> Mapping[str, Any]:
    """The nodes of a graph by their first results."""
    return {first_result(node): node for node in graph.node}


def first_result(node: Any) -> str:
    """The name of a node's first result."""
    return next(filter(None, node.output), "")


def captured_names(node: Any) -> Iterator[str]:
    """What the graphs inside a node take from around them, or make themselves."""
    for one in node.attribute:
        for graph in (one.g, *one.graphs):
            yield from captured(graph)


def captured(graph: Any) -> Iterator[str]:
    """What a graph inside a node takes from around it, or makes itself."""
    yield from (one.name for one in (*graph.output, *graph.initializer))
    for node in graph.node:
        yield from node.input
        yield from node.output
        yield from captured_names(node)


def replace_numbers(tensor: Any, array: Array) -> None:
    """Put other numbers of the same type and shape into a tensor; its name and what else it says stay."""
    for name in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "raw_data", "external_data"):
        tensor.ClearField(name)
    tensor.ClearField("data_location")
    tensor.raw_data = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def unused(title: str, taken: Collection[str]) -> str:
    """The title, or with a number behind it where that is taken."""
    numbered = (title, *(f"{title}#{number}" for number in range(2, len(taken) + 3)))
    return next(one for one in numbered if one not in taken)


def multiply_inputs(graph: Any, factors: Mapping[Slot, tuple[str, str]], taken: set[str]) -> None:
    """Put a Mul before inputs of nodes.

    Parameters
    ----------
    graph
        A ``GraphProto``, which is changed.
    factors
        By input, the tensor to multiply by and the layer whose input it is.
    taken
        The names of all values, to which those of the new ones are added.
    """
    import onnx

    infos = {one.name: one for part in (graph.input, graph.value_info) for one in part}
    titles = {node.name for node in graph.node}
    nodes = nodes_of(graph)
    before: dict[str, list[Any]] = {}
    for (node, index), (tensor, layer) in factors.items():
        given, result = nodes[node].input[index], unused(f"{layer}.multiplied", taken)
        title = unused(f"{layer}.multiply", titles)
        taken.add(result)
        titles.add(title)
        before.setdefault(node, []).append(onnx.helper.make_node("Mul", [given, tensor], [result], title))
        nodes[node].input[index] = result
        if given in infos:
            info = graph.value_info.add()
            info.CopyFrom(infos[given])
            info.name = result
    if before:
        ordered = [one for node in graph.node for one in (*before.get(first_result(node), ()), node)]
        copies = [type(one).FromString(one.SerializeToString()) for one in ordered]
        del graph.node[:]
        graph.node.extend(copies)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def load_proto(model: Any) -> Any:
    """A copy of one's own, as it is."""
    import onnx

    if isinstance(model, Path):
        return onnx.load(str(model))
    copy = onnx.ModelProto()
    copy.CopyFrom(model if isinstance(model, onnx.ModelProto) else model.model_proto)
    return copy


def save_proto(model: Any, path: Path) -> None:
    """Write a model to a file; what is larger than 2 GB with its numbers in a file beside it.

    Raises
    ------
    OutputError
        The suffix is not ``.onnx``.
    """
    import onnx

    if path.suffix.lower() != ".onnx":
        raise OutputError(f"path: an ONNX model cannot be saved to {path.name!r}; name it .onnx")
    proto = model if isinstance(model, onnx.ModelProto) else model.model_proto
    # beside the large tensors a model is small; asking one that is too large for its size is an error
    if sum(len(one.raw_data) for one in proto.graph.initializer) <= LIMIT - (1 << 24) and proto.ByteSize() <= LIMIT:
        onnx.save_model(proto, str(path))
        return
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)  # saving moves the numbers out of it
    onnx.save_model(copy, str(path), save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)
