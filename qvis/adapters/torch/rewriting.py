"""Writes new numbers into copies of PyTorch models: modules, graphs of bare operations, and exported programs.

The numbers go into the tensors that are there, so that types, devices, ties and flags stay. Only a weight that is
computed from other parameters has to be made a plain one first.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Hashable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from qvis.adapters.rewritten import (
    Rewritten,
    check_layers,
    check_stored,
    express,
    fitted,
    precision_notes,
)
from qvis.adapters.torch.copying import copied
from qvis.adapters.torch.module_changes import multipliable_linears, plan_changes
from qvis.adapters.torch.parts import Part, bias_of, rows
from qvis.adapters.torch.plain import make_plain
from qvis.adapters.torch.program_changes import multipliable_products, plan_program_changes
from qvis.adapters.torch.tensors import _stored_type, identity
from qvis.errors import BadArgumentError, suggest
from qvis.layers import FloatArray, Network
from qvis.rewriting import Rewriting

if TYPE_CHECKING:
    from torch import Tensor, fx, nn
    from torch.export import ExportedProgram

_STATISTICS = {"mean": "running_mean", "variance": "running_var", "scale": "weight", "shift": "bias"}


def rewrite_module(model: nn.Module, network: Network, rewriting: Rewriting, inplace: bool = False) -> Rewritten:
    """Write new numbers into a copy of a module; with ``inplace`` into the module itself.

    A clip of :attr:`Rewriting.unclipped` that is an ``nn.ReLU6`` or ``nn.Hardtanh`` becomes an ``nn.ReLU``, wherever
    the model uses that module; one in the code of the model stays, and a note says so.

    A Linear of :attr:`Rewriting.multiplies` becomes a :class:`~qvis.adapters.torch.scaled_linear.ScaledLinear`, an
    ``nn.Linear`` with the same parameters and the buffer ``<layer>.input_scale``, (in_features,), by which it
    multiplies its input. A state dict has this key too, and a pickled model needs qvis to be loaded; a ``.pt2`` file
    does not.

    Parameters
    ----------
    model
        Any module. Of one that was compiled the module inside is copied, and that is what is returned.
    network
        What was read of it.
    rewriting
        The numbers.
    inplace
        Whether to write into ``model``. It is checked first, so that it stays as it is where something is wrong.

    Returns
    -------
    Rewritten
        The copy has the flags, hooks and ties of the original. Its notes name weights that were computed by a
        parametrization and are plain ones now, and what could not be copied.

    Raises
    ------
    BadArgumentError
        A name or a shape is wrong, a layer has no bias, numbers do not fit a type, or a weight is computed from others
        or quantized where it would have to be written as it is. A layer whose input is to be multiplied is not exactly
        an ``nn.Linear``, or its weight is used without calling it.
    """
    from qvis.adapters.torch import _unwrap, _walk

    notes: list[str] = []
    inner = _unwrap(model)
    numbers = _of_module(inner)
    if network.graph is not None:  # what a module does counts, not what it says of itself
        numbers.epsilons.update((name, norm.epsilon) for name, norm in network.graph.norms.items())
    plan = _planned(numbers, network, rewriting)
    computed = [path for path in plan.values if path in numbers.computed]
    changes = plan_changes(dict(_walk(inner)), numbers.weights, computed, network, rewriting)
    if inplace and computed:
        raise BadArgumentError(
            f"inplace: {computed[0]!r} is computed from other parameters ({numbers.computed[computed[0]]}), and would "
            "have to become a plain one; rewrite a copy, with inplace=False"
        )
    new = inner
    if not inplace:
        new, notes = copied(inner)
        if inner is not model:
            notes.append("the model was compiled, and the copy is not; call torch.compile on it")
        modules = dict(_walk(new))
        for path in computed:
            owner, _, name = path.rpartition(".")
            make_plain(modules[owner], name)
            notes.append(f"{path!r} was computed by {numbers.computed[path]}, and is a plain parameter in the copy")
    tensors = numbers.tensors if inplace else _of_module(new).tensors
    _write(tensors, plan, numbers.same)
    changes.make(dict(_walk(new)))
    rounded = precision_notes(plan.rounded) + precision_notes(changes.rounded)
    return Rewritten(model if inplace else new, (*notes, *changes.notes, *rounded))


def rewrite_program(
    model: Path | ExportedProgram | fx.GraphModule, network: Network, rewriting: Rewriting, inplace: bool = False
) -> Rewritten:
    """Write new numbers into a copy of an exported program, or of the one in a file.

    Clips of :attr:`Rewriting.unclipped` become ``aten.relu``. For :attr:`Rewriting.multiplies`, ``aten.mul`` by the new
    buffer ``<layer>.input_scale``, (in_features,), is inserted before each product with the layer's weight.

    A file is loaded with ``torch.export.load``, which runs what it says: rewrite only files that you trust.

    Raises
    ------
    BadArgumentError
        See :func:`rewrite_module`; or ``inplace`` is asked of a file.
    """
    import torch

    from qvis.adapters.torch.exported import _from_export, _from_graph, _is_export

    program: Any = model
    if isinstance(model, Path):
        if inplace:
            raise BadArgumentError(f"inplace: the file {str(model)!r} is never changed; save what is returned")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(model)
    numbers = _of_program(program, network if rewriting.norms else None)
    plan = _planned(numbers, network, rewriting)
    changes = plan_program_changes(program, numbers.placed, network, rewriting)
    if not inplace and not isinstance(model, Path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = copy.deepcopy(model)
    held = _from_export(program) if _is_export(program) else _from_graph(program)
    tensors = {path: source.get() for path, source in {**held.parameters, **held.buffers}.items()}
    _write(tensors, plan, numbers.same)
    changes.make(program)
    rounded = precision_notes(plan.rounded) + precision_notes(changes.rounded)
    return Rewritten(program, (*changes.notes, *rounded))


def multipliable(model: Path | nn.Module | ExportedProgram | fx.GraphModule, network: Network) -> list[str]:
    """The layers before which a rewriting that writes their weights can insert a multiplication, by name."""
    from qvis.adapters.torch import _unwrap, _walk
    from qvis.adapters.torch.exported import handles, opened

    if handles(model):
        program = opened(model) if isinstance(model, Path) else model
        return multipliable_products(program, _of_program(program, None).placed, network)
    inner = _unwrap(cast("nn.Module", model))
    numbers = _of_module(inner)
    return multipliable_linears(dict(_walk(inner)), numbers.weights, numbers.computed, network)


# ---------------------------------------------------------------------------------------------------------------------
# What there is to write


@dataclass
class _Numbers:
    """The tensors of a model, and what they are for."""

    tensors: dict[str, Tensor]
    """By path, such as ``conv.weight``."""
    epsilons: dict[str, float]
    """Of each normalization by running statistics."""
    layers: dict[str, tuple[str, Part]] = field(default_factory=dict)
    """The tensor that each layer is in, under each of its names."""
    biases: dict[str, tuple[str, Part]] = field(default_factory=dict)
    """The tensor that holds what each layer adds, likewise."""
    computed: dict[str, str] = field(default_factory=dict)
    """How a tensor is computed that is made from others."""

    def __post_init__(self) -> None:
        groups: dict[Hashable, list[str]] = {}
        for path, tensor in self.tensors.items():
            groups.setdefault(identity(tensor), []).append(path)
        self.same = {path: paths for paths in groups.values() for path in paths}
        """All paths under which the model holds the very same numbers."""

    @property
    def weights(self) -> dict[str, list[str]]:
        """The paths of the tensor of each layer that has one for itself."""
        return {name: self.same[path] for name, (path, part) in self.layers.items() if not part.label}

    @property
    def placed(self) -> dict[str, tuple[str, Tensor]]:
        """The path and the tensor that each layer is in."""
        return {name: (path, self.tensors[path]) for name, (path, _) in self.layers.items()}


@dataclass
class _Plan:
    """What is to be written."""

    values: dict[str, Tensor] = field(default_factory=dict)
    rounded: dict[str, list[str]] = field(default_factory=dict)
    """By type, what it cannot hold exactly."""


def _of_module(model: nn.Module) -> _Numbers:
    import torch

    from qvis.adapters.torch import _parts, _sources, _walk

    tensors: dict[str, Tensor] = {}
    epsilons: dict[str, float] = {}
    layers: dict[str, tuple[str, Part]] = {}
    biases: dict[str, tuple[str, Part]] = {}
    computed: dict[str, str] = {}
    with torch.no_grad():
        for path, module in _walk(model):
            sources = dict(_sources(module))
            for holder in (module.__dict__, module._buffers, module._parameters):
                held = {name: one for name, one in holder.items() if isinstance(one, torch.Tensor)}
                tensors.update({_join(path, name): one for name, one in held.items()})
            for name, source in sources.items():
                if source.key == (id(module), name):
                    how = source.notes[0].rpartition(" by ")[2] if source.notes else "the module"
                    computed[_join(path, name)] = how
                    tensors[_join(path, name)] = source.get()
            for part in _parts(module, sources):
                layers.setdefault(part.name_in(path), (_join(path, part.tensor), part))
                bias = bias_of(part)
                if bias is not None and sources.get(bias.tensor) is not None:
                    biases.setdefault(part.name_in(path), (_join(path, bias.tensor), bias))
            epsilon = getattr(module, "eps", None)
            if isinstance(epsilon, float) and isinstance(getattr(module, "running_mean", None), torch.Tensor):
                epsilons[path or "(root)"] = epsilon
    return _Numbers(tensors, epsilons, layers, biases, computed)


def _of_program(program: Any, network: Network | None) -> _Numbers:
    """The same of a program; with a network, also its normalizations."""
    from qvis.adapters.torch.exported import _bias, _biases, _from_export, _from_graph, _is_export, _parts, _roles

    seen = _from_export(program) if _is_export(program) else _from_graph(cast("fx.GraphModule", program))
    sources = {**seen.parameters, **seen.buffers}
    roles, biases = _roles(seen), _biases(seen)
    paths = {source.key: path for path, source in sources.items()}
    epsilons = {} if network is None else _epsilons(program, network)
    numbers = _Numbers({path: source.get() for path, source in sources.items()}, epsilons)
    for path, source in sources.items():
        for part in _parts(seen, path, roles.get(source.key)):
            name = part.name_in(path.rpartition(".")[0])
            numbers.layers.setdefault(name, (path, part))
            bias = _bias(seen, biases, path, source, part)
            if bias is not None:
                numbers.biases.setdefault(name, (paths[bias[0].key], bias[1]))
    return numbers


def _epsilons(program: Any, network: Network) -> dict[str, float]:
    """The epsilon of each normalization of a program, which is written in its graph alone."""
    from qvis.adapters.torch.exported import graph

    found = network.graph or graph(program)
    return {name: norm.epsilon for name, norm in found.norms.items()}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and path != "(root)" else name


# ---------------------------------------------------------------------------------------------------------------------
# From names to tensors


def _planned(numbers: _Numbers, network: Network, rewriting: Rewriting) -> _Plan:
    """What each tensor is to become. Everything is checked here."""
    plan = _Plan()
    check_layers(network, "weights", rewriting.weights, _writable(numbers))
    check_layers(network, "biases", rewriting.biases, numbers.biases)
    for name, matrix in rewriting.weights.items():
        path, part = numbers.layers[name]
        _put(plan, numbers, "weights", name, path, matrix, part)
    for name, bias in rewriting.biases.items():
        path, part = numbers.biases[name]
        _put(plan, numbers, "biases", name, path, bias, part)
    for name, norm in rewriting.norms.items():
        if name not in numbers.epsilons or _join(name, "running_mean") not in numbers.tensors:
            raise BadArgumentError(
                f"norms: no module with running statistics is called {name!r}{suggest(name, numbers.epsilons)}"
            )
        paths = {key: _join(name, tensor) for key, tensor in _STATISTICS.items()}
        has = {f"has_{key}": paths[key] in numbers.tensors for key in ("scale", "shift")}
        for key, value in express(norm, numbers.epsilons[name], **has).items():
            _put(plan, numbers, "norms", name, paths[key], value)
    for name, pair in rewriting.affines.items():
        owner = _owner(name, numbers)
        for tensor, given in zip(("weight", "bias"), pair, strict=True):
            if given is not None:
                path = _join(owner, tensor)
                if path not in numbers.tensors:
                    what = "factor" if tensor == "weight" else "shift"
                    raise BadArgumentError(f"affines: {name!r} has no {what} ({path!r}); give None for it")
                _put(plan, numbers, "affines", name, path, given)
    return plan


def _writable(numbers: _Numbers) -> list[str]:
    found = []
    for name, (path, _) in numbers.layers.items():
        tensor = numbers.tensors.get(path)
        packed = numbers.computed.get(path) == "the module"
        if tensor is not None and not packed and _stored_type(tensor) is None:
            found.append(name)
    return found


def _owner(node: str, numbers: _Numbers) -> str:
    """The module that a normalization's node in the graph belongs to."""
    name = node.partition("@")[0]
    for owner in (name, name.rpartition("/")[0] if "/" in name else ""):
        if owner and (_join(owner, "weight") in numbers.tensors or _join(owner, "bias") in numbers.tensors):
            return owner
    raise BadArgumentError(
        f"affines: {node!r} is no module with parameters of the names 'weight' and 'bias', where its factor and shift "
        "would be written; leave it out"
    )


