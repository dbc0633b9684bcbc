"""Runs a PyTorch module on other weights than its own, and differentiates it, as :mod:`qvis.running` describes.

The module is run as it is, by its own code, so that whatever Python it contains works. For the time of a run its
weights are exchanged, and everything is put back after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from qvis.adapters.torch.parts import Part, rows
from qvis.adapters.torch.tap import Cut, Tap, find_cut
from qvis.adapters.torch.tensors import _stored_type
from qvis.errors import BadArgumentError, NotRunnableError, QvisError
from qvis.layers import FloatArray, Network, Norm
from qvis.running import Batch, Gradient, Grid, Passage, Probe

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.overrides import TorchFunctionMode

Place = tuple["nn.Module", str]
"""A module and the name of its tensor."""


@dataclass
class Leaf:
    """A tensor of the model that holds the weights of one layer, or of several."""

    places: list[Place]
    """Where the model has it; more than one for tied weights."""
    parts: dict[str, Part]
    """By layer."""
    own: Tensor
    """The model's numbers, in float32 at least."""
    placed: Tensor | None = None
    """The numbers to run on instead."""

    def now(self, others: Mapping[str, FloatArray] = {}) -> Tensor:
        """The numbers to run on; ``others`` are matrices of some of its layers."""
        tensor = self.own if self.placed is None else self.placed
        return _written(tensor, {self.parts[name]: others[name] for name in self.parts if name in others})


def _written(tensor: Tensor, matrices: Mapping[Part, FloatArray]) -> Tensor:
    """The tensor with some of its matrices replaced."""
    import torch

    for part, matrix in matrices.items():
        new = torch.tensor(matrix, dtype=tensor.dtype, device=tensor.device)
        if part.view is rows:
            tensor = new.reshape(tensor.shape)
            continue
        # the view says where each number of the matrix lies in the tensor
        index = part.view(torch.arange(tensor.numel(), device=tensor.device).reshape(tensor.shape))
        tensor = tensor.flatten().clone().index_copy_(0, index.reshape(-1), new.reshape(-1)).reshape(tensor.shape)
    return tensor.contiguous()


