"""Reads programs made by ``torch.export``: ``.pt2`` files, ``ExportedProgram`` objects and their graph modules.

There the modules are gone, so that the graph tells what each weight is for. Two things differ from the module itself:
``x @ w`` shows which axis of ``w`` is the output, and a parametrized weight is seen as the parameters it is made from.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from qvis.adapters.rewritten import Rewritten
from qvis.adapters.torch.affines import Affine, affines_of_program
from qvis.adapters.torch.dequantizing import DEQUANTIZE, dequantized, register_quantized_operations
from qvis.adapters.torch.graph import graph_of_export
from qvis.adapters.torch.parts import RULES, Part, bias_of, known_type
from qvis.adapters.torch.rewriting import multipliable as multipliable
from qvis.adapters.torch.tensors import Collector, Source, framework
from qvis.errors import NoGraphError, NotRunnableError
from qvis.layers import Graph, Network
from qvis.rewriting import Rewriting
from qvis.running import Batch, Runner

if TYPE_CHECKING:
    from torch import fx
    from torch.export import ExportedProgram


class Call(NamedTuple):
    """One operation of a graph."""

    operation: str
    """Such as ``aten.conv2d``, without its overload."""
    tensors: dict[str, list[str]]
    """The values it takes, by the name of the argument."""
    numbers: dict[str, float]
    """Its arguments that are a number or a truth value."""
    result: str
    """The value it returns; the first where there are several."""


_MARKS = ("models/model.json", "serialized_exported_program.json")
"""How names in the zip file of an exported program end: since torch 2.8, and before."""


@dataclass
class Program:
    """What must be known of an exported program to find its weights."""

    parameters: dict[str, Source]
    """By the name they have in the module."""
    buffers: dict[str, Source]
    """All other tensors, constants too."""
    origins: dict[str, str]
    """The parameter or buffer that a value of the graph is."""
    calls: list[Call] = field(default_factory=list)
    types: dict[str, str] = field(default_factory=dict)
    """The full name of the class of each module; the outermost module is ``""``."""

    @cached_property
    def dequantized(self) -> dict[str, Source]:
        """The integers that the program turns into weights, as these weights, by their paths."""
        return dequantized(self)

    def source(self, path: str) -> Source | None:
        """The tensor at a path, as it is stored."""
        return self.parameters.get(path, self.buffers.get(path))

    def note_modules(self, stack: Iterable[tuple[str, str]]) -> None:
        """Take in the modules that an operation belongs to, as (name, class)."""
        for name, cls in stack:
            self.types.setdefault(name.partition("@")[0], cls)  # a second call of the module is named "conv@1"


def handles(model: object) -> bool:
    """Whether ``model`` is the path of an exported program, or one itself. Does not import torch."""
    if isinstance(model, Path):
        return model.suffix.lower() == ".pt2" or _is_archive(model)
    return _is_export(model) or _is_graph(model)


def _is_archive(path: Path) -> bool:
    """Whether a file of any name is one that ``torch.export.save`` wrote."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                return False
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return False
    return any(name.endswith(_MARKS) for name in names)


def _is_export(model: object) -> bool:
    export = sys.modules.get("torch.export")
    return export is not None and isinstance(model, export.ExportedProgram)


def _is_graph(model: object) -> bool:
    """Whether it is a graph of bare operations; one that still calls modules is better read as a module."""
    fx, ops = sys.modules.get("torch.fx"), sys.modules.get("torch._ops")
    if fx is None or ops is None or not isinstance(model, fx.GraphModule):
        return False
    return any(isinstance(node.target, ops.OpOverload) for node in model.graph.nodes)


def read(model: Path | ExportedProgram | fx.GraphModule) -> Network:
    """List the weights of an exported program under the names they have in the module it was made from.

    A file is read as data: unlike in ``torch.export.load``, nothing in it is executed, and nothing but plain tensors is
    unpickled. Weights that are only used inside nested graphs (``torch.cond``) are listed as ``other``.

    Raises
    ------
    BadArgumentError
        The file is damaged, or holds no exported program.
    """
    program, name = _program(model)
    found = Collector()
    biases = _biases(program)
    for path, source, part in _weights(program):
        found.add(part.name_in(path.rpartition(".")[0]), source, part, _bias(program, biases, path, source, part))
    name = program.types.get("", name).rpartition(".")[2]
    weights = {**program.parameters, **program.dequantized}
    parameters = {source.key: source.get().numel() for source in weights.values()}
    return found.network(name, framework(), sum(parameters.values()))


