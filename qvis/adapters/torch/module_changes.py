"""Changes operations of PyTorch modules: clips become ReLU, and what enters a Linear is multiplied.

A module that does something else now stays the object that it was, and only its class is exchanged. So its parameters,
hooks and flags stay, and it changes wherever the model holds it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from qvis.adapters.rewritten import check_stored, fitted
from qvis.adapters.torch.calls import type_of
from qvis.adapters.torch.tensors import SCALE
from qvis.errors import BadArgumentError, suggest
from qvis.layers import FloatArray, Graph, Network
from qvis.rewriting import Rewriting
from qvis.words import listed_names

if TYPE_CHECKING:
    from torch import Tensor, nn

FUNCTIONAL = (
    "{name!r}: it is a clip in the code of the model, so that it stays; make it an nn.ReLU6 there, or export the model "
    "with torch.export and give the program"
)


@dataclass
class Changes:
    """What is to become of modules, by their paths."""

    unclipped: list[str] = field(default_factory=list)
    scales: dict[str, Tensor] = field(default_factory=dict)
    """What enters each Linear is multiplied by, with what it is multiplied by already."""
    slowed: list[str] = field(default_factory=list)
    """Layers of a transformer that must not take the fast path, which uses the weights without calling a module."""
    rounded: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def make(self, modules: Mapping[str, nn.Module]) -> None:
        """Make them, in the modules at the same paths."""
        from torch import nn

        for path in self.unclipped:
            object.__setattr__(modules[path], "__class__", nn.ReLU)
            for bound in ("min_val", "max_val"):
                modules[path].__dict__.pop(bound, None)
        if self.scales:
            from qvis.adapters.torch.scaled_linear import scale_inputs

            for path, factors in self.scales.items():
                scale_inputs(modules[path], factors.clone())  # type: ignore[arg-type]
        for path in self.slowed:
            modules[path].activation_relu_or_gelu = 0  # type: ignore[assignment]


def plan_changes(
    modules: Mapping[str, nn.Module],
    weights: Mapping[str, list[str]],
    plain: Collection[str],
    network: Network,
    rewriting: Rewriting,
) -> Changes:
    """Find what has to be changed, and check that it can be.

    Parameters
    ----------
    modules
        All modules of the model, under all of their paths.
    weights
        The paths of each layer's weight, by all names of the layer.
    plain
        The weights that are computed, and will be plain parameters.
    network, rewriting
        What was read, and what is asked for.
    """
    changes = Changes()
    _plan_clips(changes, modules, network.graph, rewriting.unclipped)
    for name, factors in rewriting.multiplies.items():
        paths = weights.get(name, [])
        _check_linear(name, paths, modules, plain, network)
        for path in dict.fromkeys(path.rpartition(".")[0] for path in paths):
            changes.scales[path] = _factors(changes, name, modules[path], factors)
    _plan_transformers(changes, modules)
    fresh = [path or "(root)" for path in changes.scales if not _is_scaled(modules[path])]
    if fresh:
        changes.notes.append(
            f"{listed_names(fresh)}: what enters is multiplied by the new buffer {SCALE!r}, which "
            "a state dict of the model holds too"
        )
    return changes


def multipliable_linears(
    modules: Mapping[str, nn.Module], weights: Mapping[str, list[str]], plain: Collection[str], network: Network
) -> list[str]:
    """The layers that :func:`plan_changes` can multiply what enters; see there."""
    found = []
    for layer in network.layers:
        with suppress(BadArgumentError):
            _check_linear(layer.name, weights.get(layer.name, []), modules, plain, network)
            found.append(layer.name)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Clips


def _plan_clips(
    changes: Changes, modules: Mapping[str, nn.Module], graph: Graph | None, names: Collection[str]
) -> None:
    named: dict[int, list[str]] = {}
    for name in names:
        check_clip(name, graph)
        path, module = _module_of(name, modules)
        kind = "" if module is None else type_of(type(module))
        if module is None and path.rpartition("/")[2] == "clip":
            changes.notes.append(FUNCTIONAL.format(name=name))
        elif module is None or kind not in ("ReLU6", "Hardtanh"):
            raise BadArgumentError(f"unclipped: no clip is called {name!r}{suggest(name, _clips(modules))}")
        elif module.min_val != 0:
            changes.notes.append(f"{name!r}: it begins at {module.min_val:g}, not at 0 as a ReLU, so that it stays")
        else:
            named.setdefault(id(module), []).append(name)
            changes.unclipped.append(path)
    changes.unclipped = list(dict.fromkeys(changes.unclipped))
    for node in () if graph is None else graph.nodes:
        known = named.get(id(_module_of(node.name, modules)[1]), ())
        if node.op == "clip" and known and node.name not in known:
            changes.notes.append(f"{node.name!r}: it is the same module as {known[0]!r}, so that it is a ReLU now too")


def check_clip(name: str, graph: Graph | None) -> None:
    """Refuse a name that the graph does not have for a clip; without a graph, none."""
    if graph is None or (name in graph.by_name and graph.by_name[name].op == "clip"):
        return
    clips = [node.name for node in graph.nodes if node.op == "clip"]
    what = f"{name!r} is {graph.by_name[name].op}, no clip" if name in graph.by_name else f"no clip is called {name!r}"
    raise BadArgumentError(f"unclipped: {what}{suggest(name, clips)}")


def _module_of(node: str, modules: Mapping[str, nn.Module]) -> tuple[str, nn.Module | None]:
    path = node.partition("@")[0].removeprefix("(root)")
    within = path.removesuffix("/clip")  # which is how a program calls it where it does not know the class
    path = within if within in _clips(modules) else path
    return path, modules.get(path)


def _clips(modules: Mapping[str, nn.Module]) -> list[str]:
    return [path for path, module in modules.items() if type_of(type(module)) in ("ReLU6", "Hardtanh")]


# ---------------------------------------------------------------------------------------------------------------------
# Multiplications


def _check_linear(
    name: str, paths: list[str], modules: Mapping[str, nn.Module], plain: Collection[str], network: Network
) -> None:
    """Refuse a layer that is no plain ``nn.Linear``, or whose weight is used without calling it."""
    from torch import nn

    from qvis.adapters.torch import _parametrizations, _type_name

    known = {one: layer for layer in network.layers for one in (layer.name, *layer.aliases)}
    if name not in known:
        raise BadArgumentError(f"multiplies: no layer is called {name!r}{suggest(name, known)}")
    refused = f"multiplies: what enters {name!r} cannot be multiplied, because "
    if known[name].op != "Linear" or not paths:
        raise BadArgumentError(f"{refused}it is no nn.Linear ({known[name].op}); leave it out")
    for path in paths:
        owner, _, tensor = path.rpartition(".")
        module = modules[owner]
        cls = type(module)
        steps = _parametrizations(module)
        if steps and all(f"{owner}.{one}".lstrip(".") in plain for one in steps):
            cls = cls.__bases__[0]  # what it will be
        if tensor != "weight" or not (cls is nn.Linear or _is_scaled(module)):
            raise BadArgumentError(
                f"{refused}{owner or '(root)'!r} is of the class {_type_name(module)}, which may use its weight in a "
                "way of its own; leave it out, or give the program that torch.export makes of the model"
            )
        if not _is_scaled(module) and hasattr(module, SCALE):
            raise BadArgumentError(f"{refused}it has an attribute {SCALE!r} of its own; rename that")
        _check_called(refused, owner, modules)
    for node in () if network.graph is None else network.graph.calls.get(known[name].name, ()):
        if node.attributes.get("uncalled"):
            raise BadArgumentError(
                f"{refused}{node.name!r} uses its weight without calling it; leave it out, or give the program that "
                "torch.export makes of the model"
            )


def _check_called(refused: str, owner: str, modules: Mapping[str, nn.Module]) -> None:
    """Refuse what an encoder of torch uses on nested tensors, where what is padded comes out as 0."""
    from torch import nn

    for path, module in modules.items():
        nested = isinstance(module, nn.TransformerEncoder) and getattr(module, "use_nested_tensor", False)
        if nested and any(one is modules[owner] for one in module.modules()):
            raise BadArgumentError(
                f"{refused}{path or '(root)'!r} passes its weight to a function for nested tensors; leave it out, or "
                "make that encoder with enable_nested_tensor=False"
            )


def _is_scaled(module: nn.Module) -> bool:
    cls = type(module)
    return cls.__name__ == "ScaledLinear" and cls.__module__ == "qvis.adapters.torch.scaled_linear"


def _factors(changes: Changes, name: str, module: nn.Module, given: FloatArray) -> Tensor:
    weight: Any = module.weight
    known = getattr(module, SCALE).detach() if _is_scaled(module) else None
    return factors_as(changes.rounded, name, given, int(module.in_features), weight, known)  # type: ignore[arg-type]


def factors_as(
    rounded: dict[str, list[str]], name: str, given: FloatArray, count: int, weight: Tensor, known: Tensor | None
) -> Tensor:
    """What is multiplied by, with the type and on the device of the weight, times what is ``known`` already."""
    import torch

    factors = fitted("multiplies", name, np.asarray(given, np.float64), (count,))
    if not np.isfinite(factors).all():
        raise BadArgumentError(f"multiplies: {name!r} has numbers that are not finite; give finite numbers")
    wanted = torch.from_numpy(np.array(factors))
    wanted = wanted if known is None else wanted * known.cpu().double()
    kind = weight.dtype if weight.dtype.is_floating_point and weight.dtype.itemsize > 1 else torch.float32
    new = wanted.to(kind)
    spelled = str(kind).removeprefix("torch.")
    if not check_stored("multiplies", name, wanted.numpy(), new.double().numpy(), spelled) and kind.itemsize < 4:
        rounded.setdefault(spelled, []).append(name)
    return new.to(weight.device)


def _plan_transformers(changes: Changes, modules: Mapping[str, nn.Module]) -> None:
    from torch import nn

    scaled = {id(modules[path]) for path in changes.scales}
    for path, module in modules.items():
        if not isinstance(module, nn.TransformerEncoderLayer) or not module.activation_relu_or_gelu:
            continue
        if {id(module.linear1), id(module.linear2)} & scaled:
            changes.slowed.append(path)
    if changes.slowed:
        changes.notes.append(
            f"{listed_names([path or '(root)' for path in changes.slowed])}: runs without the fast path of "
            "nn.TransformerEncoderLayer, which would leave the multiplications out"
        )
