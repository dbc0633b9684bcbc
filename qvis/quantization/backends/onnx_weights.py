"""Brings a copy of an ONNX model to where ONNX Runtime's quantizers can take it, and stores weights as integers.

Quantizers are told of initializers and nodes, which have other names once normalizations and constants are folded. So
each node that applies a weight gets a name that it keeps, and its layer is found again by that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qvis.adapters.encodings import Array
from qvis.adapters.onnx.names import of_tensor, shared_name
from qvis.adapters.onnx.prepared import Prepared, prepare
from qvis.adapters.onnx.protos import attribute, captured_names, replace_numbers, unused
from qvis.errors import UnsupportedModelError
from qvis.layers import FloatArray
from qvis.quantization.grids import Scheme
from qvis.quantization.methods import FLOAT

OPSETS = {8: 13, 4: 21}
"""The first version of ONNX's operators with a step for each channel, and the first with integers of four bits."""
COVERED = 8
"""So many bits suffice for a grid that covers all of a weight; of fewer one that clips it leaves less error."""
_DEFAULT = ("", "ai.onnx")


@dataclass(frozen=True)
class Weight:
    """A stored tensor that layers take their weights from."""

    tensor: str
    layers: tuple[str, ...]
    """Several where the gates of a recurrent layer lie in one tensor."""
    bits: int
    axis: int | None
    """The axis along which each index has a step of its own; None for one step."""
    nodes: tuple[str, ...]
    """The names of the nodes that apply it."""
    kinds: frozenset[str]
    """What these are: ``Conv``, ``Gemm``, ..."""
    given: FloatArray | None = None
    """Steps that training has found; None where they follow from the weight."""

    def steps(self, array: Array) -> FloatArray:
        """The steps of a symmetric grid without the lowest code, (1,) or one for each index along the axis.

        The grid covers the weight at 8 bits. Below, it is the one that leaves the least mean square error.
        """
        rows = array.reshape(1, -1) if self.axis is None else np.moveaxis(array, self.axis, 0)
        rows = rows.reshape(len(rows), -1)
        if self.given is not None and len(self.given) == len(rows):
            return self.given.astype(np.float32)
        scheme = Scheme("uniform", self.bits, "channel", range="minmax" if self.bits >= COVERED else "mse")
        steps: FloatArray = scheme.fit(rows).scale.reshape(-1).astype(np.float32)
        steps[steps == 0] = 1
        return steps

    def codes(self, array: Array) -> Array:
        """The integers, as int8, whatever the width."""
        most = 2 ** (self.bits - 1) - 1
        codes: Array = np.clip(np.rint(array / self._along(array)), -most, most).astype(np.int8)
        return codes

    def rounded(self, array: Array) -> Array:
        """What the integers stand for."""
        rounded: Array = (self.codes(array) * self._along(array)).astype(array.dtype)
        return rounded

    def _along(self, array: Array) -> FloatArray:
        """The steps, to be multiplied with."""
        steps = self.steps(array)
        if self.axis is None:
            return steps
        return steps.reshape([-1 if axis == self.axis else 1 for axis in range(array.ndim)])


@dataclass(frozen=True)
class Ready:
    """A model of one's own, with constants folded, and normalizations folded into the weights before them."""

    prepared: Prepared
    weights: tuple[Weight, ...]

    @property
    def model(self) -> Any:
        """The ``ModelProto``."""
        return self.prepared.model

    def rounded(self) -> list[Weight]:
        """The tensors that do not stay in float."""
        return [weight for weight in self.weights if weight.bits != FLOAT]

    def nodes_in_float(self) -> list[str]:
        """The names of the nodes whose layers are to stay in float."""
        return [name for weight in self.weights if weight.bits == FLOAT for name in weight.nodes]


