"""What flows through a traced model while its graph is built, and the traced model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qvis.adapters.torch.calls import Held
from qvis.layers import Network

if TYPE_CHECKING:
    from torch import Tensor, fx, nn


@dataclass(frozen=True)
class Result:
    """The result of a node."""

    node: str


@dataclass(frozen=True)
class Parts:
    """The parts that a result was split into."""

    node: str
    axis: int | None
    sizes: tuple[int, ...] = ()
    """How much of the axis each part is; empty where it is not known."""


@dataclass(frozen=True)
class Several:
    """The results of an operation that has more than one; each counts as the whole."""

    node: str


@dataclass
class Traced:
    """A model as it was traced."""

    graph: fx.Graph
    tensors: Mapping[str, Tensor]
    """The parameters, buffers and constants by their paths."""
    network: Network
    """The layers that nodes may refer to."""
    source: str
    held: Mapping[str, str] = field(default_factory=dict)
    """The path of the tensor that a placeholder stands for."""
    inputs: frozenset[str] | None = None
    """The placeholders that are inputs of the model; None: all others."""
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    """Those of the model by their paths, as far as there are any."""
    outputs: Callable[[Any], Iterator[tuple[str, fx.Node]]] = field(default=lambda result: name_outputs(result))
    """Names what the model returns."""


def name_outputs(result: Any) -> Iterator[tuple[str, fx.Node]]:
    """The nodes in what a model returns, with where they are in it."""
    from torch.fx import Node as Traced
    from torch.utils import _pytree as pytree

    found = [(pytree.keystr(path), one) for path, one in pytree.tree_flatten_with_path(result)[0]]
    yield from ((path, one) for path, one in found if isinstance(one, Traced))


def plain(path: str) -> str:
    """A path without the modules that ``torch.compile`` puts around others."""
    return ".".join(step for step in path.split(".") if step and step != "_orig_mod")


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of a result, of the first of several; None where it is not known."""
    known = node.meta.get("val")
    known = known[0] if isinstance(known, (tuple, list)) and known else known
    shape = getattr(known, "shape", None)
    return None if shape is None else tuple(map(_size, shape))


def _size(size: Any) -> Any:
    """A size that may vary, as it was for the example that the model was traced with."""
    symbol = getattr(size, "node", None)
    return symbol.hint if symbol is not None and symbol.has_hint() else size


def shapes_of(node: fx.Node) -> tuple[tuple[int, ...], ...]:
    """The shapes of all the results of an operation that has several; empty where they are not known."""
    known = node.meta.get("val")
    shapes = [getattr(one, "shape", None) for one in known] if isinstance(known, (tuple, list)) else []
    found = tuple(tuple(map(_size, shape)) for shape in shapes if shape is not None)
    whole = len(found) == len(shapes) and all(type(size) is int for shape in found for size in shape)
    return found if whole else ()


def flatten(value: Any) -> Iterator[Any]:
    """The results and held tensors in the arguments of an operation, in order."""
    if isinstance(value, (Result, Parts, Several, Held)):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from flatten(one)
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from flatten(one)
    elif isinstance(value, slice):
        yield from flatten((value.start, value.stop, value.step))


def nodes_in(value: Any) -> tuple[str, ...]:
    """The nodes in a value; none for a constant."""
    return tuple(one.node for one in flatten((value,)) if not isinstance(one, Held))


_INLINED = ("wrap_with_set_grad_enabled", "wrap_with_autocast", "invoke_subgraph", "tag_activation_checkpoint")


def nested_graph(node: fx.Node) -> tuple[fx.Graph, list[Any]] | None:
    """The graph that an operation only wraps, with what it is given; None for any other operation."""
    from torch.fx import GraphModule

    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    if name not in _INLINED:
        return None
    for position, argument in enumerate(node.args):
        if getattr(argument, "op", "") == "get_attr":
            owner = node.graph.owning_module
            inner = owner.get_submodule(str(argument.target)) if owner is not None else None  # type: ignore[union-attr]
            if isinstance(inner, GraphModule):
                rest = node.args[position + 1 :]
                if name == "invoke_subgraph" and rest and isinstance(rest[0], str):
                    rest = rest[1:]
                return inner.graph, list(rest)
    return None
