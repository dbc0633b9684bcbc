"""Writes new numbers into copies of ONNX models: where they are stored, or into tensors of their own at their use.

A weight that reaches its node by way of transpositions, reshapes and casts is written where it is stored. A bias or a
number of a normalization that other nodes use too gets a tensor of its own, so that those keep theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from qvis.adapters.encodings import Array
from qvis.adapters.onnx.flow import Following
from qvis.adapters.onnx.names import norm_names
from qvis.adapters.onnx.prepared import Prepared, prepare
from qvis.adapters.onnx.protos import (
    REAL,
    Slot,
    captured_names,
    load_proto,
    multiply_inputs,
    nodes_of,
    number_of_type,
    replace_numbers,
    tensors_of,
    unused,
)
from qvis.adapters.onnx.tensors import TYPES
from qvis.adapters.rewritten import Rewritten, check_layers, check_stored, express, fitted, precision_notes
from qvis.errors import BadArgumentError, UnsupportedModelError, suggest
from qvis.layers import FloatArray, Network, Node
from qvis.rewriting import Rewriting

_AFFINE = ("layer_norm", "rms_norm", "group_norm")
_NORM_PARTS = {"scale": "weight", "shift": "bias", "mean": "running_mean", "variance": "running_var"}
_TITLES = ("weight", "bias")
"""What tensors are called that are added, so that nodes are still called after them as before."""


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
    target = model if inplace else load_proto(model)
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
            for slot, (part, title) in enumerate(_NORM_PARTS.items(), 1):
                self._put("norms", name, [(one, slot) for one in results], numbers[part], f"{name}.{title}")

    def _add_affines(self, rewriting: Rewriting) -> None:
        known = _affine_slots(self.prepared, self._shown) if rewriting.affines else {}
        for name, pair in rewriting.affines.items():
            if name not in known:
                raise BadArgumentError(f"affines: no normalization is called {name!r}{suggest(name, known)}")
            for slot, numbers, part, title in zip(known[name], pair, ("factor", "shift"), _TITLES, strict=True):
                if numbers is None:
                    continue
                if slot is None:
                    raise BadArgumentError(f"affines: the {part} of {name!r} does not exist; give None for it")
                if self.prepared.nodes[slot[0]].input[slot[1]] not in self.prepared.constants:
                    raise BadArgumentError(f"affines: the {part} of {name!r} is computed; give None for it")
                self._put("affines", name, [slot], numbers, f"{name}.{title}")

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
            if kind not in REAL:
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
            for name in captured_names(node):
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
        name = unused(title, self._taken)
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
            stored: Array = wanted.astype(REAL[kind])
        self._check(argument, name, wanted, stored, kind)
        return stored

    def _check(self, argument: str, name: str, wanted: Array, stored: Array, kind: int) -> None:
        if not check_stored(argument, name, wanted, stored, TYPES[kind]) and kind == 10:
            self.rounded.setdefault(TYPES[kind], []).append(name)

    # -----------------------------------------------------------------------------------------------------------------
    # Writing

    def fits(self, model: Any) -> bool:
        """Whether a model has all that is to be written outside of functions."""
        tensors, nodes = tensors_of(model.graph), nodes_of(model.graph)
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

        tensors, nodes = tensors_of(model.graph), nodes_of(model.graph)
        for name, array in self.stored.items():
            replace_numbers(tensors[name], array)
        for (node, index), name in self.slots.items():
            nodes[node].input[index] = name
        for node, index in self.relus.items():
            nodes[node].op_type = "Relu"
            del nodes[node].input[:index], nodes[node].input[1:], nodes[node].attribute[:]
        for name, array in self.own.items():
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
            if model.ir_version < 4:  # where initializers had to be inputs
                info = onnx.helper.make_tensor_value_info(name, number_of_type(array), list(array.shape))
                model.graph.input.append(info)
        multiply_inputs(model.graph, self.factors, self._taken)


def _followed(prepared: Prepared) -> Following:
    flow = Following(prepared)
    flow.walk()
    return flow


def _results(flow: Following) -> dict[str, tuple[Node, str]]:
    """The first result of each node of the graph, by the name that it has there."""
    shown = {node.name: node for node in flow.nodes}
    return {name: (shown[name], one) for one, name in flow.makers.items() if one in flow.prepared.nodes}