def make_ready(
    given: Prepared,
    bits: Mapping[str, int],
    granularity: str,
    folder: Path,
    steps: Mapping[str, FloatArray] | None = None,
) -> Ready:
    """Fold what can be folded, and find the tensor of each layer.

    Parameters
    ----------
    given
        The model as it is; it is changed.
    bits
        The width of each layer.
    granularity
        ``channel`` or ``tensor``.
    folder
        For files that are only needed for a while.
    steps
        Steps of layers that training has found.

    Raises
    ------
    UnsupportedModelError
        The model cannot be brought to the operators that its widths take, or the tensor of a layer is not found.
    """
    _name_nodes(given.model.graph)
    before = _layers_by_node(given)
    _take_constants_from_inputs(given.model.graph)
    _raise_opset(given, max((OPSETS[width] for width in bits.values() if width in OPSETS), default=1))
    found = prepare(_folded(given.model, folder), UnsupportedModelError)
    _name_nodes(found.model.graph)
    originals = _originals(found, bits, before)
    _name_after_layers(found, originals)
    weights = tuple(_weights(found, originals, bits, granularity, steps or {}))
    missing = [name for name, width in bits.items() if width != FLOAT and name not in set(originals.values())]
    if missing:
        raise UnsupportedModelError(
            f"model: {', '.join(map(repr, missing))} cannot be found again once constants are folded; "
            f"leave it in float with exclude={missing!r}"
        )
    return Ready(found, tuple(_renamed(found, weights)))


def _name_nodes(graph: Any) -> None:
    """Give each node a name that no other has."""
    taken: set[str] = set()
    for node in graph.node:
        node.name = unused(node.name or f"{node.op_type}_{len(taken)}", taken)
        taken.add(node.name)


def _take_constants_from_inputs(graph: Any) -> None:
    """Before version 4 of the format all initializers were inputs too, which keeps them from being folded."""
    constants = {tensor.name for tensor in graph.initializer}
    kept = [one for one in graph.input if one.name not in constants]
    if len(kept) < len(graph.input):
        _put(graph.input, kept)


def _raise_opset(prepared: Prepared, wanted: int) -> None:
    import onnx.version_converter

    version = prepared.opset()
    if version >= wanted:
        return
    try:
        prepared.model.CopyFrom(onnx.version_converter.convert_version(prepared.model, wanted))
    except Exception as error:  # it has no rule for an operator, or does not know it
        why = " ".join(str(error).split())[:200]
        raise UnsupportedModelError(
            f"model: it is written for opset {version}, its widths take opset {wanted}, and it cannot be converted "
            f"({why}); export it with opset {wanted}" + (" or choose 8 bits" if wanted == OPSETS[4] else "")
        ) from error


def _folded(model: Any, folder: Path) -> Any:
    """The model after those of ONNX Runtime's optimizations that every engine can run the result of."""
    import onnx
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folder / "folded.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    folded = onnx.load(folder / "folded.onnx")
    domains = {node.domain for node in folded.graph.node}
    kept = [one for one in folded.opset_import if one.domain in domains or one.domain in _DEFAULT]
    _put(folded.opset_import, kept)  # it names all that it knows
    constants = {tensor.name for tensor in folded.graph.initializer}
    # a quantizer that turns a constant around would leave its old shape there
    _put(folded.graph.value_info, [one for one in folded.graph.value_info if one.name not in constants])
    return folded


# ---------------------------------------------------------------------------------------------------------------------
# Layers


def _originals(found: Prepared, bits: Mapping[str, int], before: Mapping[str, list[str]]) -> dict[str, str]:
    """What each layer of the folded model was called before: by the nodes that apply it, else by its name.

    A node has several layers where they are the gates of a recurrent layer, in the same order before and after.
    """
    originals = {name: name for name in found.layers if name in bits}
    for node, names in _layers_by_node(found).items():
        # a fused node begins with the name of what it was made from
        known = max((one for one in before if node.startswith(one)), key=len, default="")
        if len(before.get(known, ())) == len(names):
            originals.update(zip(names, before[known], strict=True))
    return {name: before for name, before in originals.items() if name in found.layers and before in bits}


def _name_after_layers(found: Prepared, originals: Mapping[str, str]) -> None:
    """Let nodes with several layers have their name, which their tensors cannot have."""
    nodes = {node.name: node for node in found.model.graph.node}
    for name, layers in _layers_by_node(found).items():
        if len(layers) > 1:
            nodes[name].name = unused(shared_name([originals.get(one, one) for one in layers]), nodes.keys() - {name})


