"""Exchanges the numbers of a PyTorch module for the time of a run, and puts back whatever the run changed in it."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qvis.adapters.torch.parts import Part, rows
from qvis.adapters.torch.tensors import Source, _stored_type, identity
from qvis.errors import NotRunnableError
from qvis.layers import FloatArray, Norm

if TYPE_CHECKING:
    from torch import Tensor, nn

Matrix = tuple[str, Source, Part]
"""The name of a layer, its tensor, and where in it the layer's matrix is."""

_CONTAINERS = (dict, OrderedDict, list, set, deque)


@dataclass
class Leaf:
    """A tensor of the model that holds the weights of one layer, or of several."""

    parts: dict[str, Part]
    """By layer."""
    own: Tensor
    """The model's numbers, in float32 at least."""
    placed: Tensor | None = None
    """The numbers to run on instead."""

    def now(self, others: Mapping[str, FloatArray] = {}) -> Tensor:
        """The numbers to run on; ``others`` are matrices of some of its layers."""
        tensor = self.own if self.placed is None else self.placed
        matrices = {part: others[name] for name, part in self.parts.items() if name in others}
        return _written(tensor, matrices) if matrices else tensor


def _written(tensor: Tensor, matrices: Mapping[Part, FloatArray]) -> Tensor:
    """A copy of the tensor, with its layout in memory, in which some of its matrices are replaced."""
    import torch

    flat = torch.empty(0)
    for part, matrix in matrices.items():
        new = torch.tensor(matrix, dtype=tensor.dtype, device=tensor.device)
        if part.view is rows:
            flat = new.reshape(-1)
            continue
        # the view says where each number of the matrix lies in the tensor
        index = part.view(torch.arange(tensor.numel(), device=tensor.device).reshape(tensor.shape))
        before = flat if flat.numel() else tensor.flatten()
        flat = before.index_copy(0, index.reshape(-1), new.reshape(-1))
    return torch.empty_like(tensor).copy_(flat.reshape(tensor.shape))


@dataclass
class Computed:
    """A module that computes some of its tensors anew in each run, from other parameters."""

    module: nn.Module
    leaves: dict[str, Leaf] = field(default_factory=dict)
    """What is put in their place, by the name of the tensor."""