def _put(
    plan: _Plan,
    numbers: _Numbers,
    argument: str,
    name: str,
    path: str,
    given: FloatArray,
    part: Part | None = None,
) -> None:
    """Plan new numbers for a tensor, or for one matrix in it."""
    import torch

    path = next((one for one in numbers.same.get(path, ()) if one in plan.values), path)
    before = plan.values.get(path, numbers.tensors[path]).detach()
    places = None
    if part is not None and part.view is not rows:
        # the view says where each number of the matrix lies in the tensor
        places = part.view(torch.arange(before.numel()).reshape(before.shape))
    elif part is not None:
        places = rows(torch.empty(before.shape, device="meta"))
    if part is None and np.ndim(given) == 1 and np.size(given) == before.numel():
        given = np.reshape(given, tuple(before.shape))
    given = fitted(argument, name, given, tuple(before.shape if places is None else places.shape))
    wanted = torch.from_numpy(np.array(given, dtype=np.float64 if given.dtype == np.float64 else np.float32))
    new = wanted.to(before.dtype)
    kind = str(before.dtype).removeprefix("torch.")
    kept = check_stored(argument, name, wanted.numpy(), new.to(wanted.dtype).numpy(), kind)
    if not kept and before.dtype.itemsize < 4:
        plan.rounded.setdefault(kind, []).append(name)
    if places is None or places.is_meta:
        plan.values[path] = new.reshape(before.shape)
        return
    flat = before.cpu().reshape(-1).clone()
    flat[places.reshape(-1)] = new.reshape(-1)
    plan.values[path] = flat.reshape(before.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def _write(tensors: Mapping[str, Tensor], plan: _Plan, same: Mapping[str, list[str]]) -> None:
    import torch

    for path, value in plan.values.items():
        targets = {id(one): one for name in (path, *same[path]) for one in [tensors.get(name)]}
        for target in (one for one in targets.values() if one is not None):
            spread = any(step == 0 and size > 1 for step, size in zip(target.stride(), target.shape, strict=True))
            if spread:  # several numbers in one place of the memory
                target.data = value.to(target.device)
                continue
            with torch.no_grad(), torch.inference_mode() if target.is_inference() else nullcontext():
                target.copy_(value)
