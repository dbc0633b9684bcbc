"""Writes new numbers into copies of ONNX models: where they are stored, or into tensors of their own at their use.

A weight that reaches its node by way of transpositions, reshapes and casts is written where it is stored. A bias or a
number of a normalization that other nodes use too gets a tensor of its own, so that those keep theirs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qvis.adapters.encodings import Array
from qvis.adapters.onnx.flow import Following
from qvis.adapters.onnx.prepared import _REAL, LIMIT, Prepared, norm_names, prepare
from qvis.adapters.onnx.tensors import TYPES
from qvis.adapters.rewritten import Rewritten, check_layers, check_stored, express, fitted, precision_notes
from qvis.errors import BadArgumentError, OutputError, UnsupportedModelError, suggest
from qvis.layers import FloatArray, Network, Node
from qvis.rewriting import Rewriting

_AFFINE = ("layer_norm", "rms_norm", "group_norm")

Slot = tuple[str, int]
"""A node, by the name of its first result, and the number of one of its inputs."""


def rewrite_proto(model: Any, network: Network, rewriting: Rewriting, inplace: bool = False) -> Rewritten:
    """Write new numbers into a copy of a model, or with ``inplace`` into the ``ModelProto`` itself.

    Parameters
    ----------
    model
        A path, a ``ModelProto``, or what ``torch.onnx.export`` returns; the result is a ``ModelProto`` each time. The
        external data of a file is loaded into it.
    network
        What was read of it.
    rewriting
        The numbers. Biases are those that a Conv or Gemm node takes itself, or that an Add node right after a MatMul
        adds.
    inplace
        Whether to write into a ``ModelProto``. Everything is checked first.

    Raises
    ------
    BadArgumentError
        A name or a shape is wrong, a layer has no bias, or numbers do not fit a type.
    UnsupportedModelError
        Onnx is not installed, or the model is larger than 2 GB.
    """
    prepared = prepare(model, UnsupportedModelError)  # which is a copy
    import onnx
    import onnx.inliner

    if inplace and not isinstance(model, onnx.ModelProto):
        raise BadArgumentError(
            "inplace: only a ModelProto in memory can be changed; leave it out, and save the model that is returned"
        )
    target = model if inplace else _loaded(model)
    plan = _Plan(prepared, has_functions=bool(target.functions))
    plan.add(network, rewriting)
    notes: list[str] = []
    if not plan.fits(target):
        if inplace:
            raise BadArgumentError(
                "inplace: some of the numbers are constants inside a function of the model, which has to be inlined "
                "first; rewrite a copy, with inplace=False"
            )
        target = onnx.inliner.inline_local_functions(target)
        notes.append("the functions of the model are inlined, since they hold some of the numbers")
    plan.write(target)
    return Rewritten(target, (*notes, *plan.kept, *precision_notes(plan.rounded)))


def affines_of(model: Any) -> dict[str, tuple[FloatArray | None, FloatArray | None]]:
    """Factor and shift of the layer, RMS and group normalizations that hold theirs, by the name of the node.

    Also of sums and products with a vector.
    """
    prepared = prepare(model, UnsupportedModelError)
    found: dict[str, tuple[FloatArray | None, FloatArray | None]] = {}
    for name, slots in _affine_slots(prepared, _results(_followed(prepared))).items():
        names = [None if slot is None else prepared.nodes[slot[0]].input[slot[1]] for slot in slots]
        if all(one is None or one in prepared.constants for one in names):
            factor, shift = (None if one is None else _vector(prepared.read(one)) for one in names)
            found[name] = (factor, shift)
    return found


def _vector(array: Array) -> FloatArray:
    vector: FloatArray = array.astype(np.result_type(array.dtype, np.float32)).reshape(-1)
    return vector


def _affine_slots(
    prepared: Prepared, shown: Mapping[str, tuple[Node, str]]
) -> dict[str, tuple[Slot | None, Slot | None]]:
    """Where nodes of the graph take their factors and their shifts from, if they have them."""
    found: dict[str, tuple[Slot | None, Slot | None]] = {}
    for name, (one, result) in shown.items():
        inputs = prepared.nodes[result].input
        if one.op in _AFFINE and one.attributes["scale"]:
            found[name] = ((result, 1), (result, 2) if len(inputs) > 2 and inputs[2] else None)
        elif "axis" in one.attributes and one.op in ("add", "sub", "mul"):
            slot = (result, next(index for index, given in enumerate(inputs) if given in prepared.constants))
            found[name] = (slot, None) if one.op == "mul" else (None, slot)
    return found


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


def _loaded(model: Any) -> Any:
    """A copy of one's own, as it is."""
    import onnx

    if isinstance(model, Path):
        return onnx.load(str(model))
    copy = onnx.ModelProto()
    copy.CopyFrom(model if isinstance(model, onnx.ModelProto) else model.model_proto)
    return copy