class TorchRunner:
    """See :class:`qvis.running.Runner`."""

    differentiable = True

    def __init__(self, model: nn.Module, network: Network, loss: Callable[..., Any] | str | None = None) -> None:
        import torch

        from qvis.adapters.torch import _unwrap

        self._model = _unwrap(model)
        if isinstance(self._model, torch.jit.ScriptModule):
            raise NotRunnableError("model: a scripted module cannot be run on other weights; give the module it is of")
        self._loss = _named_loss(loss) if isinstance(loss, str) else loss
        wanted = {layer.name for layer in network.layers}
        self._leaves = list(_leaves(self._model, wanted))
        self.layers = tuple(layer.name for layer in network.layers if any(layer.name in x.parts for x in self._leaves))
        self.notes: list[str] = []
        missing = [layer.name for layer in network.layers if layer.name not in self.layers]
        if missing:
            self.notes.append(f"{', '.join(map(repr, missing))}: the weights are packed and cannot be replaced")
        self._norms: dict[str, Norm] = {}
        self._cut: Cut | None = None
        first = next(chain(self._model.parameters(), self._model.buffers()), None)
        self._device = torch.device("cpu") if first is None else first.device

    def place(self, weights: Mapping[str, FloatArray], norms: Mapping[str, Norm]) -> None:
        """See :meth:`qvis.running.Runner.place`."""
        for leaf in self._leaves:
            leaf.placed = None
            if any(name in weights for name in leaf.parts):
                leaf.placed = leaf.now(weights)
        self._norms = dict(norms)

    def run(
        self,
        batch: Batch,
        *,
        weights: Mapping[str, FloatArray] | None = None,
        grids: Mapping[str, Grid] | None = None,
        watch: Callable[[Passage], None] | None = None,
        others: Mapping[str, FloatArray] | None = None,
    ) -> list[FloatArray]:
        """See :meth:`qvis.running.Runner.run`."""
        import torch

        self._find_cut(batch)
        tensors = [leaf.now(weights or {}) for leaf in self._leaves]
        tap = Tap(self._tags(tensors), grids=grids or {}, watch=watch, cut=self._cut)
        if others:
            tap.others = {
                name: leaf.now({name: others[name]}) for leaf in self._leaves for name in leaf.parts if name in others
            }
        with torch.no_grad():
            return [_numpy(one) for one in self._outputs(batch, tensors, tap)]

    def differentiate(self, batch: Batch, probe: Probe) -> Iterator[Gradient]:
        """See :meth:`qvis.running.Runner.differentiate`."""
        import torch

        self._find_cut(batch)
        tensors = [leaf.now().detach().requires_grad_() for leaf in self._leaves]
        tap = Tap(self._tags(tensors), taps=True, cut=self._cut)
        with torch.enable_grad():
            outputs = self._outputs(batch, tensors, tap)
            alive = [(one, v) for one, v in zip(outputs, probe([_numpy(x) for x in outputs]), strict=True)]
            alive = [(one, v) for one, v in alive if one.requires_grad]
            if not alive:
                raise NotRunnableError(
                    "model: no output depends on a weight by way of differentiable operations; does it run under "
                    "torch.inference_mode? Give a module that returns what comes before"
                )
            used = [x for calls in tap.entered.values() for x, _ in calls]
            found = torch.autograd.grad(
                [one for one, _ in alive],
                [*tensors, *used],
                [torch.as_tensor(v, dtype=one.dtype, device=one.device) for one, v in alive],
                allow_unused=True,
            )
        by_input = dict(zip(map(id, used), found[len(tensors) :], strict=True))
        for leaf, tensor, gradient in zip(self._leaves, tensors, found, strict=False):
            gradient = torch.zeros_like(tensor) if gradient is None else gradient
            for name, part in leaf.parts.items():
                calls = [(x, by_input[id(x)], axis) for x, axis in tap.entered.get(name, ())]
                pairs = tuple((_numpy(x), _numpy(g)) for x, g, _ in calls if g is not None)
                yield Gradient(name, _numpy(part.view(gradient)), pairs, calls[0][2] if calls else -1)

    def imitate(self, example: Batch, samples: int, seed: int = 0) -> tuple[list[Batch], str]:
        """See :meth:`qvis.running.Runner.imitate`."""
        from qvis.adapters.torch.imitation import imitate

        own = [leaf.own for leaf in self._leaves]
        norms, self._norms = self._norms, {}
        try:
            return imitate(lambda batch, mode: self._call(batch, own, mode, False), example, samples, seed)
        finally:
            self._norms = norms

    # -----------------------------------------------------------------------------------------------------------------

    def _tags(self, tensors: list[Tensor]) -> dict[int, tuple[Tensor, dict[str, Part]]]:
        """What a tap knows a weight by: the memory it lies in."""
        return {
            tensor.untyped_storage().data_ptr(): (tensor, leaf.parts)
            for leaf, tensor in zip(self._leaves, tensors, strict=True)
        }

    def _find_cut(self, batch: Batch) -> None:
        """Run once with derivatives to find where outputs end that can be differentiated."""
        import torch

        if self._cut is not None:
            return
        tensors = [leaf.now().detach().requires_grad_() for leaf in self._leaves]
        tap = Tap(self._tags(tensors), record=True)
        with torch.enable_grad():
            result = self._call(batch, tensors, tap)
        self._cut = find_cut(tap, result)
        self.notes += self._cut.notes

    def _outputs(self, batch: Batch, tensors: list[Tensor], tap: Tap) -> list[Tensor]:
        assert self._cut is not None
        result = self._call(batch, tensors, tap)
        if self._loss is not None:
            return [self._losses(result, batch)]
        return self._cut.choose(result, tap)

    def _losses(self, result: Any, batch: Batch) -> Tensor:
        import torch

        assert self._loss is not None
        if batch.labels is None:
            raise BadArgumentError("loss: needs labels to compare the outputs with; give labels, or leave the loss out")
        labels = torch.as_tensor(batch.labels, device=self._device)
        losses = self._loss(result, labels)
        if losses.ndim == 0 and batch.size > 1:
            raise BadArgumentError(
                "loss: got one number for several samples, expected one for each; pass reduction='none' to it"
            )
        return losses.reshape(-1)  # type: ignore[no-any-return]

    def _call(self, batch: Batch, tensors: list[Tensor], tap: TorchFunctionMode, constant: bool = True) -> Any:
        """Run the model; with ``constant`` no derivative by the inputs is wanted."""
        import torch

        args, kwargs = (_moved(x, self._device, constant) for x in (batch.args, dict(batch.kwargs)))
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), self._exchanged(tensors), _eager(), tap:
            try:
                return self._model(*args, **kwargs)
            except (QvisError, KeyboardInterrupt):
                raise
            except Exception as error:
                text = (str(error).strip().splitlines() or [""])[0][:300]
                raise BadArgumentError(
                    f"inputs: the model failed on them with {type(error).__name__}: {text}; "
                    f"they were {_describe(batch)}"
                ) from error

    @contextmanager
    def _exchanged(self, tensors: list[Tensor]) -> Iterator[None]:
        """The model in evaluation mode, with other numbers in it, and everything put back in the end."""
        from qvis.adapters.torch import _walk

        with ExitStack() as undo:
            for module in self._model.modules():
                undo.callback(module.__dict__.__setitem__, "training", module.training)
                module.__dict__["training"] = False
                _widen(module, undo)
            for leaf, tensor in zip(self._leaves, tensors, strict=True):
                for module, name in leaf.places:
                    _exchange(module, name, tensor, undo)
            modules = dict(_walk(self._model)) if self._norms else {}
            for name, norm in self._norms.items():
                _normalize(modules[name], norm, undo)
            yield