def _layers_by_node(prepared: Prepared) -> dict[str, list[str]]:
    layers: dict[str, list[str]] = {}
    for use in prepared.uses:
        if use.node in prepared.nodes:
            layers.setdefault(prepared.nodes[use.node].name, []).append(use.layer)
    return layers


def _weights(
    found: Prepared,
    originals: Mapping[str, str],
    bits: Mapping[str, int],
    granularity: str,
    steps: Mapping[str, FloatArray],
) -> Iterable[Weight]:
    layers: dict[str, list[str]] = {}
    for name in originals:
        layers.setdefault(found.layers[name].tensor, []).append(name)
    for tensor, names in layers.items():
        nodes = {found.nodes[use.node].name: found.nodes[use.node] for use in found.uses if use.layer in names}
        words = found.layers[names[0]].layer.channels
        axes = re.findall(r"axis (\d+)", words) if "reshape" not in words else []
        yield Weight(
            tensor,
            tuple(originals[name] for name in names),
            bits[originals[names[0]]],
            int(axes[-1]) if axes and granularity == "channel" else None,
            tuple(nodes),
            frozenset(node.op_type for node in nodes.values()),
            steps.get(originals[names[0]]) if len(names) == 1 else None,
        )


def _renamed(found: Prepared, weights: Iterable[Weight]) -> Iterable[Weight]:
    """Let the tensors have the names of their layers, by which they are found in the file that is written."""
    graph = found.model.graph
    taken = {tensor.name for tensor in graph.initializer} | {name for node in graph.node for name in node.output}
    hidden = {name for node in graph.node for name in captured_names(node)}
    for weight in weights:
        layer = weight.layers[0]
        wanted = "weight" if layer == "(root)" else f"{layer}.weight"
        alone = len(weight.layers) == 1 and weight.tensor not in hidden
        if not alone or of_tensor(weight.tensor) == layer or wanted in taken:
            yield weight
            continue
        found.constants[weight.tensor].name = wanted
        taken.add(wanted)
        for node in graph.node:
            for slot, name in enumerate(node.input):
                node.input[slot] = wanted if name == weight.tensor else name
        yield replace(weight, tensor=wanted)


# ---------------------------------------------------------------------------------------------------------------------
# Integers


def store_as_integers(model: Any, weights: Iterable[Weight]) -> None:
    """Put the integers of some tensors into a model in place of the floats, and a DequantizeLinear behind them."""
    import onnx

    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    taken = {*tensors, *(name for node in graph.node for name in node.output)}
    nodes = []
    for weight in weights:
        tensor = tensors[weight.tensor]
        array = onnx.numpy_helper.to_array(tensor)
        steps = weight.steps(array)
        codes = unused(f"{weight.tensor}_quantized", taken)
        scale = unused(f"{weight.tensor}_scale", taken)
        taken |= {codes, scale}
        made = graph.initializer.add()
        made.CopyFrom(onnx.numpy_helper.from_array(steps[0] if weight.axis is None else steps, scale))
        attributes: dict[str, Any] = {} if weight.axis is None else {"axis": weight.axis}
        name = f"{weight.tensor}_DequantizeLinear"
        nodes.append(onnx.helper.make_node("DequantizeLinear", [codes, scale], [weight.tensor], name, **attributes))
        _write_codes(tensor, weight.codes(array), weight.bits, codes)
    _put_first(graph, nodes)


def clip(model: Any, weights: Iterable[Weight]) -> list[Weight]:
    """Bring weights to their grids, so that whoever rounds them to bytes finds no code beyond those of their width.

    Returns the weights with these grids, each of one step where rows are looked up in it.
    """
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    found = []
    for weight in weights:
        array = numpy_helper.to_array(tensors[weight.tensor])
        shared = replace(weight, axis=None) if "Gather" in weight.kinds else weight
        fixed = replace(shared, given=shared.steps(array))
        replace_numbers(tensors[weight.tensor], fixed.rounded(array))
        found.append(fixed)
    return found


