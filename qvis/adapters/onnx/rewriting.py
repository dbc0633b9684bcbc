"""Writes new numbers into copies of ONNX models: where they are stored, or into tensors of their own at their use.

A weight that reaches its node by way of transpositions, reshapes and casts is written where it is stored. A bias or a
number of a normalization that other nodes use too gets a tensor of its own, so that those keep theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qvis.adapters.encodings import Array
from qvis.adapters.onnx.flow import _Flow, norm_names
from qvis.adapters.onnx.prepared import _REAL, LIMIT, Prepared, prepare
from qvis.adapters.onnx.tensors import TYPES
from qvis.adapters.rewritten import Rewritten, check_layers, check_stored, express, fitted, precision_notes
from qvis.errors import BadArgumentError, OutputError, UnsupportedModelError, suggest
from qvis.layers import FloatArray, Network
from qvis.rewriting import Rewriting

_BIASED = ("Conv", "ConvTranspose", "FusedConv", "NhwcConv", "NhwcFusedConv", "Gemm", "FusedGemm")
"""Operators that take what they add to their channels as their third input."""
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
        The numbers. Biases are those that a Conv or Gemm node takes itself; what an Add node after a MatMul adds is no
        part of the layer.
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
    return Rewritten(target, (*notes, *precision_notes(plan.rounded)))


def affines_of(model: Any) -> dict[str, tuple[FloatArray | None, FloatArray | None]]:
    """Factor and shift of the layer, RMS and group normalizations that hold theirs, by the name of the node."""
    prepared = prepare(model, UnsupportedModelError)
    found: dict[str, tuple[FloatArray | None, FloatArray | None]] = {}
    for name, result in _affine_results(prepared).items():
        given = [*prepared.nodes[result].input[1:3], ""][:2]
        if given[0] in prepared.constants and (not given[1] or given[1] in prepared.constants):
            factor, shift = (prepared.read(one).astype(np.float32) if one else None for one in given)
            found[name] = (factor, shift)
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
    rounded: dict[str, list[str]] = field(default_factory=dict)
    """By type, what it cannot hold exactly."""

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
        check_layers(network, "biases", rewriting.biases, [name for name in known if self._bias_slots(held[name])])
        for name, matrix in rewriting.weights.items():
            place = self.prepared.layers[held[name]]
            before = self._now(place.tensor)
            matrix = fitted("weights", name, matrix, place.shape)
            with np.errstate(over="ignore"):
                after = place.write(matrix, before)
            self._check("weights", name, matrix, place.take(after), place.tensor)
            self.stored[place.tensor] = after
        for name, bias in rewriting.biases.items():
            self._add_bias(name, self._bias_slots(held[name]), bias)
        self._add_norms(rewriting)
        self._add_affines(rewriting)

    # -----------------------------------------------------------------------------------------------------------------
    # Biases and normalizations

    def _bias_slots(self, layer: str) -> list[Slot]:
        """The inputs that are the bias of a layer; none where one of its uses has none."""
        found: list[Slot] = []
        for use in self.prepared.uses:
            if use.layer == layer:
                node = self.prepared.nodes[use.node]
                given = node.input[2] if len(node.input) > 2 else ""
                if node.op_type not in _BIASED or use.slot != 1 or given not in self.prepared.constants:
                    return []
                found.append((use.node, 2))
        return found

    def _add_bias(self, name: str, slots: list[Slot], bias: FloatArray) -> None:
        nodes = [self.prepared.nodes[node] for node, _ in slots]
        if len({node.input[2] for node in nodes}) > 1:
            raise BadArgumentError(f"biases: {name!r} is used {len(nodes)} times with biases that differ; leave it out")
        factors = [one.f for node in nodes for one in node.attribute if one.name == "beta"]
        if any(factor != 1 for factor in factors):
            raise BadArgumentError(f"biases: {name!r} multiplies its bias by {factors[0]:.4g} (beta); leave it out")
        rows = self.prepared.layers[self._layer_at(slots[0])].shape[0]
        self._put("biases", name, slots, fitted("biases", name, bias, (rows,)), f"{name}.bias")

    def _layer_at(self, slot: Slot) -> str:
        return next(use.layer for use in self.prepared.uses if use.node == slot[0])

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
        if not rewriting.affines:
            return
        results = _affine_results(self.prepared)
        for name, pair in rewriting.affines.items():
            if name not in results:
                raise BadArgumentError(f"affines: no normalization is called {name!r}{suggest(name, results)}")
            node = self.prepared.nodes[results[name]]
            for slot, numbers in enumerate(pair, 1):
                if numbers is None:
                    continue
                given = node.input[slot] if len(node.input) > slot else ""
                part = "factor" if slot == 1 else "shift"
                if given not in self.prepared.constants:
                    what = "is computed" if given else "does not exist; give None for it"
                    raise BadArgumentError(f"affines: the {part} of {name!r} {what}")
                self._put("affines", name, [(results[name], slot)], numbers, f"{name}.{part}")

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
        proto = self.prepared.constants[source]
        wanted, shape = np.asarray(numbers), tuple(proto.dims)
        if wanted.size == int(np.prod(shape)):
            wanted = wanted.reshape(shape)
        elif argument != "biases":
            fitted(argument, name, wanted, shape)
        with np.errstate(over="ignore"):
            stored = wanted.astype(_REAL[proto.data_type])
        self._check(argument, name, wanted, stored, source)
        if set(self._users[source]) <= set(slots) and stored.shape == shape and source not in self.stored:
            self.stored[source] = stored
            return
        made = {one for node in self.prepared.model.graph.node for one in node.output}
        taken = self._users.keys() | self.prepared.constants.keys() | made | self.own.keys()
        numbered = (title, *(f"{title}#{number}" for number in range(2, len(taken) + 3)))
        new = next(one for one in numbered if one not in taken)
        self.own[new] = stored
        self.slots.update(dict.fromkeys(slots, new))

    def _check(self, argument: str, name: str, wanted: Array, stored: Array, tensor: str) -> None:
        number = self.prepared.constants[tensor].data_type
        kept = check_stored(argument, name, wanted, stored, TYPES[number])
        if not kept and number == 10:
            self.rounded.setdefault(TYPES[number], []).append(name)

    # -----------------------------------------------------------------------------------------------------------------
    # Writing

    def fits(self, model: Any) -> bool:
        """Whether a model has all that is to be written outside of functions."""
        tensors, nodes = _tensors(model.graph), _nodes(model.graph)
        # a node of the model that calls a function may have the result of one inside it
        known = (
            node in nodes and (nodes[node].op_type, nodes[node].domain) == (inner.op_type, inner.domain)
            for node, inner in ((node, self.prepared.nodes[node]) for node, _ in self.slots)
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
        for name, array in self.own.items():
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
            if model.ir_version < 4:  # where initializers had to be inputs
                info = onnx.helper.make_tensor_value_info(name, _type_of(array), list(array.shape))
                model.graph.input.append(info)


def _affine_results(prepared: Prepared) -> dict[str, str]:
    """The first result of each layer, RMS and group normalization, by the name of its node in the graph."""
    flow = _Flow(prepared)
    flow.walk()
    known = {node.name for node in flow.nodes if node.op in _AFFINE}
    return {name: result for result, name in flow._makers.items() if name in known and result in prepared.nodes}


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
    return {next(filter(None, node.output), ""): node for node in graph.node}


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