# ---------------------------------------------------------------------------------------------------------------------
# What there is to exchange


def _leaves(model: nn.Module, wanted: set[str]) -> Iterator[Leaf]:
    """The tensors that hold the wanted layers, tied ones once."""
    import torch

    from qvis.adapters.torch import _parts, _sources, _walk

    found: dict[Any, Leaf] = {}
    with torch.no_grad():
        for name, module in _walk(model):
            sources = dict(_sources(module))
            for part in _parts(module, sources):
                source = sources[part.tensor]
                leaf = found.get(source.key)
                layer = part.name_in(name)
                if leaf is not None:
                    if not any(m is module and n == part.tensor for m, n in leaf.places):
                        leaf.places.append((module, part.tensor))
                    if layer in wanted:
                        leaf.parts.setdefault(layer, part)
                elif layer in wanted and _holder(module, part.tensor) is not None:
                    tensor = source.get().detach()
                    tensor = tensor.dequantize() if _stored_type(tensor) is not None else tensor
                    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
                    found[source.key] = Leaf([(module, part.tensor)], {layer: part}, wide)
    yield from found.values()


def _holder(module: nn.Module, name: str) -> dict[str, Any] | None:
    """The dictionary that holds a tensor of the module; that of computed ones is where it will be put."""
    from qvis.adapters.torch import _parametrizations

    for holder in (module._parameters, module._buffers, module.__dict__):
        if name in holder:
            return holder
    return module.__dict__ if name in _parametrizations(module) else None


def _exchange(module: nn.Module, name: str, tensor: Tensor, undo: ExitStack) -> None:
    """Put a tensor into a module; where the module would compute it anew, keep it from that."""
    from qvis.adapters.torch import _parametrizations

    if name in _parametrizations(module):
        # The property that computes the weight belongs to a class made for this module alone.
        undo.callback(object.__setattr__, module, "__class__", type(module))
        values = {other: getattr(module, other) for other in _parametrizations(module) if other != name}
        object.__setattr__(module, "__class__", type(module).__bases__[0])
        for other, value in values.items():
            _put(module.__dict__, other, value, undo)
    hooks = module._forward_pre_hooks
    for key, hook in list(hooks.items()):
        if getattr(hook, "name", getattr(hook, "_tensor_name", None)) == name:
            _remove(hooks, undo)
            hooks.pop(key)
    holder = _holder(module, name)
    _put(module.__dict__ if holder is None else holder, name, tensor, undo)


def _put(holder: dict[str, Any], name: str, value: Any, undo: ExitStack) -> None:
    if name in holder:
        undo.callback(holder.__setitem__, name, holder[name])
    else:
        undo.callback(holder.pop, name, None)
    holder[name] = value