def _biases(program: Program) -> dict[Hashable, Source]:
    """What is added to the channels of a weight's first use, by the key of the weight."""
    held = {value: source for value, path in program.origins.items() if (source := program.source(path)) is not None}
    found: dict[Hashable, Source] = {}
    for call in program.calls:
        if call.operation in _TRANSPOSES | _COPIES:
            origin = next((held[value] for values in call.tensors.values() for value in values if value in held), None)
            held.update({} if origin is None else {call.result: origin})
        names = ("mat2", "self") if call.operation == "aten.addmm" else ("weight", "bias")
        weights, biases = (call.tensors.get(name, []) for name in names)
        for weight, bias in zip(weights, biases, strict=False):
            if weight in held and bias in held:
                found.setdefault(held[weight].key, held[bias])
    return found


def _bias(
    program: Program, biases: Mapping[Hashable, Source], path: str, source: Source, part: Part
) -> tuple[Source, Part] | None:
    """What is added to the channels of a matrix of the tensor at a path, and where in that it is."""
    if part.op == "MultiheadAttention":
        bias = bias_of(part)
        added = None if bias is None else program.source(_beside(path, bias.tensor))
    else:
        bias, added = bias_of(part._replace(tensor="weight")), biases.get(source.key)
    return None if bias is None or added is None else (added, bias)


def _beside(path: str, name: str) -> str:
    """The path of another tensor of the same module."""
    return ".".join(filter(None, (path.rpartition(".")[0], name)))


def _program(model: Path | ExportedProgram | fx.GraphModule) -> tuple[Program, str]:
    """The program and what it is called."""
    if isinstance(model, Path):
        from qvis.adapters.torch.archive import load

        return load(model), model.stem
    if _is_export(model):
        return _from_export(cast("ExportedProgram", model)), "ExportedProgram"
    return _from_graph(cast("fx.GraphModule", model)), "GraphModule"


def _weights(program: Program) -> Iterator[tuple[str, Source, Part]]:
    """Each matrix in the program, with the path and the numbers of its tensor."""
    roles = _roles(program)
    for path, stored in {**program.parameters, **program.buffers}.items():
        source = program.dequantized.get(path, stored)
        role = roles.get(source.key)
        if source.get().ndim >= 2 and (role is not None or path in program.parameters):
            for part in _parts(program, path, role):
                yield path, source, part


def names_by_path(program: Program) -> dict[str, tuple[str, ...]]:
    """The names of the layers in each tensor, by its path; tied ones have the others' names after their own."""
    named: dict[Hashable, list[str]] = {}
    own: dict[str, list[str]] = {}
    keys: dict[str, Hashable] = {}
    for path, source, part in _weights(program):
        name = part.name_in(path.rpartition(".")[0])
        own.setdefault(path, []).append(name)
        named.setdefault(source.key, []).append(name)
        keys[path] = source.key
    return {path: tuple(dict.fromkeys([*own[path], *named[key]])) for path, key in keys.items()}


def opened(model: Path) -> ExportedProgram:
    """The program in a file, loaded to be run. This trusts the file: ``torch.export.load`` unpickles parts of it."""
    import torch

    from qvis.adapters.torch.graph import _quiet

    try:
        with _quiet():
            register_quantized_operations()
            return torch.export.load(model)
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0][:200]
        raise NotRunnableError(
            f"model: {str(model)!r} cannot be loaded to be run ({type(error).__name__}: {text}); "
            "give the model that it was exported from"
        ) from error


def load(model: Path) -> ExportedProgram:
    """The program in a file; see :func:`opened`."""
    return opened(model)


