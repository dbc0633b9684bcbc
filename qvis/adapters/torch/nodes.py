"""Adds nodes to a graph while it is built, and gives them their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qvis.adapters.torch.calls import Call, single_operation
from qvis.adapters.torch.holdings import Holdings
from qvis.adapters.torch.values import Traced, shape_of
from qvis.layers import Node

if TYPE_CHECKING:
    from torch import fx


def known_shape(shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape; empty where it is not known, or has sizes that vary."""
    return shape if shape is not None and all(type(size) is int for size in shape) else ()


class Nodes:
    """The nodes that were found up to now."""

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self.held = Holdings(traced)
        self.nodes: dict[str, Node] = {}
        self.shapes: dict[str, tuple[int, ...] | None] = {}

    def _name(self, call: Call, word: str) -> str:
        """The module's where all of it is this operation, else the module's and the operation's."""
        whole = single_operation(call.kind) in _same(call.operation) or call.kind.lower() == call.operation
        if call.operation.startswith("nn.") or (call.kind and whole):
            return self._unique(call.module or "(root)")
        short = word.rpartition(".")[2]
        return self._unique(f"{call.module}/{short}" if call.module else short, module=bool(call.module))

    def _unique(self, name: str, *, module: bool = True) -> str:
        """The name, with a number from its second use on. What is no module never takes a module's name."""
        if not module and (name in self.held.layers or name in self.traced.modules):
            name = f"/{name}"
        found, number = name, 1
        while found in self.nodes:
            number += 1
            found = f"{name}@{number}"
        return found

    def _add(
        self,
        node: fx.Node,
        name: str,
        op: str,
        inputs: tuple[str, ...],
        *,
        layer: str = "",
        attributes: Mapping[str, Any] | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> str:
        shape = shape_of(node) if shape is None else shape
        self.shapes[name] = shape
        self.nodes[name] = Node(name, op, inputs, layer, known_shape(shape), attributes or {}, node.name)
        return name


def _same(operation: str) -> tuple[str, ...]:
    """The names under which a module's one operation may be traced."""
    known = "upsample" if operation.startswith(("upsample", "interpolate")) else operation
    known = "dropout" if "dropout" in known else known
    return (known, operation.removeprefix("_").removesuffix("_with_indices"), "hardtanh" if known == "relu6" else known)
