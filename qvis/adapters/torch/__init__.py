"""Reads a PyTorch module: every weight it holds, without running it and without changing it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvis.adapters.rewritten import Rewritten
from qvis.adapters.torch.affines import Affine
from qvis.adapters.torch.graph import graph as graph
from qvis.adapters.torch.parts import RULES, Part, bias_of, known_type
from qvis.adapters.torch.rewriting import multipliable as multipliable
from qvis.adapters.torch.tensors import Collector, Source, count, framework
from qvis.layers import Network
from qvis.rewriting import Rewriting
from qvis.running import Batch, Runner

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.nn.utils.parametrize import ParametrizationList


def handles(model: object) -> bool:
    """Whether ``model`` is a ``torch.nn.Module``. Does not import torch: without it there is no such object."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


def read(model: nn.Module) -> Network:
    """List the weights of a module in the order of its ``named_modules()``.

    Weights that a parametrization computes are computed as in evaluation mode. Nothing of the model is touched: not its
    weights, buffers, training flags, gradients or hooks, and not the state of the random generators.

    Raises
    ------
    UnsupportedModelError
        A weight is not initialized, sparse, spread over devices, or on the meta device.
    """
    import torch

    found = Collector()
    parameters: list[Tensor] = []
    with torch.no_grad():
        for name, module in _walk(model):
            sources = dict(_sources(module))
            parts = list(_parts(module, sources))
            for part in parts:
                bias = bias_of(part)
                added = None if bias is None or bias.tensor not in sources else (sources[bias.tensor], bias)
                found.add(part.name_in(name), sources[part.tensor], part, added)
            op = _layer_type(module)
            if op is not None and not parts:
                found.skip(name or "(root)", f"is a {op} that keeps its weights packed or elsewhere")
            parameters += _ingredients(module)
    return found.network(_type_name(_unwrap(model)), framework(), count(parameters))


def runner(model: nn.Module, network: Network, loss: Any = None) -> Runner:
    """Make a module ready to be run on other weights; see :func:`qvis.adapters.runner`."""
    from qvis.adapters.torch.running import TorchRunner

    return TorchRunner(model, network, loss)


def rewrite(model: nn.Module, network: Network, rewriting: Rewriting, inplace: bool = False) -> Rewritten:
    """Write new numbers into a copy of a module; see :func:`qvis.adapters.torch.rewriting.rewrite_module`."""
    from qvis.adapters.torch.rewriting import rewrite_module

    return rewrite_module(model, network, rewriting, inplace)


def save(model: nn.Module, path: Path, example: Batch | None = None) -> None:
    """Write a module to a file; see :func:`qvis.adapters.torch.saving.save_module`."""
    from qvis.adapters.torch.saving import save_module

    save_module(model, path, example)


def affines(model: nn.Module) -> dict[str, Affine]:
    """Factor and shift of the normalizations of a module; see :mod:`qvis.adapters.torch.affines`."""
    from qvis.adapters.torch.affines import affines_of_module

    return affines_of_module(model)


# ---------------------------------------------------------------------------------------------------------------------
# Which modules there are


def _walk(module: nn.Module, name: str = "", above: frozenset[int] = frozenset()) -> Iterator[tuple[str, nn.Module]]:
    """Every module under every name it has. Unlike ``named_modules``, ends where a module contains itself."""
    module = _unwrap(module)
    yield name, module
    above = above | {id(module)}
    for child_name, child in module._modules.items():
        hidden = child_name == "parametrizations" and _parametrizations(module)
        if child is not None and not hidden and id(child) not in above:
            yield from _walk(child, f"{name}.{child_name}" if name else child_name, above)


def _unwrap(module: nn.Module) -> nn.Module:
    """The module inside those that ``torch.compile`` returns."""
    while type(module).__name__ == "OptimizedModule":
        module = module._modules["_orig_mod"]  # type: ignore[assignment]
    return module


def _type_name(module: nn.Module) -> str:
    """The class's name; of a scripted module, that of the class it was made from."""
    if _is_scripted(module):
        return str(module.original_name)
    cls = type(module)
    return cls.__bases__[0].__name__ if _parametrizations(module) else cls.__name__


def _is_scripted(module: nn.Module) -> bool:
    import torch

    return isinstance(module, torch.jit.ScriptModule)


# ---------------------------------------------------------------------------------------------------------------------
# Which tensors a module holds, and where their present values are


def _sources(module: nn.Module) -> Iterator[tuple[str, Source]]:
    """The tensors a module computes with, by name. What is only an ingredient of another tensor is left out."""
    computed = dict(_computed(module))
    ingredients = {name for _, used in computed.values() for name in used}
    for name, (source, _) in computed.items():
        yield name, source
    for name, parameter in module._parameters.items():
        if parameter is not None and name not in ingredients and name not in computed:
            yield name, Source.of(parameter)
    kept = {**module._buffers, **module.__dict__}
    if "weight" in kept and _is_tensor(kept["weight"]) and "weight" not in computed:
        yield "weight", Source.of(kept["weight"])  # a weight that was made a constant
    yield from _packed(module)