def runner(model: Path | ExportedProgram | fx.GraphModule, network: Network, loss: Any = None) -> Runner:
    """Make a program ready to be run on other weights; see :func:`qvis.adapters.runner`."""
    from qvis.adapters.torch.running import TorchRunner

    if isinstance(model, Path):
        model = opened(model)
    program, _ = _program(model)
    module = cast("ExportedProgram", model).module() if _is_export(model) else cast("fx.GraphModule", model)
    held = _sources({**dict(module.named_parameters()), **dict(module.named_buffers())})
    matrices = [
        (part.name_in(path.rpartition(".")[0]), held[path], part)
        for path, _, part in _weights(program)
        if path in held and path not in program.dequantized
    ]
    return TorchRunner(module, network, loss, matrices)


def graph(model: Path | ExportedProgram | fx.GraphModule, example: Batch | None = None) -> Graph:
    """How data flows through an exported program, which is a graph already: it needs no ``example``.

    Raises
    ------
    NoGraphError
        ``model`` is a file, or a program that no one can follow.
    """
    if isinstance(model, Path):
        if example is None:
            raise NoGraphError(
                "no graph: a .pt2 file is read as data; its graph is taken when the model is run, which trusts the file"
            )
        model = opened(model)
    return graph_of_export(model, read(model))


def rewrite(
    model: Path | ExportedProgram | fx.GraphModule, network: Network, rewriting: Rewriting, inplace: bool = False
) -> Rewritten:
    """Write new numbers into a copy of a program; see :func:`qvis.adapters.torch.rewriting.rewrite_program`."""
    from qvis.adapters.torch.rewriting import rewrite_program

    return rewrite_program(model, network, rewriting, inplace)


def affines(model: Path | ExportedProgram | fx.GraphModule) -> dict[str, Affine]:
    """Factor and shift of the normalizations of a program; see :mod:`qvis.adapters.torch.affines`."""
    return affines_of_program(_program(model)[0])


def save(model: ExportedProgram | fx.GraphModule, path: Path, example: Batch | None = None) -> None:
    """Write a program to a file; see :func:`qvis.adapters.torch.saving.save_program`."""
    from qvis.adapters.torch.saving import save_module, save_program

    if _is_export(model):
        save_program(cast("ExportedProgram", model), path)
    else:
        save_module(cast("fx.GraphModule", model), path, example)


# ---------------------------------------------------------------------------------------------------------------------
# What the graph says about a weight

_USES: dict[str, tuple[str, tuple[str, ...]]] = {
    **{f"aten.conv{n}d": (f"Conv{n}d", ("weight",)) for n in (1, 2, 3)},
    **{f"aten.conv_transpose{n}d": (f"ConvTranspose{n}d", ("weight",)) for n in (1, 2, 3)},
    "aten.convolution": ("Conv", ("weight",)),
    "aten.linear": ("Linear", ("weight",)),
    "aten.bilinear": ("Bilinear", ("weight",)),
    "aten._trilinear": ("Bilinear", ("i2",)),
    "aten.mm": ("MatMul", ("mat2",)),
    "aten._int_mm": ("MatMul", ("mat2",)),
    "aten.addmm": ("MatMul", ("mat2",)),
    "aten.matmul": ("MatMul", ("other",)),
    "aten.embedding": ("Embedding", ("weight",)),
    "aten.embedding_bag": ("EmbeddingBag", ("weight",)),
    "aten._embedding_bag": ("EmbeddingBag", ("weight",)),
    "aten._embedding_bag_forward_only": ("EmbeddingBag", ("weight",)),
    "aten.lstm": ("LSTM", ("params",)),
    "aten.gru": ("GRU", ("params",)),
    "aten.rnn_tanh": ("RNN", ("params",)),
    "aten.rnn_relu": ("RNN", ("params",)),
    "aten.lstm_cell": ("LSTMCell", ("w_ih", "w_hh")),
    "aten.gru_cell": ("GRUCell", ("w_ih", "w_hh")),
    "aten.rnn_tanh_cell": ("RNNCell", ("w_ih", "w_hh")),
    "aten.rnn_relu_cell": ("RNNCell", ("w_ih", "w_hh")),
}
"""The type of layer that an operation is, and its arguments that are weights."""

_TRANSPOSES = {"aten.t", "aten.numpy_T", "aten.transpose", "aten.permute"}
_COPIES = {"aten.alias", "aten.detach", "aten.clone", "aten.contiguous", "aten.to", "aten._to_copy", *DEQUANTIZE}


