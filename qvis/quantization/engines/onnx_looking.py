"""Where in an ONNX graph one can see what each layer put out, without keeping ONNX Runtime from fusing the layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qvis.adapters.onnx.prepared import Prepared, Use, prepare
from qvis.adapters.onnx.protos import attribute, captured_names, first_result
from qvis.errors import NotRunnableError

_AXES = {"Conv": 1, "ConvTranspose": 1, "ConvInteger": 1, "QLinearConv": 1, "FusedConv": 1}
_LAST = (
    "Gemm", "MatMul", "Gather", "MatMulInteger", "QLinearMatMul", "QGemm", "FusedMatMul", "FusedGemm",
    "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits",
)  # fmt: skip
"""Their channels lie along the last axis of the result."""
_INTEGER = ("ConvInteger", "MatMulInteger")


@dataclass(frozen=True)
class Sight:
    """A value that shows a layer."""

    value: str
    axis: int
    activation: str = ""


def showing(model: Any) -> tuple[Any, dict[str, Sight]]:
    """A copy of a model that hands out what each layer put out, and where that is, by the layer's name."""
    prepared = prepare(model, NotRunnableError)
    users = _users(prepared)
    sights: dict[str, Sight] = {}
    for use in prepared.uses:
        if use.layer not in sights and use.node in prepared.nodes:
            sight = _sight(use, prepared, users)
            if sight is not None:
                sights[use.layer] = sight
    graph = prepared.model.graph
    given = {one.name for one in graph.output}
    for name in dict.fromkeys(sight.value for sight in sights.values()):
        if name not in given:
            graph.output.add(name=name)
    return prepared.model, sights


def _users(prepared: Prepared) -> dict[str, list[Any]]:
    users: dict[str, list[Any]] = {}
    graph = prepared.model.graph
    for node in graph.node:
        for name in (*node.input, *captured_names(node)):
            users.setdefault(name, []).append(node)
    for one in graph.output:  # which counts as a user that nothing can follow
        users.setdefault(one.name, []).append(type(graph.node[0])())
    return users


def _sight(use: Use, prepared: Prepared, users: dict[str, list[Any]]) -> Sight | None:
    node = prepared.nodes[use.node]
    if node.op_type in _LAST:
        axis = -1 if use.slot or node.op_type == "Gather" else -2
    elif node.op_type in _AXES:
        axis = 1
    else:
        return None
    sight = Sight(_after_constants(node, prepared, users), axis)
    return _after_rounding(sight, prepared, users)


def _after_constants(node: Any, prepared: Prepared, users: dict[str, list[Any]]) -> str:
    """The result of a layer with what belongs to it: its scale, its bias and a normalization by fixed numbers."""
    value = first_result(node)
    scaled = node.op_type not in _INTEGER
    while True:
        following = users.get(value, [])
        if len(following) != 1:
            return value
        user = following[0]
        if not scaled and user.op_type in ("Cast", "Mul"):
            scaled = user.op_type == "Mul"
        elif not (user.op_type == "BatchNormalization" or _adds_constant(user, value, prepared)):
            return value
        value = first_result(user)


def _adds_constant(node: Any, value: str, prepared: Prepared) -> bool:
    """Whether a node adds a vector, as a bias is."""
    if node.op_type != "Add":
        return False
    for other in node.input:
        maker = prepared.nodes.get(other)
        if maker is not None and maker.op_type == "DequantizeLinear":
            other = maker.input[0]
        if other != value and other in prepared.constants:
            sizes = list(prepared.constants[other].dims)
            return bool(sum(size > 1 for size in sizes) <= 1)
    return False


def _after_rounding(sight: Sight, prepared: Prepared, users: dict[str, list[Any]]) -> Sight:
    """The value behind an activation and a pair of QuantizeLinear and DequantizeLinear, where there are such."""
    value, activation = sight.value, ""
    while len(users.get(value, [])) == 1:
        node = users[value][0]
        if node.op_type in ("Relu", "Clip") and not activation:
            activation = "relu" if node.op_type == "Relu" else _clip(node, prepared)
            if not activation:
                break
        elif node.op_type == "QuantizeLinear":
            activation = activation or _cut(node, prepared)
        elif node.op_type == "DequantizeLinear":
            return replace(sight, value=first_result(node), activation=activation)
        else:
            break
        value = first_result(node)
        if node.op_type == "QuantizeLinear":
            back = [one for one in users.get(value, []) if one.op_type == "DequantizeLinear"]
            return replace(sight, value=first_result(back[0]), activation=activation) if back else sight
    return sight


def _clip(node: Any, prepared: Prepared) -> str:
    ends = [attribute(node, "min", None), attribute(node, "max", None)]
    for place, name in enumerate(node.input[1:3]):
        if name in prepared.constants:
            ends[place] = float(prepared.read(name))
    if ends[0] != 0:
        return ""
    return "relu6" if ends[1] == 6 else "" if ends[1] is not None else "relu"


def _cut(node: Any, prepared: Prepared) -> str:
    """The activation that a grid takes the place of: one without negative numbers, and maybe one that ends at 6."""
    if len(node.input) < 3 or any(name not in prepared.constants for name in node.input[1:3]):
        return ""
    scale, zero = (prepared.read(name) for name in node.input[1:3])
    if zero.size != 1 or zero.dtype.kind not in "iu" or zero.item() != np.iinfo(zero.dtype).min:
        return ""
    end = float(scale.item()) * (np.iinfo(zero.dtype).max - np.iinfo(zero.dtype).min)
    return "relu6" if abs(end - 6) < 1e-5 else "relu"