class Belongings:
    """All that a model holds: its modules, their tensors, and where they are."""

    def __init__(self, model: nn.Module, wanted: set[str], matrices: Iterable[Matrix] | None = None) -> None:
        self.modules = list(_everything(model))
        self.leaves: list[Leaf] = []
        self.by_name: dict[str, nn.Module] = {}
        self._computed: dict[int, Computed] = {}
        self._containers: list[Any] = []
        self._slots: list[tuple[Any, Any, Tensor | None, Leaf | None]] = []
        """A container, the key of a tensor in it, the tensor that is copied into it or the leaf that is put there."""
        slots = self._look_around()
        known = self._find_leaves(model, wanted) if matrices is None else self._take_leaves(model, wanted, matrices)
        parameters = {id(one): one for x in self.modules for one in x._parameters.values() if one is not None}
        self.memory = frozenset(map(memory_of, parameters.values())) - {0}
        """Where the parameters lie."""
        wide: dict[int, Tensor] = {}
        for container, key, tensor in slots:
            leaf = known.get(identity(tensor))
            is_parameter = id(tensor) in parameters
            if leaf is not None:
                self._slots.append((container, key, None, leaf))
            elif not is_parameter or _is_half(tensor):
                # what is no parameter is copied for each run, which may write to it
                self._slots.append((container, key, wide.setdefault(id(tensor), _wide(tensor)), None))

    def _look_around(self) -> list[tuple[Any, Any, Tensor]]:
        """Find the containers of each module, and the tensors in them."""
        import torch

        slots: list[tuple[Any, Any, Tensor]] = []
        seen: set[int] = set()

        def visit(container: Any) -> None:
            if id(container) in seen:
                return
            seen.add(id(container))
            items: Any = container.items() if isinstance(container, dict) else ()
            if isinstance(container, (list, deque)):
                items = enumerate(container)
            for key, value in items:
                if isinstance(value, torch.Tensor):
                    slots.append((container, key, value))
                elif type(value) in _CONTAINERS:
                    self._containers.append(value)
                    visit(value)

        for module in self.modules:
            if isinstance(module, torch.jit.ScriptModule):
                raise NotRunnableError(
                    f"model: {type(module).__name__} {module.original_name!r} is scripted, and cannot be run on other "
                    "weights; give the module that it was made from"
                )
            visit(module.__dict__)
        return slots

    def _find_leaves(self, model: nn.Module, wanted: set[str]) -> dict[Hashable, Leaf]:
        """The tensors that hold the wanted layers, tied ones once."""
        import torch

        from qvis.adapters.torch import _parametrizations, _parts, _sources, _walk

        found: dict[Hashable, Leaf] = {}
        with torch.no_grad():
            for name, module in _walk(model):
                self.by_name[name] = module
                sources = dict(_sources(module))
                for part in _parts(module, sources):
                    source, layer = sources[part.tensor], part.name_in(name)
                    held = any(part.tensor in one for one in (module._parameters, module._buffers, module.__dict__))
                    computed = part.tensor in _parametrizations(module)
                    if source.key in found:
                        if layer in wanted:
                            found[source.key].parts.setdefault(layer, part)
                    elif layer in wanted and (held or computed):
                        found[source.key] = Leaf({layer: part}, _readable(source.get()))
                    if source.key in found and source.key == (id(module), part.tensor):
                        entry = self._computed.setdefault(id(module), Computed(module))
                        entry.leaves[part.tensor] = found[source.key]
        self.leaves = list(found.values())
        return found

    def _take_leaves(self, model: nn.Module, wanted: set[str], matrices: Iterable[Matrix]) -> dict[Hashable, Leaf]:
        """The same for a program, whose modules do not say what their tensors are."""
        self.by_name = dict(model.named_modules())
        found: dict[Hashable, Leaf] = {}
        for layer, source, part in matrices:
            if layer in wanted:
                leaf = found.setdefault(source.key, Leaf({}, _readable(source.get())))
                leaf.parts.setdefault(layer, part)
        self.leaves = list(found.values())
        return found

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Put every module back as it was in the end: class, attributes, tensors, hooks and containers."""
        modules = [(module, type(module), module.__dict__.copy()) for module in self.modules]
        containers = [(one, one.copy() if one else ()) for one in self._containers]  # most are empty
        try:
            yield
        finally:
            for module, cls, attributes in modules:
                if type(module) is not cls:
                    object.__setattr__(module, "__class__", cls)
                _refill(module.__dict__, attributes)
            for container, content in containers:
                if container or content:
                    _refill(container, content)

    def exchange(self, tensors: list[Tensor], norms: Mapping[str, Norm]) -> None:
        """Put tensors in the place of :attr:`leaves`, and make the model ready to be run; :meth:`kept` undoes it."""
        new = dict(zip(map(id, self.leaves), tensors, strict=True))
        copies: dict[int, Tensor] = {}
        for module in self.modules:
            attributes = module.__dict__
            attributes["training"] = False
            if attributes.get("_backward_hooks") or attributes.get("_backward_pre_hooks"):
                # they only look on
                attributes.update(_backward_hooks=OrderedDict(), _backward_pre_hooks=OrderedDict())
                attributes["_is_full_backward_hook"] = None
        for container, key, tensor, leaf in self._slots:
            if leaf is not None:
                container[key] = new[id(leaf)]
            elif tensor is not None:
                if id(tensor) not in copies:
                    copies[id(tensor)] = tensor.clone()
                container[key] = copies[id(tensor)]
        for computed in self._computed.values():
            _stop_computing(computed.module, {name: new[id(leaf)] for name, leaf in computed.leaves.items()})
        for name, norm in norms.items():
            _normalize(self.by_name[name], norm)


def _everything(model: nn.Module) -> Iterator[nn.Module]:
    """Every module that can be reached, also those in plain lists, which the model does not list as its own."""
    from torch import nn

    seen: set[int] = set()
    waiting: list[Any] = [model]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, nn.Module):
            yield one
            waiting += [value for value in one.__dict__.values() if isinstance(value, (nn.Module, dict, list, tuple))]
            waiting += [child for child in one._modules.values() if child is not None]
        elif isinstance(one, dict):
            waiting += [value for value in one.values() if isinstance(value, (nn.Module, dict, list, tuple))]
        else:
            waiting += [value for value in one if isinstance(value, (nn.Module, dict, list, tuple))]


def memory_of(tensor: Tensor) -> int:
    """Where the numbers of a tensor lie; 0 where it has no memory of its own."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse tensors and wrappers of others
        return 0