@dataclass
class _Plan:
    """What is to become of which tensor. Names are those of the prepared model."""

    prepared: Prepared
    has_functions: bool = False
    stored: dict[str, Array] = field(default_factory=dict)
    """New numbers of tensors where they are."""
    own: dict[str, Array] = field(default_factory=dict)
    """Tensors that are added."""
    slots: dict[Slot, str] = field(default_factory=dict)
    """Inputs of nodes that are to be those."""
    factors: dict[Slot, tuple[str, str]] = field(default_factory=dict)
    """Inputs of nodes that are to be multiplied by added tensors, with the layers that they enter."""
    relus: dict[str, int] = field(default_factory=dict)
    """Nodes that are to become Relu, and which of their inputs that takes."""
    rounded: dict[str, list[str]] = field(default_factory=dict)
    """By type, what it cannot hold exactly."""
    kept: list[str] = field(default_factory=list)
    """What is left as it is, and why."""

    def add(self, network: Network, rewriting: Rewriting) -> None:
        """Take in all that is asked for."""
        held = {one: layer.name for layer in network.layers for one in (layer.name, *layer.aliases)}
        left = "is used by no operator whose weights can be replaced"
        if self.has_functions:
            left += (
                ", or is a constant inside a function of the model; inline them first, with "
                "onnx.inliner.inline_local_functions"
            )
        reasons = {**dict.fromkeys(held.values(), left), **self.prepared.obstacles}
        known = [name for name, layer in held.items() if layer in self.prepared.layers]
        check_layers(network, "weights", rewriting.weights, known, reasons)
        has_bias = [name for name in known if held[name] in self.prepared.biases]
        check_layers(network, "biases", rewriting.biases, has_bias)
        for name, matrix in rewriting.weights.items():
            place = self.prepared.layers[held[name]]
            before = self._now(place.tensor)
            matrix = fitted("weights", name, matrix, place.shape)
            with np.errstate(over="ignore"):
                after = place.write(matrix, before)
            kind = self.prepared.constants[place.tensor].data_type
            self._check("weights", name, matrix, place.take(after), kind)
            self.stored[place.tensor] = after
        for name, bias in rewriting.biases.items():
            rows = self.prepared.layers[held[name]].shape[0]
            slots = self.prepared.biases[held[name]]
            self._put("biases", name, slots, fitted("biases", name, bias, (rows,)), f"{name}.bias")
        self._add_norms(rewriting)
        self._add_affines(rewriting)
        self._add_relus(rewriting)
        check_layers(network, "multiplies", rewriting.multiplies, known, reasons)
        for name, factors in rewriting.multiplies.items():
            self._add_factors(name, held[name], factors)

    # -----------------------------------------------------------------------------------------------------------------
    # Normalizations

    def _add_norms(self, rewriting: Rewriting) -> None:
        if not rewriting.norms:
            return
        names = norm_names(self.prepared)
        for name, norm in rewriting.norms.items():
            results = [result for result, known in names.items() if known == name]
            nodes = [self.prepared.nodes[result] for result in results]
            if not nodes or any(one not in self.prepared.constants for one in nodes[0].input[1:5]):
                raise BadArgumentError(
                    f"norms: no BatchNormalization that can be written is called {name!r}"
                    f"{suggest(name, names.values())}"
                )
            epsilon = next((one.f for one in nodes[0].attribute if one.name == "epsilon"), 1e-5)
            numbers = express(norm, epsilon, has_scale=True, has_shift=True)
            for slot, part in enumerate(("scale", "shift", "mean", "variance"), 1):
                self._put("norms", name, [(one, slot) for one in results], numbers[part], f"{name}.{part}")

    def _add_affines(self, rewriting: Rewriting) -> None:
        known = _affine_slots(self.prepared, self._shown) if rewriting.affines else {}
        for name, pair in rewriting.affines.items():
            if name not in known:
                raise BadArgumentError(f"affines: no normalization is called {name!r}{suggest(name, known)}")
            for slot, numbers, part in zip(known[name], pair, ("factor", "shift"), strict=True):
                if numbers is None:
                    continue
                if slot is None:
                    raise BadArgumentError(f"affines: the {part} of {name!r} does not exist; give None for it")
                if self.prepared.nodes[slot[0]].input[slot[1]] not in self.prepared.constants:
                    raise BadArgumentError(f"affines: the {part} of {name!r} is computed; give None for it")
                self._put("affines", name, [slot], numbers, f"{name}.{part}")

    # -----------------------------------------------------------------------------------------------------------------
    # Operations

    @cached_property
    def _flow(self) -> Following:
        return _followed(self.prepared)

    @cached_property
    def _shown(self) -> Mapping[str, tuple[Node, str]]:
        return _results(self._flow)

    def _add_relus(self, rewriting: Rewriting) -> None:
        for name in rewriting.unclipped:
            if name not in self._shown:
                raise BadArgumentError(f"unclipped: no operation is called {name!r}{suggest(name, self._shown)}")
            shown, result = self._shown[name]
            if shown.op == "clip" and shown.attributes["low"] == 0:
                inputs = self.prepared.nodes[result].input
                self.relus[result] = next(index for index, one in enumerate(inputs) if one in self._flow.makers)
            elif shown.op != "relu":
                self.kept.append(f"{name}: stays as it is, since it is no clip from 0 on that could be a ReLU")

    def _add_factors(self, name: str, layer: str, factors: FloatArray) -> None:
        """Multiply what enters a layer, in all of its calls."""
        uses = [use for use in self.prepared.uses if use.layer == layer]
        linear = {result for shown, result in self._shown.values() if shown.op == "linear"}
        if layer in self.prepared.inner or not uses or any(use.node not in linear for use in uses):
            why = "is used inside a branch or a loop" if layer in self.prepared.inner else "is no linear layer"
            raise BadArgumentError(f"multiplies: {name!r} {why}, so that its input cannot be multiplied; leave it out")
        if self.prepared.opset() < 7:
            raise BadArgumentError(
                f"multiplies: {name!r} is in a model of opset {self.prepared.opset()}, in which Mul takes no vector; "
                "convert it with onnx.version_converter, to opset 7 or later"
            )
        factors = fitted("multiplies", name, factors, (self.prepared.layers[layer].shape[1],))
        made: dict[int, str] = {}
        for use in uses:
            assert use.data is not None
            inputs = self.prepared.nodes[use.node].input
            known = next((one for one in (inputs[use.data], inputs[use.slot]) if one in self.prepared.infos), "")
            kind = self.prepared.type_of(known)
            if kind not in _REAL:
                what = TYPES.get(kind, f"type {kind}")
                raise BadArgumentError(f"multiplies: the input of {name!r} is {what}; give the model in float32")
            if kind not in made:
                made[kind] = self._own(f"{name}.multiply", self._stored("multiplies", name, factors, kind))
            self.factors[use.node, use.data] = (made[kind], name)

    # -----------------------------------------------------------------------------------------------------------------
    # Tensors

    @cached_property
    def _users(self) -> dict[str, list[Slot]]:
        """The inputs that each value goes into; what is not in the outermost graph stands for itself."""
        graph = self.prepared.model.graph
        found: dict[str, list[Slot]] = {one.name: [("", -1)] for one in graph.output}
        for result, node in self.prepared.nodes.items():
            for index, name in enumerate(node.input):
                found.setdefault(name, []).append((result, index))
            for name in _captured(node):
                found.setdefault(name, []).append((result, -1))
        return found

    def _now(self, name: str) -> Array:
        return self.stored[name] if name in self.stored else self.prepared.read(name)

    def _put(self, argument: str, name: str, slots: list[Slot], numbers: FloatArray, title: str) -> None:
        """New numbers for some inputs that are one tensor: where it is, if nothing else uses it."""
        node, index = slots[0]
        source = self.prepared.nodes[node].input[index]
        known = self.prepared.shape_of(source) or ()
        wanted, shape = np.asarray(numbers), tuple(size or 0 for size in known)
        if wanted.size == int(np.prod(shape)):
            wanted = wanted.reshape(shape)
        elif argument == "norms":
            fitted(argument, name, wanted, shape)
        stored = self._stored(argument, name, wanted, self.prepared.type_of(source))
        is_here = source in self.prepared.constants and source not in self.stored and stored.shape == shape
        if is_here and set(self._users[source]) <= set(slots):
            self.stored[source] = stored
        else:
            self.slots.update(dict.fromkeys(slots, self._own(title, stored)))

    def _own(self, title: str, stored: Array) -> str:
        """Add a tensor; returns its name."""
        name = _unused(title, self._taken)
        self._taken.add(name)
        self.own[name] = stored
        return name

    @cached_property
    def _taken(self) -> set[str]:
        """The names of all values."""
        made = {one for node in self.prepared.model.graph.node for one in node.output}
        return {*self._users, *self.prepared.constants, *made, *(one.name for one in self.prepared.inputs)}

    def _stored(self, argument: str, name: str, wanted: Array, kind: int) -> Array:
        """The numbers in one of ONNX's types."""
        with np.errstate(over="ignore"):
            stored: Array = wanted.astype(_REAL[kind])
        self._check(argument, name, wanted, stored, kind)
        return stored

    def _check(self, argument: str, name: str, wanted: Array, stored: Array, kind: int) -> None:
        if not check_stored(argument, name, wanted, stored, TYPES[kind]) and kind == 10:
            self.rounded.setdefault(TYPES[kind], []).append(name)

    # -----------------------------------------------------------------------------------------------------------------
    # Writing

    def fits(self, model: Any) -> bool:
        """Whether a model has all that is to be written outside of functions."""
        tensors, nodes = _tensors(model.graph), _nodes(model.graph)
        changed = {*(node for node, _ in (*self.slots, *self.factors)), *self.relus}
        # a node of the model that calls a function may have the result of one inside it
        known = (
            node in nodes and (nodes[node].op_type, nodes[node].domain) == (inner.op_type, inner.domain)
            for node, inner in ((node, self.prepared.nodes[node]) for node in changed)
        )
        return all(name in tensors for name in self.stored) and all(known)

    def write(self, model: Any) -> None:
        """Write all into a model."""
        import onnx

        tensors, nodes = _tensors(model.graph), _nodes(model.graph)
        for name, array in self.stored.items():
            _replace(tensors[name], array)
        for (node, index), name in self.slots.items():
            nodes[node].input[index] = name
        for node, index in self.relus.items():
            nodes[node].op_type = "Relu"
            del nodes[node].input[:index], nodes[node].input[1:], nodes[node].attribute[:]
        for name, array in self.own.items():
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
            if model.ir_version < 4:  # where initializers had to be inputs
                info = onnx.helper.make_tensor_value_info(name, _type_of(array), list(array.shape))
                model.graph.input.append(info)
        self._multiply(model.graph, nodes)

    def _multiply(self, graph: Any, nodes: Mapping[str, Any]) -> None:
        """Put a Mul before the inputs that are to be multiplied."""
        import onnx

        infos = {one.name: one for part in (graph.input, graph.value_info) for one in part}
        taken = {node.name for node in graph.node}
        before: dict[str, list[Any]] = {}
        for (node, index), (factors, layer) in self.factors.items():
            given, result = nodes[node].input[index], _unused(f"{layer}.multiplied", self._taken)
            title = _unused(f"{layer}.multiply", taken)
            self._taken.add(result)
            taken.add(title)
            before.setdefault(node, []).append(onnx.helper.make_node("Mul", [given, factors], [result], title))
            nodes[node].input[index] = result
            if given in infos:
                info = graph.value_info.add()
                info.CopyFrom(infos[given])
                info.name = result
        if before:
            ordered = [one for node in graph.node for one in (*before.get(_first(node), ()), node)]
            copies = [onnx.NodeProto.FromString(one.SerializeToString()) for one in ordered]
            del graph.node[:]
            graph.node.extend(copies)