def pack(model: Any, weights: Iterable[Weight]) -> None:
    """Store integers of four bits, which lie in bytes, two to a byte.

    A Cast makes bytes of them again, which ONNX Runtime does once, when it loads the model; its kernels take bytes.
    """
    import onnx

    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    casts: dict[str, Any] = {}
    for weight in weights:
        codes = f"{weight.tensor}_quantized"
        if weight.bits != 4 or codes not in tensors:
            continue
        array = onnx.numpy_helper.to_array(tensors[codes])
        kind = tensors[codes].data_type
        _write_codes(tensors[codes], array, 4, codes)
        casts[codes] = onnx.helper.make_node("Cast", [codes], [f"{codes}_bytes"], f"{codes}_Cast", to=kind)
    for node in graph.node:
        for slot, name in enumerate(node.input):
            if name in casts:
                node.input[slot] = casts[name].output[0]
    _put_first(graph, casts.values())


def _write_codes(tensor: Any, codes: Array, bits: int, name: str) -> None:
    import onnx

    if bits == 4:
        narrow = onnx.TensorProto.UINT4 if codes.dtype == np.uint8 else onnx.TensorProto.INT4
        kind = onnx.helper.tensor_dtype_to_np_dtype(narrow)
        tensor.CopyFrom(onnx.numpy_helper.from_array(codes.astype(kind), name))
    else:
        tensor.CopyFrom(onnx.numpy_helper.from_array(codes, name))


def _put_first(graph: Any, nodes: Iterable[Any]) -> None:
    _put(graph.node, [*nodes, *graph.node])


def _put(field: Any, messages: Iterable[Any]) -> None:
    """Let these be the messages of a field, some of which may be there already."""
    copies = [type(one).FromString(one.SerializeToString()) for one in messages]
    del field[:]
    field.extend(copies)


# ---------------------------------------------------------------------------------------------------------------------
# What quantizers would do wrongly, or not at all


def turn_gemms(ready: Ready) -> None:
    """Turn matrices around that Gemm takes transposed; quantize_dynamic would do so once for each node that shares one.

    One that is also used as it is, such as a tied embedding, gets a copy.
    """
    import onnx

    graph = ready.model.graph
    for weight in ready.weights:
        users = [node for node in graph.node if weight.tensor in node.input]
        turned = [node for node in users if node.op_type == "Gemm" and attribute(node, "transB", 0)]
        turned = [node for node in turned if node.input[1] == weight.tensor]
        if not turned:
            continue
        array = np.ascontiguousarray(ready.prepared.read(weight.tensor).T)
        name = weight.tensor if len(turned) == len(users) else f"{weight.tensor}_transposed"
        tensor = ready.prepared.constants[weight.tensor] if name == weight.tensor else graph.initializer.add()
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
        for node in turned:
            node.input[1] = name
            _put(node.attribute, [one for one in node.attribute if one.name != "transB"])


def pool_means(ready: Ready) -> None:
    """Turn the mean over a picture, as PyTorch writes it, into the pooling that ONNX Runtime has for integers."""
    import onnx

    graph = ready.model.graph
    new = []
    for node in graph.node:
        if node.op_type != "ReduceMean" or not _is_over_picture(node, ready.prepared):
            new.append(node)
            continue
        keep = attribute(node, "keepdims", 1)
        pooled = node.output[0] if keep else f"{node.output[0]}_pooled"
        new.append(onnx.helper.make_node("GlobalAveragePool", node.input[:1], [pooled], node.name))
        if not keep:
            new.append(onnx.helper.make_node("Flatten", [pooled], [node.output[0]], f"{node.name}_Flatten"))
    _put(graph.node, new)
    used = {name for node in graph.node for name in (*node.input, *captured_names(node))}
    used |= {one.name for one in graph.output}
    _put(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in used])
    ready.prepared.__dict__.pop("constants", None)  # so that they are listed anew


def _is_over_picture(node: Any, prepared: Prepared) -> bool:
    axes = attribute(node, "axes", None)
    if len(node.input) > 1 and node.input[1] in prepared.constants:
        axes = prepared.read(node.input[1]).tolist()
    sizes = prepared.shape_of(node.input[0])
    return sizes is not None and len(sizes) == 4 and axes is not None and {axis % 4 for axis in axes} == {2, 3}
