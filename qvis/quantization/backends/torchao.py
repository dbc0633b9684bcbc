"""Quantizes PyTorch models with torchao: weights alone, or Linear layers that round what enters them at run time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvis.errors import BadArgumentError, UnsupportedModelError
from qvis.layers import Layer
from qvis.quantization.methods import FLOAT, Epoch, Job
from qvis.running import Batch
from qvis.words import count, listed_names

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

_OPS = {"weight_only": ("Linear", "Embedding", "Conv2d"), "dynamic": ("Linear",)}
"""What torchao quantizes on a CPU."""
_SAFE_BITS = 7
"""Integers of so many bits are multiplied rightly by every processor."""


def check(job: Job) -> None:
    """Refuse models in which nothing can be quantized so.

    Raises
    ------
    UnsupportedModelError
        It is no ``torch.nn.Module``, or none of the layers that are to be quantized can be.
    BadArgumentError
        A ``.pt2`` file is asked for without inputs to call the model with.
    """
    import torch

    if not isinstance(job.model, torch.nn.Module) or type(job.model).__module__.startswith("torch.fx"):
        raise UnsupportedModelError(
            f"model: torchao quantizes the modules of a torch.nn.Module, and got an object of type "
            f"{type(job.model).__name__}; give the module that it was exported from, or another method or output"
        )
    if job.cell.suffix == ".pt2" and job.example is None:
        raise BadArgumentError(
            "example_inputs: a .pt2 file holds a program that is found by calling the model; give inputs to call it "
            "with, such as the shape (1, 128), or name the output .safetensors"
        )
    if not any(not why for _, _, why in _layers(job)):
        told = _reasons(job) or "all layers were left out"
        raise UnsupportedModelError(
            f"model: {job.network.name} has no layer for torchao to quantize: {told}; {_way(job)}"
        )


def convert(job: Job, target: Path) -> tuple[Epoch, ...]:
    """Write a copy of the model with integers for weights; see :class:`qvis.quantization.methods.Backend`."""
    import torch

    from qvis.adapters.torch.copying import copied
    from qvis.adapters.torch.graph import _quiet, _settled

    with _settled(job.model), _quiet():
        model, shared = copied(_unwrapped(job.model))
        model = model.cpu().eval().requires_grad_(False)
    job.notes.extend(shared)
    done = list(job.track([layer for layer, _, why in _layers(job) if not why], "Quantizing"))
    with torch.no_grad(), _settled(model), _quiet():
        modules = _modules(model)
        for layer in done:
            _quantize([modules[name] for name in (layer.name, *layer.aliases)], job.bits[layer.name], job)
        _try(model, job)
        if job.example is not None and target.suffix.lower() == ".pt2":
            from qvis.adapters.torch.saving import save_program

            save_program(_program(model, job, job.example), target)
        else:
            from qvis.adapters.torch.integers import save_quantized

            save_quantized(model, target)
    job.notes.extend(_notes(job, done))
    return ()


# ---------------------------------------------------------------------------------------------------------------------
# Which layers


def _layers(job: Job) -> Iterator[tuple[Layer, int, str]]:
    """Each layer that is to be quantized, its width, and why it cannot be; empty where it can."""
    modules = _modules(job.model)
    for layer in job.network.layers:
        bits = job.bits.get(layer.name, FLOAT)
        if bits != FLOAT:
            yield layer, bits, _obstacle(layer, modules, _OPS[job.cell.method])


def _obstacle(layer: Layer, modules: dict[str, nn.Module], ops: tuple[str, ...]) -> str:
    if layer.op not in ops:
        return "is a parameter of a module of your own" if layer.op == "other" else f"is {layer.op}"
    for name in (layer.name, *layer.aliases):
        module = modules.get(name)
        if module is None:
            return "is no module of its own"
        if type(module).__name__ == "NonDynamicallyQuantizableLinear":
            return "is the out_proj of nn.MultiheadAttention, which reads its weight itself"
        if "weight" not in module._parameters or not _is_any(module, ops):
            also = f"as {name!r}, " if name != layer.name else ""
            return f"has a weight that is, {also}computed or used by another kind of layer"
        if getattr(module, "max_norm", None) is not None:
            return "is an Embedding with max_norm, which writes to its weight"
        if module is modules[""]:
            return "is the whole model, which leaves its weight without a name; wrap it in nn.Sequential"
    return ""


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by the names of the layers in them, the whole model as the empty name too."""
    from qvis.adapters.torch import _walk

    found = dict(_walk(model))
    return {**found, "(root)": found[""]}


def _unwrapped(model: nn.Module) -> nn.Module:
    from qvis.adapters.torch import _unwrap

    return _unwrap(model)


def _is_any(module: nn.Module, ops: tuple[str, ...]) -> bool:
    from torch import nn

    return isinstance(module, tuple(getattr(nn, op) for op in ops))


def _reasons(job: Job) -> str:
    """Why layers stay in float, those with the same reason together."""
    groups: dict[str, list[str]] = {}
    for layer, _, why in _layers(job):
        if why:
            groups.setdefault(why, []).append(layer.name)
    return "; ".join(f"{listed_names(names)} {why}" for why, names in groups.items())


def _way(job: Job) -> str:
    """What would quantize a model that torchao does not."""
    others = "post_training to .pt2 or .onnx"
    return (
        f"{others} would work" if job.cell.method == "weight_only" else f"{others}, or weight_only to .pt2, would work"
    )


