"""What to call a weight of an ONNX graph: the module's name of the framework it was exported from, where that shows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from qvis.adapters.onnx.parts import Node
from qvis.adapters.onnx.protos import attribute

if TYPE_CHECKING:
    from qvis.adapters.onnx.prepared import Prepared

_INVENTED = re.compile(
    r"\d+|onnx::\w+|/?(.*/)?Constant(_\d+)?_output_0|(val|const|constant|expr|tmp|t|v|n|node|initializer)_?\d*(_cast)?"
    r"|.*const_fold_opt_+\d+|.*_output_\d+"
)
"""Names that an exporter makes up for a tensor."""
_SUFFIX = re.compile(r"(_quantized|_quant|_Q\d\w*|_QuantizeLinear\w*|_DequantizeLinear\w*|_transposed)+$")
"""What quantizers put behind the name of a tensor."""
_OPERATOR = re.compile(
    r"(QLinear|Q|Fused)?(Conv|ConvTranspose|MatMul|Gemm|Gather|Einsum|LSTM|GRU|RNN)(Integer|NBits)?(_quant|_Q\d\w*)?"
)


def of_tensor(name: str) -> str | None:
    """The module that a tensor belongs to by its name: ``conv1`` for ``conv1.weight``; None for an invented name."""
    name = _SUFFIX.sub("", name)
    if not name or _INVENTED.fullmatch(name):
        return None
    name = name.removesuffix(":0").removesuffix("/ReadVariableOp")
    name = name.removesuffix(".MatMul.weight").removesuffix(".weight")
    return "(root)" if name == "weight" else name


def of_node(node: Node) -> str | None:
    """The module that a node belongs to; None where its name only counts.

    PyTorch's exporter lists the modules around a node in its metadata; the older one makes a path of them, such as
    ``/layer1/layer1.0/conv/Conv``.
    """
    scopes = re.findall(r"'([^']*)'", node.metadata.get("pkg.torch.onnx.name_scopes", ""))
    if len(scopes) > 1 and scopes[-2]:
        return str(scopes[-2])
    if node.name.startswith("/"):
        return _from_path(node.name)
    counted = re.fullmatch(rf"(node_)?({re.escape(node.op)}|n)?[_\d]*", node.name)
    return None if counted else re.sub(r"(__\d+)?(_quant)?$", "", node.name.removeprefix("node_")) or None


def _from_path(path: str) -> str | None:
    parts = path.strip("/").split("/")
    if _OPERATOR.fullmatch(parts[-1]):
        parts.pop()
    modules: list[str] = []
    for part in parts:
        # A child of a container repeats the container's name.
        if modules and part.startswith(f"{modules[-1]}."):
            modules.pop()
        modules.append(part)
    return ".".join(modules) or None


def choose(tensor: str, node: Node) -> list[str]:
    """Names for the layer of a tensor that a node uses, the best first; none of them is empty."""
    fallback = next((output for output in node.outputs if output), node.op)
    return [name for name in (of_tensor(tensor), of_node(node), tensor, node.name, fallback) if name]


def shared_name(layers: Sequence[str]) -> str:
    """What the layers of one node are called together: ``lstm`` for ``lstm.W.i`` and ``lstm.R.i``."""
    if len(set(layers)) < 2:
        return next(iter(layers), "")
    parts = zip(*(name.split(".") for name in layers), strict=False)
    shared = takewhile(lambda part: len(set(part)) == 1, parts)
    return ".".join(part[0] for part in shared) or layers[0]


def norm_names(prepared: Prepared) -> dict[str, str]:
    """What each BatchNormalization is called, by the name of its result: its module's name where the graph tells it.

    Nodes with the same numbers have the same name.
    """
    found: dict[str, str] = {}
    owners: dict[str, tuple[Any, ...]] = {}
    for result, node in prepared.nodes.items():
        if node.op_type == "BatchNormalization":
            owner = (*node.input[1:5], attribute(node, "epsilon", 1e-5))
            wanted = of_tensor(node.input[1]) or node.name or result
            numbered = (f"{wanted}#{number}" for number in range(2, len(owners) + 3))
            name = next(one for one in (wanted, *numbered) if owners.get(one, owner) == owner)
            owners[name] = owner
            found[result] = name
    return found