class _Role(NamedTuple):
    """What a weight is used as."""

    op: str
    groups: int


def _roles(program: Program) -> dict[Hashable, _Role]:
    """The first use of each tensor by its key, followed through copies and transpositions."""
    sources = {**program.buffers, **program.parameters}
    values = {value: (sources[path], False) for value, path in program.origins.items() if path in sources}
    roles: dict[Hashable, _Role] = {}
    for call in program.calls:
        if call.operation in _TRANSPOSES | _COPIES:
            origin = next((values[v] for names in call.tensors.values() for v in names if v in values), None)
            if origin is not None:
                source, flipped = origin
                values[call.result] = (source, flipped ^ (call.operation in _TRANSPOSES))
        op, arguments = _USES.get(call.operation, ("", ()))
        for value in (value for argument in arguments for value in call.tensors.get(argument, ())):
            if value in values:
                source, flipped = values[value]
                role = _role(op, call.numbers, source.get().ndim, flipped)
                if role is not None:
                    roles.setdefault(source.key, role)
    return roles


def _role(op: str, numbers: dict[str, float], axes: int, flipped: bool) -> _Role | None:
    groups = int(numbers.get("groups", 1))
    if op == "MatMul":
        if axes != 2:
            return None
        return _Role("Linear" if flipped else "MatMul", 1)
    if flipped:
        return None
    if op == "Conv":
        op = f"Conv{'Transpose' if numbers.get('transposed') else ''}{axes - 2}d"
    return _Role(op, groups)


def _parts(program: Program, path: str, role: _Role | None) -> list[Part]:
    """The matrices in a tensor: by the type of its module where that is a layer of torch, else by its use."""
    owner, _, name = path.rpartition(".")
    package, _, cls = program.types.get(owner, "").rpartition(".")
    op = known_type(package, cls)
    if op is not None:
        parts = RULES[op](op, name, role.groups if role else 1)
        if parts is not None:
            return parts
    if role is not None:
        # A plain use has the same rule whatever the parameter's name; the gates of a cell are known by their names.
        for known_name in (name, "weight"):
            parts = RULES[role.op](role.op, known_name, role.groups)
            if parts is not None:
                return [part._replace(tensor=name) for part in parts]
    return [Part(name, "other")]


# ---------------------------------------------------------------------------------------------------------------------
# From torch's objects


def _from_export(model: ExportedProgram) -> Program:
    signature = model.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    held = _sources({**model.constants, **model.state_dict})
    parameters = set(signature.parameters)
    program = Program(
        parameters={path: source for path, source in held.items() if path in parameters},
        buffers={path: source for path, source in held.items() if path not in parameters},
        origins=names,
    )
    _add_calls(program, model.graph)
    return program


def _from_graph(model: fx.GraphModule) -> Program:
    program = Program(
        parameters=_sources(dict(model.named_parameters(remove_duplicate=False))),
        buffers=_sources(dict(model.named_buffers(remove_duplicate=False))),
        origins={node.name: str(node.target) for node in model.graph.nodes if node.op == "get_attr"},
    )
    _add_calls(program, model.graph)
    return program


def _sources(held: Mapping[str, object]) -> dict[str, Source]:
    import torch

    return {path: Source.of(value) for path, value in held.items() if isinstance(value, torch.Tensor)}


def _add_calls(program: Program, graph: fx.Graph) -> None:
    from torch._ops import OpOverload
    from torch.fx import Node

    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack", {}).values()
        program.note_modules(
            (name, cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}") for name, cls in stack
        )
        if not isinstance(node.target, OpOverload):
            continue
        schema = node.target._schema
        names = [argument.name for argument in schema.arguments]
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        listed = {name: value if isinstance(value, (list, tuple)) else [value] for name, value in given.items()}
        tensors = {name: [one.name for one in values if isinstance(one, Node)] for name, values in listed.items()}
        numbers = {name: value for name, value in given.items() if isinstance(value, (int, float))}
        program.calls.append(Call(schema.name.replace("::", "."), tensors, numbers, node.name))
