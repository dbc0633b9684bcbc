"""From a model to a graph whose weights and activations can be rounded.

The graph holds the parameters under the names that they have in the model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qvis.data import split
from qvis.errors import BadArgumentError, QvisError, UnsupportedModelError
from qvis.quantization.backends.pt2e_folding import fold_norms, make_linear
from qvis.quantization.methods import Job
from qvis.running import Batch

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

GraphModule = Any
"""Of torch.fx; the arguments of its nodes could be anything."""


class Opened(NamedTuple):
    """A model as a graph of operations, on the CPU, in 32-bit floats and evaluation mode, with memory of its own."""

    program: ExportedProgram
    graph: GraphModule
    """With the normalizations folded; its parameters are copies."""
    args: tuple[Any, ...]
    """What it was called with to be followed: tensors."""
    kwargs: dict[str, Any]
    layers: Mapping[str, tuple[str, ...]]
    """The names of the layers in each parameter, by the parameter's path."""
    types: Mapping[str, str]
    """The full name of the class of each module, by the module's path."""
    batch: int | None
    """The only number of samples that it takes; None where any will do."""

    def named(self, bits: Mapping[str, int]) -> dict[str, str]:
        """By what path a tied parameter is known in the model, where the graph has another one."""
        found: dict[str, str] = {}
        for path, names in self.layers.items():
            for other, others in self.layers.items():
                if set(others) == set(names) and others[0] in bits and names[0] not in bits:
                    found.setdefault(path, other)
        return found


def open_model(job: Job) -> Opened:
    """Follow a model with ``torch.export``.

    Raises
    ------
    UnsupportedModelError
        It cannot be followed, or holds no numbers.
    BadArgumentError
        There is nothing to call it with.
    """
    from torch.export import ExportedProgram

    from qvis.adapters.torch.exported import _from_export, names_by_path

    model = job.model
    with quietly():
        program = _of_program(model) if isinstance(model, ExportedProgram) else _export(job)
    args, kwargs = program.example_inputs or ((), {})
    batch = _fixed_batch(program)
    read = _from_export(program)
    paths = {path: _names(path, names) for path, names in names_by_path(read).items()}
    graph = program.module(check_guards=False)
    with quietly():
        _own(graph)
        fold_norms(graph)
        make_linear(graph)
        graph.graph.eliminate_dead_code()
        graph.recompile()
    return Opened(program, graph, args, kwargs, paths, read.types, batch)


@contextmanager
def quietly() -> Iterator[None]:
    """Without what torch prints and warns of, and with the random generators as they were."""
    import torch

    from qvis.adapters.torch.exchange import settings_kept
    from qvis.adapters.torch.graph import _quiet

    with settings_kept(torch.device("cpu")), _quiet():
        yield


def _export(job: Job) -> ExportedProgram:
    from qvis.adapters.torch.copying import copied
    from qvis.adapters.torch.graph import _check, _first_line, _settled

    if job.example is None:
        raise BadArgumentError(
            "example_inputs: none were given, and the model has to be called once to be followed; give its shape, such "
            "as (1, 3, 224, 224), or data"
        )
    import torch

    model = job.model
    try:
        _check(model)
    except QvisError as error:
        text = str(error).removeprefix("no graph: ")
        raise UnsupportedModelError(f"model: {text}") from None
    with _settled(model):
        plain = _in_float(copied(model)[0])
    plain.eval()
    failures = []
    for batch, free, strict in _ways(job, job.example):
        args, kwargs = tensors_of(batch)
        shapes = any_batch(args, kwargs) if free else None
        try:
            with torch.no_grad():
                program = torch.export.export(plain, args, kwargs, dynamic_shapes=shapes, strict=strict)
        except Exception as error:  # whatever a model of the user's raises
            failures.append(_first_line(error))
            continue
        if not free or _fixed_batch(program) is None:
            return _functional(program)
    _check_example(plain, job)
    raise UnsupportedModelError(
        f"model: torch.export cannot follow it ({failures[0]}); take out what depends on the numbers it is given, or "
        "write .safetensors with method='weight_only' or 'dynamic', which needs no graph"
    )


def _check_example(model: nn.Module, job: Job) -> None:
    """Refuse inputs that the model cannot be called with, whether it can be followed or not."""
    import torch

    from qvis.adapters.torch.graph import _first_line
    from qvis.adapters.torch.running import _describe

    assert job.example is not None
    args, kwargs = tensors_of(job.example)
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        given = "calibration_data" if job.calibration else "example_inputs" if job.training is None else "train_data"
        raise BadArgumentError(
            f"{given}: the model fails on inputs of {_describe(job.example)} with {_first_line(error)}; give what it "
            "is called with; an .npz file has x for one input, or inputs under the names that the model has for them"
        ) from error


