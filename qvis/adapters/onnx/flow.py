"""How data flows through an ONNX graph, in the words that all adapters share."""

from __future__ import annotations

from typing import Any

from qvis.adapters.onnx import names
from qvis.adapters.onnx.prepared import Prepared, prepare
from qvis.errors import NoGraphError
from qvis.layers import Graph


def graph_of(model: Any) -> Graph:
    """How data flows through an ONNX model."""
    prepare(model, NoGraphError)
    raise NoGraphError("no graph: not yet")


def norm_names(prepared: Prepared) -> dict[str, str]:
    """What each BatchNormalization is called, by the name of its result: its module's name where the graph tells it."""
    found: dict[str, str] = {}
    for result, node in prepared.nodes.items():
        if node.op_type == "BatchNormalization":
            wanted = names.of_tensor(node.input[1]) or node.name or result
            taken = set(found.values())
            numbered = (f"{wanted}#{number}" for number in range(2, len(found) + 3))
            found[result] = next(one for one in (wanted, *numbered) if one not in taken)
    return found
