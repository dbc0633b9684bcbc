"""Edits a copy of an ONNX model so that onnxruntime can be given other weights, show values, and round inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from qvis.adapters.encodings import Array
from qvis.adapters.onnx.names import norm_names
from qvis.adapters.onnx.prepared import Prepared, Use
from qvis.errors import BadArgumentError, NotRunnableError
from qvis.running import Grid

NORMS = ("scale", "shift", "mean", "variance")
"""The inputs of a BatchNormalization from the second on."""


def session(model: Any) -> Any:
    """Load a model into onnxruntime, on the CPU."""
    try:
        import onnxruntime  # type: ignore[import-untyped]
    except ImportError:
        raise NotRunnableError("model: onnxruntime is not installed; run: pip install 'qvis[onnx]'") from None

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # it warns of every initializer that is an input
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise NotRunnableError(f"model: onnxruntime cannot load it: {_line(error)}") from error


def compute(session: Any, names: Sequence[str], feeds: Mapping[str, Array]) -> list[Any]:
    """Run a session on arrays."""
    try:
        return list(session.run(list(names), dict(feeds)))
    except Exception as error:
        shapes = ", ".join(f"{name} {'x'.join(map(str, a.shape))} {a.dtype}" for name, a in list(feeds.items())[:4])
        raise BadArgumentError(f"inputs: onnxruntime failed on {shapes}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def edit(
    prepared: Prepared, replaced: Iterable[str], outputs: Iterable[str], shown: Iterable[str], rounded: Iterable[Use]
) -> Any:
    """A copy of the model that can be run as asked for.

    Parameters
    ----------
    prepared
        The model.
    replaced
        Initializers that may be given at each run. As inputs they are also kept from being folded into one another, so
        that runs with and without other weights compute the same.
    outputs, shown
        The values that are its results, and more values that can be looked at.
    rounded
        Uses of layers whose inputs are rounded to a grid that :func:`grid_feeds` gives at each run.
    """
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(prepared.model)
    graph = model.graph
    nodes = {next(filter(None, node.output), ""): node for node in graph.node}
    before: dict[str, list[Any]] = {}
    for use in rounded:
        _round(nodes[use.node], use, graph, prepared, before)
    if before:
        ordered = [new for name, node in nodes.items() for new in (*before.get(name, ()), node)]
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered]
        del graph.node[:]
        graph.node.extend(copies)
    listed = {one.name for one in graph.input}
    for tensor in graph.initializer:
        if tensor.name in replaced and tensor.name not in listed:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    wanted = dict.fromkeys((*outputs, *shown))
    kept = {one.name: one for one in graph.output}
    infos = [kept.get(name) or onnx.ValueInfoProto(name=name) for name in wanted]
    infos = [onnx.ValueInfoProto.FromString(one.SerializeToString()) for one in infos]
    del graph.output[:]
    graph.output.extend(infos)
    return model


def own_norms(prepared: Prepared) -> dict[str, tuple[list[str], float]]:
    """Give every BatchNormalization numbers of its own, and list their names and its epsilon by its name."""
    import onnx

    graph = prepared.model.graph
    found: dict[str, tuple[list[str], float]] = {}
    for result, name in norm_names(prepared).items():
        node = prepared.nodes[result]
        if name not in found:
            if any(one not in prepared.constants for one in node.input[1:5]):
                continue
            epsilon = next((one.f for one in node.attribute if one.name == "epsilon"), 1e-5)
            found[name] = ([f"qvis:{name}:{part}" for part in NORMS], epsilon)
            for source, own in zip(node.input[1:5], found[name][0], strict=True):
                tensor = onnx.TensorProto()
                tensor.CopyFrom(prepared.constants[source])
                tensor.name = own
                graph.initializer.append(tensor)
        node.input[1:5] = found[name][0]
    prepared.__dict__.pop("constants", None)  # so that they are listed anew
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Grids

_OFF = {"on": False, "step": 1.0, "zero": 0.0, "high": 1.0}


def _round(node: Any, use: Use, graph: Any, prepared: Prepared, before: dict[str, list[Any]]) -> None:
    """Put ``((clip(round(x / step) + zero, 0, high) - zero) * step`` in front of a node."""
    import onnx

    assert use.data is not None
    if prepared.opset() < 11:
        raise BadArgumentError(
            f"grids: the model is of opset {prepared.opset()}, which cannot round; make it of opset 11 or later with "
            "onnx.version_converter"
        )
    source = node.input[use.data]
    kind = prepared.type_of(source)
    known = {tensor.name for tensor in graph.initializer}
    for part, value in _OFF.items():
        name = f"qvis:{use.layer}:{part}"
        if name not in known:
            array = np.array(value, bool if part == "on" else np.float32)
            graph.initializer.append(onnx.numpy_helper.from_array(array, name))
            graph.input.append(
                onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), [])
            )
    on, step, zero, high = (f"qvis:{use.layer}:{part}" for part in _OFF)
    title = f"qvis:{use.node}:{use.data}"
    steps: list[tuple[str, list[str], dict[str, Any]]] = [
        ("Cast", [source], {"to": 1}),
        ("Div", ["", step], {}),
        ("Round", [""], {}),
        ("Add", ["", zero], {}),
        ("Max", ["", "qvis:none"], {}),
        ("Min", ["", high], {}),
        ("Sub", ["", zero], {}),
        ("Mul", ["", step], {}),
        ("Cast", [""], {"to": kind}),
        ("Where", [on, "", source], {}),
    ]
    if "qvis:none" not in known:
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(0, np.float32), "qvis:none"))
    made, last = [], source
    for number, (op, inputs, attributes) in enumerate(steps):
        given = [one or last for one in inputs]
        last = f"{title}:{number}"
        made.append(onnx.helper.make_node(op, given, [last], name=last, **attributes))
    node.input[use.data] = last
    before.setdefault(use.node, []).extend(made)


def grid_feeds(layer: str, grid: Grid) -> dict[str, Array]:
    """What turns the rounding of a layer's inputs on."""
    values = {"on": np.array(True), "step": grid.step, "zero": grid.zero, "high": 2**grid.bits - 1}
    return {
        f"qvis:{layer}:{part}": np.asarray(value, np.bool_ if part == "on" else np.float32)
        for part, value in values.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# One node alone


class Alone:
    """A node as a model of its own, to try it on another weight."""

    def __init__(self, prepared: Prepared, node: Any) -> None:
        import onnx

        self.node = node
        self.names = list(dict.fromkeys(filter(None, node.input)))
        result = next(filter(None, node.output))
        inputs = [onnx.helper.make_tensor_value_info(name, prepared.type_of(name), None) for name in self.names]
        graph = onnx.helper.make_graph([node], "alone", inputs, [onnx.ValueInfoProto(name=result)])
        model = onnx.helper.make_model(graph, opset_imports=prepared.model.opset_import)
        model.ir_version = prepared.model.ir_version
        self._session, self._result = session(model), result

    def run(self, find: Callable[[str], Array]) -> Array:
        """The node's first result."""
        array: Array = compute(self._session, [self._result], {name: find(name) for name in self.names})[0]
        return array