def _computed(module: nn.Module) -> Iterator[tuple[str, tuple[Source, tuple[str, ...]]]]:
    """Tensors that the module recomputes at each use, with the names of the parameters they are made from."""
    from torch.nn.utils.prune import BasePruningMethod
    from torch.nn.utils.spectral_norm import SpectralNorm
    from torch.nn.utils.weight_norm import WeightNorm

    def source(name: str, get: Callable[[], Tensor], how: str) -> Source:
        return Source(get, (id(module), name), (f"computed from its parameters by {how}",))

    for name, steps in _parametrizations(module).items():
        how = ", ".join(type(step).__name__.strip("_") for step in steps)
        yield name, (source(name, partial(_evaluate, steps), how), ())
    # The attribute that these hooks set is only as fresh as the last forward pass, so that it is computed anew.
    for hook in getattr(module, "_forward_pre_hooks", {}).values():
        if isinstance(hook, WeightNorm):
            name = hook.name
            yield name, (source(name, partial(hook.compute_weight, module), "weight_norm"), (f"{name}_g", f"{name}_v"))
        elif isinstance(hook, SpectralNorm):
            name = hook.name
            get = partial(hook.compute_weight, module, do_power_iteration=False)
            yield name, (source(name, get, "spectral_norm"), (f"{name}_orig",))
        elif isinstance(hook, BasePruningMethod):
            name = hook._tensor_name
            yield name, (source(name, partial(hook.apply_mask, module), "pruning"), (f"{name}_orig",))


def _parametrizations(module: nn.Module) -> dict[str, ParametrizationList]:
    """The parametrized tensors of a module, by name. Looks them up without asking a property of the user's."""
    from torch.nn.utils.parametrize import ParametrizationList

    held = dict(module._modules.items()).get("parametrizations")
    children = {} if held is None else dict(held._modules.items())
    return {name: child for name, child in children.items() if isinstance(child, ParametrizationList)}


def _evaluate(steps: nn.Module) -> Tensor:
    """What a parametrization makes of its parameters in evaluation mode, found on a twin of it."""
    import torch

    devices = {tensor.device for tensor in steps.parameters() if tensor.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(devices=sorted(devices, key=str)):
        return _twin(steps).forward()  # type: ignore[no-any-return]


def _twin(module: nn.Module) -> nn.Module:
    """A module that shares the parameters, has copies of the buffers and no hooks, and is in evaluation mode.

    In training mode spectral_norm would take a step of its power iteration each time it is evaluated, and that changes
    its buffers in place. Unlike ``deepcopy`` this works for every module, and copies no weight.
    """
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__.update(
        training=False,
        _buffers={name: None if buffer is None else buffer.clone() for name, buffer in module._buffers.items()},
        _modules={name: None if child is None else _twin(child) for name, child in module._modules.items()},
        _forward_hooks={},
        _forward_pre_hooks={},
    )
    return twin


def _packed(module: nn.Module) -> Iterator[tuple[str, Source]]:
    """The weight of a module of ``torch.ao.nn.quantized``, which unpacks it in a method."""
    if type(module).__module__.startswith("torch.ao.nn.") and callable(getattr(type(module), "weight", None)):
        yield "weight", Source(module.weight, (id(module), "weight"))  # type: ignore[arg-type]


def _is_tensor(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _ingredients(module: nn.Module) -> list[Tensor]:
    """The module's own parameters; for a computed weight, those it is computed from."""
    own: list[Tensor] = [one for one in module._parameters.values() if one is not None]
    own += [source.get() for _, source in _packed(module)]
    return own + [one for steps in _parametrizations(module).values() for one in steps.parameters()]


# ---------------------------------------------------------------------------------------------------------------------
# Which of them are weights, and where their output channels are


def _parts(module: nn.Module, tensors: dict[str, Source]) -> Iterator[Part]:
    """The weights of a module: by its type's rule, then every other parameter of two or more axes."""
    op = _layer_type(module)
    ruled: dict[str, list[Part] | None] = {}
    if op is not None:
        groups = int(module.groups) if op.startswith("ConvTranspose") else 1  # type: ignore[arg-type]
        ruled = {name: RULES[op](op, name, groups) for name in tensors}
    for parts in ruled.values():
        yield from parts or ()
    for name, source in tensors.items():
        if ruled.get(name) is None and _could_be_weight(source):
            yield Part(name, "other")


def _layer_type(module: nn.Module) -> str | None:
    """The name of the torch layer that a module is, or is derived from."""
    if _is_scripted(module):
        return known_type("torch", _type_name(module))
    types = (known_type(cls.__module__, cls.__name__) for cls in type(module).__mro__)
    return next(filter(None, types), None)


def _could_be_weight(source: Source) -> bool:
    from torch.nn.parameter import is_lazy

    tensor = source.get()
    return is_lazy(tensor) or tensor.ndim >= 2