def _notes(job: Job, done: list[Layer]) -> Iterator[str]:
    left = _reasons(job)
    if left:
        yield f"torchao quantizes {', '.join(_OPS[job.cell.method])} here; what stays in float: {left}"
    widths = {job.bits[layer.name] for layer in done}
    if job.cell.method == "weight_only":
        if min(widths) < 8:
            yield "weights of fewer bits are stored in 8 bits each: they lose what fewer lose, and save no more than 8"
        yield "weights alone are smaller, and no faster: they become floats again in each call"
    elif 8 in widths:
        yield (
            "x86 processors without VNNI (before 2019, and some since) multiply large 8-bit integers wrongly in "
            f"PyTorch; bits={_SAFE_BITS} is right on all of them"
        )
        from qvis.adapters.torch.integer_linear import multiplies_exactly

        if not multiplies_exactly():
            yield "this processor is one of those"
    tied = [(layer.name, *layer.aliases) for layer in done if layer.aliases]
    if tied and job.cell.suffix == ".safetensors":
        names = "; ".join(" and ".join(names) for names in tied)
        yield f"weights that several layers share are stored once, under the first name: {names}"


# ---------------------------------------------------------------------------------------------------------------------
# What is done to them


def _quantize(modules: list[nn.Module], bits: int, job: Job) -> None:
    """Put integers in place of the weight that some modules share."""
    from torch import nn

    from qvis.adapters.torch.integers import dynamic_weight, weight_in_integers

    float_weight: Any = modules[0]._parameters["weight"]
    dynamic = job.cell.method == "dynamic"
    weight = dynamic_weight(float_weight, bits) if dynamic else weight_in_integers(float_weight, bits, job.granularity)
    parameter = nn.Parameter(weight, requires_grad=False)
    for module in modules:
        module._parameters["weight"] = parameter


def _try(model: nn.Module, job: Job) -> None:
    """Run the model once, so that no file is written that cannot be run."""
    from qvis.adapters.torch.graph import _first_line

    if job.example is None:
        job.notes.append("the quantized model was not run, since there was nothing to call it with")
        return
    args, kwargs = _inputs(job, job.example)
    try:
        model(*args, **kwargs)
    except Exception as error:  # whatever the model does with its weights
        raise UnsupportedModelError(
            f"model: {job.network.name} does not run with torchao's weights ({_first_line(error)}); leave the layers "
            "whose weights it uses itself in float with exclude=[...], or write .pt2 or .onnx"
        ) from error


def _inputs(job: Job, example: Batch, times: int = 1) -> tuple[Any, Any]:
    """The example as tensors on the CPU, its samples so many times over."""
    from torch import Tensor
    from torch.utils import _pytree as pytree

    from qvis.adapters.torch.graph import _tensors

    def change(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.cpu().clone()
        return value.repeat(times, *[1] * (value.ndim - 1)) if value.ndim else value

    args, kwargs = pytree.tree_map(change, _tensors(job.model, example))
    return args, kwargs


def _program(model: nn.Module, job: Job, example: Batch) -> ExportedProgram:
    """The model as a program, for any number of samples where it can be followed so."""
    import torch
    from torch.utils import _pytree as pytree

    from qvis.adapters.torch.graph import _first_line

    _lower(model)
    failures = []
    for any_number in (True, False):
        # a program that was followed with one sample takes no more
        args, kwargs = _inputs(job, example, 2 if any_number and example.size == 1 else 1)
        shapes: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and leaf.ndim:
                shapes[leaf] = {0: torch.export.Dim.AUTO}
        for strict in (False, True):
            try:
                program = torch.export.export(
                    model, args, kwargs, dynamic_shapes=shapes if any_number else None, strict=strict
                )
            except Exception as error:
                failures.append(_first_line(error))
                continue
            if _takes_one_number(program):
                job.notes.append(f"the program takes {count(example.size, 'sample')} at a time and no other number")
            return program
    raise UnsupportedModelError(
        f"model: torch.export cannot follow {job.network.name} ({failures[0]}); take out what depends on the numbers "
        "it is given, or name the output .safetensors, which needs no graph"
    )


def _takes_one_number(program: ExportedProgram) -> bool:
    """Whether the first axis of an input must have the length that it was followed with."""
    inputs = set(program.graph_signature.user_inputs)
    values = [node.meta.get("val") for node in program.graph.nodes if node.name in inputs]
    return any(isinstance(next(iter(getattr(value, "shape", ())), None), int) for value in values)


def _lower(model: nn.Module) -> None:
    """Put operations of PyTorch in place of torchao's tensors, so that the program needs torchao no more."""
    from qvis.adapters.torch import _walk
    from qvis.adapters.torch.integer_linear import IntegerLinear
    from qvis.adapters.torch.integers import is_quantized

    new: dict[int, IntegerLinear] = {}
    for _, module in list(_walk(model)):
        for name, child in list(module._modules.items()):
            weight: Any = None if child is None else child._parameters.get("weight")
            if child is None or not is_quantized(weight):
                continue
            if id(child) not in new:
                bits = _SAFE_BITS if weight.reduce_range else 8
                bias = child._parameters.get("bias")
                new[id(child)] = IntegerLinear(weight.qdata, weight.scale.flatten(), bias, bits)
            module._modules[name] = new[id(child)]
