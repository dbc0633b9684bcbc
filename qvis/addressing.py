"""What other tools call the layers of a model: by the nodes of an ONNX file, or by the modules of PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from qvis.layers import Analysis, Network

Model = Analysis | Network

_ROOT = "(root)"
"""What a layer is called that is the whole model."""


class Told(NamedTuple):
    """How a tool is told of each layer of a model."""

    names: Mapping[str, tuple[str, ...]]
    """What it calls each layer; a layer that it cannot be told is not there, or has none."""
    missing: Mapping[str, str] = {}
    """Why a layer cannot be told, or not wholly."""

    def written(self, spell: Callable[[str], str]) -> Told:
        """The same with each name spelled in another way."""
        return Told({layer: tuple(map(spell, names)) for layer, names in self.names.items()}, self.missing)


def node_names(model: Model, tool: str) -> Told:
    """The names of the ONNX nodes that apply each layer's weight."""
    if not is_onnx(model):
        return nothing(model, f"{tool} wants names of nodes, which an exported file has; run qvis on the .onnx file")
    if model.graph is None:
        why = model.no_graph or "there is no graph"
        return nothing(model, f"{tool} wants names of nodes, and they are not known: {why}")
    calls = {layer.name: model.graph.calls.get(layer.name, ()) for layer in model.layers}
    named = {layer: [node.original for node in nodes] for layer, nodes in calls.items()}
    why = "no node with a name applies it; name the nodes of the file"
    return Told(
        {layer: tuple(filter(None, names)) for layer, names in named.items()},
        {layer: why for layer, names in named.items() if not names or not all(names)},
    )


def module_names(model: Model, tool: str) -> Told:
    """The layers that are modules of PyTorch, by their own names."""
    if is_onnx(model) or is_tensorflow(model):
        return nothing(model, f"{tool} takes modules of PyTorch, and this model was read as {model.framework}")
    names = [layer.name for layer in model.layers]
    why = f"{tool} cannot be told the model itself, which has no name"
    return Told({name: (name,) for name in names if name != _ROOT}, {name: why for name in names if name == _ROOT})


def nothing(model: Model, why: str) -> Told:
    """What is told where a tool cannot be told any layer."""
    return Told({}, {layer.name: why for layer in model.layers})


def is_onnx(model: Model) -> bool:
    """Whether the model was read from ONNX."""
    return model.framework.startswith("ONNX")


def is_tensorflow(model: Model) -> bool:
    """Whether the model was read from Keras, TensorFlow or TensorFlow Lite."""
    return model.framework.startswith(("Keras", "TensorFlow", "TFLite"))