def _readable(tensor: Tensor) -> Tensor:
    """Its numbers as an ordinary tensor of float32 or float64, the same memory where it can be."""
    import torch

    tensor = tensor.clone() if tensor.is_inference() else tensor.detach()
    tensor = tensor.dequantize() if _stored_type(tensor) is not None else tensor
    tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
    return tensor if tensor.numel() == 0 or 0 not in tensor.stride() else tensor.contiguous()


def _is_half(tensor: Tensor) -> bool:
    import torch

    return tensor.dtype in (torch.float16, torch.bfloat16)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().float() if _is_half(tensor) else tensor.detach()


def _refill(container: Any, content: Any) -> None:
    container.clear()
    if isinstance(container, (list, deque)):
        container.extend(content)
    else:
        container.update(content)


def _stop_computing(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a module tensors that it would compute itself, and keep it from that."""
    import torch

    from qvis.adapters.torch import _parametrizations

    steps = _parametrizations(module)
    if any(name in steps for name in tensors):
        # the properties that compute the tensors belong to a class made for this module alone
        with torch.enable_grad():
            others = {name: getattr(module, name) for name in steps if name not in tensors}
        object.__setattr__(module, "__class__", type(module).__bases__[0])
        module.__dict__.update(others)
    for key, hook in list(module._forward_pre_hooks.items()):
        if getattr(hook, "name", getattr(hook, "_tensor_name", None)) in tensors:
            module._forward_pre_hooks.pop(key)
    for name, tensor in tensors.items():
        holder = next((one for one in (module._parameters, module._buffers) if name in one), module.__dict__)
        holder[name] = tensor  # type: ignore[assignment]


def _normalize(module: nn.Module, norm: Norm) -> None:
    """Give a normalization by running statistics other numbers."""
    import torch

    like: Any = module.running_mean
    scale, shift, mean, variance = norm.scale, norm.shift, norm.mean, norm.variance
    holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    if all(holder.get("weight") is None for holder in holders):
        # without numbers of its own for it, what it multiplies by is part of the deviation, what it adds of the mean
        deviation = (variance + norm.epsilon) ** 0.5 / scale
        variance, mean = deviation**2 - norm.epsilon, mean - shift * deviation
    new = {"running_mean": mean, "running_var": variance, "weight": scale, "bias": shift}
    for name, value in new.items():
        for holder in holders:
            if holder.get(name) is not None:
                holder[name] = torch.tensor(value, dtype=like.dtype, device=like.device)


@contextmanager
def settings_kept(device: Any) -> Iterator[None]:
    """Leave the state of the random generators and the settings of PyTorch as they were.

    Inside, PyTorch's generators start from the same state each time, so that a model that draws random numbers draws
    the same in two runs.
    """
    import numpy as np
    import torch

    kept = random.getstate(), np.random.get_state(), torch.get_default_dtype(), torch.is_grad_enabled()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(0)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(0)
        try:
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])
            torch.set_default_dtype(kept[2])
            torch.set_grad_enabled(kept[3])


@contextmanager
def eagerly() -> Iterator[None]:
    """Run compiled parts of a model by their Python code."""
    import torch

    set_stance: Callable[[str], Any] | None = getattr(torch.compiler, "set_stance", None)  # since torch 2.6
    if set_stance is None:
        yield
        return
    with set_stance("force_eager"):
        yield