def _followed(prepared: Prepared) -> Following:
    flow = Following(prepared)
    flow.walk()
    return flow


def _results(flow: Following) -> dict[str, tuple[Node, str]]:
    """The first result of each node of the graph, by the name that it has there."""
    shown = {node.name: node for node in flow.nodes}
    return {name: (shown[name], one) for one, name in flow.makers.items() if one in flow.prepared.nodes}


def _unused(title: str, taken: Collection[str]) -> str:
    """The title, or with a number behind it where that is taken."""
    numbered = (title, *(f"{title}#{number}" for number in range(2, len(taken) + 3)))
    return next(one for one in numbered if one not in taken)


def _type_of(array: Array) -> int:
    """ONNX's number for the type of an array."""
    return next(number for number, kind in _REAL.items() if kind == array.dtype)


def _tensors(graph: Any) -> Mapping[str, Any]:
    """The stored tensors of a graph, those of nodes by the name of the result."""
    found = {one.name: one for one in graph.initializer}
    for node in graph.node:
        values = [one.t for one in node.attribute if one.name == "value" and one.HasField("t")]
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx") and values:
            found[node.output[0]] = values[0]
    return found


def _nodes(graph: Any) -> Mapping[str, Any]:
    return {_first(node): node for node in graph.node}


def _first(node: Any) -> str:
    """The name of a node's first result."""
    return next(filter(None, node.output), "")


def _captured(node: Any) -> Iterator[str]:
    """What the graphs inside a node take from around them, or make themselves."""
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            yield from (one.name for one in graph.output)
            for inner in graph.node:
                yield from inner.input
                yield from _captured(inner)


def _replace(tensor: Any, array: Array) -> None:
    """Put other numbers of the same type and shape into a tensor; its name and what else it says stay."""
    for name in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "raw_data", "external_data"):
        tensor.ClearField(name)
    tensor.ClearField("data_location")
    tensor.raw_data = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