def _remove(hooks: dict[int, Any], undo: ExitStack) -> None:
    """Note all hooks of a module, to put them back in their order."""
    kept = list(hooks.items())

    def restore() -> None:
        hooks.clear()
        hooks.update(kept)

    undo.callback(restore)


def _widen(module: nn.Module, undo: ExitStack) -> None:
    """Half-precision numbers as float32, and copies of the buffers, which a run may write to."""
    import torch

    def wide(tensor: Tensor) -> Tensor:
        return tensor.detach().float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor

    for name, parameter in list(module._parameters.items()):
        if parameter is not None and wide(parameter) is not parameter:
            _put(module._parameters, name, wide(parameter), undo)
    for name, buffer in list(module._buffers.items()):
        if buffer is not None:
            _put(module._buffers, name, wide(buffer.clone()), undo)


def _normalize(module: nn.Module, norm: Norm, undo: ExitStack) -> None:
    """Give a normalization by running statistics other numbers."""
    import torch

    like: Tensor = module.running_mean  # type: ignore[assignment]
    scale, shift, mean, variance = norm.scale, norm.shift, norm.mean, norm.variance
    if module._parameters.get("weight") is None:
        # without numbers of its own for it, what it multiplies by is part of the deviation, what it adds of the mean
        deviation = (variance + norm.epsilon) ** 0.5 / scale
        variance, mean = deviation**2 - norm.epsilon, mean - shift * deviation
    new = {"running_mean": mean, "running_var": variance, "weight": scale, "bias": shift}
    for name, value in new.items():
        holder = module._buffers if name.startswith("running") else module._parameters
        if holder.get(name) is not None:
            tensor = torch.tensor(value, dtype=like.dtype, device=like.device)
            _put(holder, name, tensor, undo)


@contextmanager
def _eager() -> Iterator[None]:
    """Run compiled parts of a model by their Python code."""
    import torch

    set_stance = getattr(torch.compiler, "set_stance", None)  # since torch 2.6
    if set_stance is None:
        yield
        return
    with set_stance("force_eager"):
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Inputs and outputs


def _moved(value: Any, device: Any, constant: bool = True) -> Any:
    """Arrays and tensors in a nest of containers as tensors on the device, real ones as float32."""
    import numpy as np
    import torch

    if isinstance(value, Mapping):
        return {name: _moved(item, device, constant) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        moved = [_moved(item, device, constant) for item in value]
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value) if value.flags.writeable else value.copy())
    elif not isinstance(value, torch.Tensor) and hasattr(value, "__array__"):
        value = torch.from_numpy(np.array(value))
    if not isinstance(value, torch.Tensor):
        return value
    value = (value.detach() if constant else value).to(device)
    narrow = (torch.float16, torch.bfloat16, torch.float64)
    return value.float() if value.dtype in narrow else value


def _describe(batch: Batch) -> str:
    """The shapes and types of the inputs, for an error message."""
    flat: list[str] = []

    def visit(value: Any, name: str) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                visit(item, f"{name}{key}=")
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item, name)
        else:
            shape = "x".join(map(str, getattr(value, "shape", ())))
            flat.append(f"{name}{shape} {str(getattr(value, 'dtype', type(value).__name__)).removeprefix('torch.')}")

    visit(batch.args, "")
    visit(batch.kwargs, "")
    return ", ".join(flat) or "none"


def _numpy(tensor: Tensor) -> FloatArray:
    import torch

    tensor = tensor.detach().resolve_conj().resolve_neg()
    tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
    return tensor.cpu().numpy()


def _named_loss(name: str) -> Callable[..., Any]:
    from torch.nn import functional

    losses: dict[str, Callable[..., Any]] = {
        "cross_entropy": partial(functional.cross_entropy, reduction="none"),
        "mse": lambda outputs, labels: (outputs - labels).square().flatten(1).mean(1),
    }
    if name not in losses:
        raise BadArgumentError(
            f"loss: got {name!r}, expected one of {', '.join(map(repr, losses))}, or a function (outputs, labels) that "
            "returns a number for each sample"
        )
    return losses[name]
