"""Changes which operations a Keras model is made of: clips become ReLU, and multiplications come before layers.

An activation is an attribute of its layer. An operation that is no layer, and one that is added, stand among the nodes
that Keras notes down of functional and sequential models: there the nodes are changed, and all else stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from qvis.adapters.keras.live import TRACED, children, collect, ends, is_compiled, nodes_of, package_of, walk
from qvis.adapters.keras.operations import of_operation
from qvis.adapters.keras.steps import Step, activation, of_layer
from qvis.adapters.keras.units import Source
from qvis.adapters.rewritten import check_layers, fitted
from qvis.errors import BadArgumentError, suggest
from qvis.layers import FloatArray, Graph, Network
from qvis.words import listed_names

# ---------------------------------------------------------------------------------------------------------------------
# Clips that become ReLU


class _Clip(NamedTuple):
    """A clip from 0 to a number."""

    holder: Any
    """The layer or operation."""
    exchange: Callable[[], None]
    is_layer: bool = True


def check_clips(graph: Graph | None, names: Collection[str]) -> None:
    """Raise a BadArgumentError where a graph has no such operation."""
    for name in names:
        if graph is not None and name not in graph.by_name:
            raise BadArgumentError(f"unclipped: no operation is called {name!r}{suggest(name, graph.by_name)}")


def exchange_clips(model: Any, graph: Graph | None, names: Collection[str], *, inplace: bool = False) -> list[str]:
    """Let clips be ReLU.

    Parameters
    ----------
    model
        The model to change: a copy, or with ``inplace`` the one that was given.
    graph
        How data flows through it, if that is known.
    names
        The nodes of the clips.
    inplace
        Whether others may hold the model, or what was traced of it.

    Returns
    -------
    list
        Notes: the clips that stay, and why.
    """
    if names and not hasattr(package_of(model), "KerasTensor"):
        return [f"{listed_names(list(names))}: not made ReLU, since the model is one of Keras 2; build it with Keras 3"]
    clips = _clips(model) if names else {}
    reasons: dict[str, list[str]] = {}
    done: dict[int, _Clip] = {}
    changed = []
    for name in names:
        reason = _obstacle(name, clips, graph, names, model if inplace else None)
        if reason:
            reasons.setdefault(reason, []).append(name)
            continue
        clip = clips[name.partition("@")[0]]
        done.setdefault(id(clip.holder), clip)
        changed.append(name)
    for clip in done.values():
        clip.exchange()
    notes = [f"{listed_names(several)}: not made ReLU, since {reason}" for reason, several in reasons.items()]
    if inplace and done:
        for _, _, layer in walk(model):
            vars(layer).update({name: None for name in TRACED if vars(layer).get(name) is not None})
        notes.append(
            f"{listed_names(changed)}: made ReLU in the model itself; what tf.function, or a model around it, has "
            "traced of it before still clips"
        )
    return notes


def _obstacle(name: str, clips: Mapping[str, _Clip], graph: Graph | None, names: Collection[str], given: Any) -> str:
    """Why a clip has to stay; ``given`` is the model if it is the one that was given."""
    plain = name.partition("@")[0]
    node = None if graph is None else graph.by_name[name]
    if node is not None and (node.op != "clip" or node.attributes.get("low") != 0):
        return f"it is no clip from 0 upwards but {node.op}"
    clip = clips.get(plain)
    if clip is None:
        return (
            "the code of a layer or model of one's own computes it; write keras.activations.relu there, or build the "
            "model of layers"
        )
    mine = {one for one, other in clips.items() if other.holder is clip.holder}
    others = [] if graph is None else [one.name for one in graph.nodes if one.name.partition("@")[0] in mine]
    if not set(others) <= set(names):
        return "it is called several times, and not all of its calls are to change; name all of them"
    if given is None:
        return ""
    if not clip.is_layer:
        return "it is an operation among the nodes of the model, which only change in a copy; leave out inplace"
    if any(map(is_compiled, (layer for _, _, layer in walk(given)))):
        return "code of the model is compiled by tf.function, and may have been traced with it; leave out inplace"
    return ""


def _clips(model: Any) -> dict[str, _Clip]:
    """The clips that can be exchanged, by their names in the graph without the number of the call."""
    found: dict[str, _Clip] = {}
    for name, _, layer in walk(model):
        own = _of_holder(layer)
        if own is not None:
            found[name or "(root)"] = own
        function = vars(layer).get("activation")
        step = activation(function)
        if own is None and _is_clip(step):
            assert step is not None
            clip = _of_holder(function) or _Clip(layer, partial(_exchange_activation, layer))
            found[f"{name or '(root)'}/{step.suffix}"] = clip
        for operation in _plain_operations(layer):
            exchange = partial(_exchange_operation, model, operation)
            found[f"{name}/{operation.name}".lstrip("/")] = _Clip(operation, exchange, is_layer=False)
    return found


def _of_holder(layer: Any) -> _Clip | None:
    """The clip that a layer is; None where it is none, or an activation besides."""
    import keras

    steps = of_layer(layer, (), (), {}) if isinstance(layer, (keras.layers.ReLU, keras.layers.Activation)) else None
    if not steps or not _is_clip(steps[0]):
        return None
    if isinstance(layer, keras.layers.ReLU):
        return _Clip(layer, partial(setattr, layer, "max_value", None))
    return _of_holder(layer.activation) or _Clip(layer, partial(_exchange_activation, layer))


def _is_clip(step: Step | None) -> bool:
    return step is not None and step.op == "clip" and step.attributes["low"] == 0


def _exchange_activation(layer: Any) -> None:
    import keras

    layer.activation = keras.activations.relu


def _plain_operations(layer: Any) -> Iterator[Any]:
    """The clips among the operations of a functional or sequential model that are no layers."""
    if ends(layer) is None:
        return
    for node in nodes_of(layer):
        operation = node.operation
        if not hasattr(operation, "_layers") and type(operation).__name__ in ("Clip", "Relu6"):
            called = [*node.arguments.args, *node.arguments.kwargs.values()]
            if _is_clip(of_operation(operation, [one.shape for one in node.input_tensors], called)):
                yield operation


def _exchange_operation(model: Any, operation: Any) -> None:
    """Let a ReLU of the same name take the place of an operation in all its calls."""
    from keras.src.ops.nn import Relu

    relu = Relu(name=operation.name)
    relu._inbound_nodes[:] = operation._inbound_nodes
    relu._outbound_nodes[:] = operation._outbound_nodes
    for node in relu._inbound_nodes:
        node.operation = relu
        for one in node.outputs:
            one._keras_history = one._keras_history._replace(operation=relu)
    for layer in {id(layer): layer for _, _, layer in walk(model)}.values():
        if ends(layer) is not None and any(one is operation for one in _functional(layer)._operations):
            _map_anew(layer)


# ---------------------------------------------------------------------------------------------------------------------
# Multiplications before layers


def check_multiplies(
    model: Any, network: Network, multiplies: Mapping[str, FloatArray], sources: Mapping[str, Sequence[Source]]
) -> None:
    """Raise a BadArgumentError where something cannot be put before a layer; ``sources`` are those of all names."""
    check_layers(network, "multiplies", multiplies, sources)
    for name, given in multiplies.items():
        reason = _refusal(model, network, name, sources[name])
        if reason:
            raise BadArgumentError(f"multiplies: what enters {name!r} cannot be multiplied: {reason}")
        columns = sources[name][0].places().shape[1]
        numbers = fitted("multiplies", name, given, (columns,))
        if not np.all(np.isfinite(numbers)):
            raise BadArgumentError(f"multiplies: {name!r} has numbers that are not finite; give finite ones")


def multipliable_layers(model: Any, network: Network, sources: Mapping[str, Sequence[Source]]) -> list[str]:
    """The layers before which something can be put, by name."""
    names = [layer.name for layer in network.layers if layer.name in sources]
    return [name for name in names if not _refusal(model, network, name, sources[name])]


def _refusal(model: Any, network: Network, name: str, places: Sequence[Source]) -> str:
    """Why nothing can be put before a layer."""
    keras = package_of(model)
    if not hasattr(keras, "KerasTensor"):
        return "the model is one of Keras 2 (tf_keras); build it with Keras 3"
    if keras.config.image_data_format() == "channels_first":
        return "Keras is set to channels_first, where keras.layers.Rescaling takes no numbers along the last axis"
    for source in places:
        layer = source.unit.holder
        if source.unit.op not in ("Dense", "EinsumDense"):
            return f"it is a {source.unit.op}, and only what enters a Dense or EinsumDense can be; leave it out"
        for around in _around(model, layer):
            if not _is_made_of_nodes(around):
                return (
                    f"it is called by the code of {around.name!r} ({type(around).__name__}), which stays as it is; "
                    "leave the layer out, or build the model of layers with keras.Model(inputs, outputs)"
                )
        if not _parents(model, layer):
            return "it is a layer alone; put it into a keras.Sequential"
        if _linear(layer) is None:
            return f"it is a {source.unit.op} that does not sum over the last axes alone; leave it out"
    nodes = () if network.graph is None else network.graph.nodes
    plain = {place.unit.name for place in places}
    for node in nodes:
        own = node.layer == name and node.name.partition("@")[0] not in plain
        if own or name in node.attributes.get("layers", ()):
            return f"{node.name!r} uses its weight as well; leave it out"
    return ""


def _linear(layer: Any) -> tuple[int, ...] | None:
    """The sizes of the last axes of its input, which a layer sums over; None where it does something else."""
    if not layer._inbound_nodes:
        return None
    node = layer._inbound_nodes[0]
    given, returned = node.input_tensors[0].shape, node.outputs[0].shape
    steps = of_layer(layer, given, returned, {})
    if steps is None or not any(step.op == "linear" for step in steps):
        return None
    summed = layer.kernel.shape[0] if not hasattr(layer, "equation") else None
    if summed is not None:
        return (int(summed),)
    kernel, _, right = layer.equation.replace(" ", "").partition(",")[2].partition("->")
    return tuple(int(size) for letter, size in zip(kernel, layer.kernel.shape, strict=True) if letter not in right)


def _parents(model: Any, layer: Any) -> list[Any]:
    """The layers and models that hold a layer themselves."""
    held = {id(one): one for _, _, one in walk(model)}.values()
    return [one for one in held if any(child is layer for child in children(one))]


def _around(model: Any, layer: Any) -> list[Any]:
    """All layers and models around a layer."""
    found: dict[int, Any] = {}
    todo = [layer]
    while todo:
        for one in _parents(model, todo.pop()):
            if id(one) not in found:
                found[id(one)] = one
                todo.append(one)
    return list(found.values())


def _is_made_of_nodes(layer: Any) -> bool:
    """Whether a model is its nodes alone, in memory as well as in a file: no code builds it anew."""
    own = (type(layer).__init__, type(layer).get_config)
    return ends(layer) is not None and all(one.__module__.startswith("keras.") for one in own)


def multiply_inputs(model: Any, multiplies: Mapping[str, FloatArray]) -> None:
    """Put a multiplication before each call of layers, in a copy that nobody else holds; all was checked."""
    import keras

    found = collect(model)
    places = {name: found.sources[key] for key, layer in found.layers.items() for name in (layer.name, *layer.aliases)}
    for name, numbers in multiplies.items():
        for layer in {id(one.unit.holder): one.unit.holder for one in places[name]}.values():
            sizes = _linear(layer)
            assert sizes is not None
            for around in _parents(model, layer):
                scale = np.reshape(numbers, sizes).tolist()
                label = _free_name(around, f"{layer.name}_multiply")
                _insert(around, layer, keras.layers.Rescaling(scale, name=label, dtype=layer.dtype_policy))


def _insert(model: Any, layer: Any, before: Any) -> None:
    """Call a layer on all that another one takes in a functional or sequential model."""
    import keras

    mine = {id(node) for node in nodes_of(model)}
    for node in [node for node in layer._inbound_nodes if id(node) in mine]:  # in the order in which Keras numbers them
        (given,) = node.input_tensors
        new = before(given)
        outbound = given._keras_history.operation._outbound_nodes
        outbound[:] = [one for one in outbound if one is not node]
        before._outbound_nodes.append(node)
        args, kwargs = keras.tree.map_structure(
            lambda one, old=given, new=new: new if one is old else one, (node.arguments.args, node.arguments.kwargs)
        )
        node.arguments = type(node.arguments)(*args, **kwargs)
    if model is not _functional(model):  # a sequential model, which has a list of its own
        at = next(index for index, one in enumerate(model._layers) if one is layer)
        model._layers.insert(at, before)
    _map_anew(model)


def _free_name(model: Any, name: str) -> str:
    taken = {str(one.name) for one in _functional(model)._operations}
    names = (name if number == 1 else f"{name}_{number}" for number in range(1, len(taken) + 2))
    return next(one for one in names if one not in taken)


# ---------------------------------------------------------------------------------------------------------------------
# Nodes


def _functional(model: Any) -> Any:
    """What holds the nodes of a functional or sequential model."""
    return getattr(model, "_functional", None) or model


def _map_anew(model: Any) -> None:
    """Let a model find its operations by its nodes again."""
    from keras.src.ops.function import map_graph

    inner = _functional(model)
    names = ("_nodes", "_nodes_by_depth", "_operations", "_operations_by_depth")
    vars(inner).update(zip(names, map_graph(inner._inputs, inner._outputs), strict=True))
    for layer in inner.layers:
        inner._tracker.track(layer)