def _ways(job: Job, example: Batch) -> Iterator[tuple[Batch, bool, bool]]:
    """What to call a model with, whether for any number of samples, and whether by its byte code."""
    for strict in (False, True):
        yield _several(example), True, strict
    data = [*job.calibration[:1], *(job.training.batches[:1] if job.training is not None else ())]
    for batch in (*data, example, *(split(one, 1)[0] for one in (*data, example)[:1])):
        yield batch, False, False


def _in_float(model: nn.Module) -> nn.Module:
    """The same on the CPU, real numbers as 32-bit floats."""
    return model.float().cpu()


def _of_program(program: ExportedProgram) -> ExportedProgram:
    import torch

    held = {**program.state_dict, **program.constants}
    for name, tensor in held.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if tensor.is_meta:
            raise UnsupportedModelError(
                f"model: {name!r} has a shape but no numbers (meta device); load the weights first"
            )
        if tensor.device.type != "cpu" or (tensor.is_floating_point() and tensor.dtype != torch.float32):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UnsupportedModelError(
                f"model: the program holds {name!r} as {kind} on {tensor.device}, and only float32 on the CPU is "
                "quantized; export the model anew after model.float().cpu(), or give the module itself"
            )
    if not program.example_inputs:
        raise UnsupportedModelError("model: the program has no example inputs; export it anew, or give the module")
    return _functional(copy.deepcopy(program))


def _functional(program: ExportedProgram) -> ExportedProgram:
    """Without operations in place, where there are any."""
    from torch._ops import OpOverload

    targets = (node.target for node in program.graph.nodes)
    if any(isinstance(one, OpOverload) and one._schema.is_mutable for one in targets):
        functional: ExportedProgram = program.run_decompositions({})
        return functional
    return program


def _several(example: Batch) -> Batch:
    """At least two samples: a graph that was followed with one takes no more."""
    from torch.utils import _pytree as pytree

    def twice(value: Any) -> Any:
        if isinstance(value, np.ndarray) and value.ndim:
            return np.concatenate([value, value])
        return value.repeat(2, *[1] * (value.ndim - 1)) if hasattr(value, "repeat") and value.ndim else value

    if example.size > 1:
        return example
    args, kwargs = pytree.tree_map(twice, (tuple(example.args), dict(example.kwargs)))
    return Batch(args, kwargs, size=2)


def tensors_of(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs as tensors of their own on the CPU, real numbers as 32-bit floats."""
    from torch.utils import _pytree as pytree

    args, kwargs = pytree.tree_map(as_tensor, (tuple(batch.args), dict(batch.kwargs)))
    return args, kwargs


def as_tensor(value: Any) -> Any:
    """An array or tensor as a tensor of its own on the CPU, real numbers as 32-bit floats; all else as it is."""
    import torch

    if isinstance(value, (np.ndarray, np.generic)):
        value = torch.from_numpy(np.array(value))
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu().clone()
    return value.float() if value.is_floating_point() else value


def any_batch(args: Any, kwargs: Any) -> Any:
    """That the first axis of every tensor may have any length."""
    import torch
    from torch.utils import _pytree as pytree

    found = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor) and leaf.ndim:
            found[leaf] = {0: torch.export.Dim.AUTO}
    return found


def _fixed_batch(program: ExportedProgram) -> int | None:
    inputs = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        shape: Any = getattr(node.meta.get("val"), "shape", ())
        if node.op == "placeholder" and node.name in inputs and len(shape) and isinstance(shape[0], int):
            return int(shape[0])
    return None


def _names(path: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """The layers in a parameter; where a weight is computed from it, as by weight_norm, the layer of that weight."""
    owner, found, rest = path.partition(".parametrizations.")
    if not found:
        return names
    tensor = rest.partition(".")[0]
    return (owner,) if tensor == "weight" else (f"{owner}.{tensor}",)


def _own(graph: GraphModule) -> None:
    """Give a graph memory of its own; tied parameters stay tied."""
    import torch

    known: dict[int, Any] = {}
    for module in graph.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in known:
                    new = tensor.detach().clone()
                    known[id(tensor)] = torch.nn.Parameter(new) if held is module._parameters else new
                held[name] = known[id(tensor)]
