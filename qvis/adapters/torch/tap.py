"""Sees every operation of a running PyTorch model: what enters its layers, and what would change the model.

It stands in the way of PyTorch's own functions (``TorchFunctionMode``), so that layers written as modules and as
functions of parameters are seen alike, however often they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from torch.overrides import TorchFunctionMode

from qvis.adapters.torch.exchange import Leaf, memory_of
from qvis.adapters.torch.outputs import Follower, is_in_place, tensors_in
from qvis.running import Grid, Passage

if TYPE_CHECKING:
    from torch import Tensor

_CONVOLUTIONS = {f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)}
_PRODUCTS = {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum"}
_EMBEDDINGS = {"embedding", "embedding_bag"}
_LAYERS = _CONVOLUTIONS | _PRODUCTS | _EMBEDDINGS
_COMPOSITE = {"multi_head_attention_forward"}
"""Functions of PyTorch written in Python, which hide those that they call."""
_CASTS = {"to", "type", "type_as", "half", "bfloat16"}


class Tap(TorchFunctionMode):
    """See the module's description. Everything that it is to do is off by default."""

    def __init__(
        self,
        leaves: Sequence[Leaf],
        tensors: Sequence[Tensor],
        *,
        grids: Mapping[str, Grid] | None = None,
        watch: Callable[[Passage], None] | None = None,
        others: Mapping[str, Tensor] | None = None,
        differentiate: bool = False,
        follow: bool = False,
        at: Sequence[int] = (),
        protected: Set[int] = frozenset(),
    ) -> None:
        """Look on while the model runs with ``tensors`` in the place of ``leaves``.

        Parameters
        ----------
        leaves, tensors
            The weights that are known, and their present numbers.
        grids, watch
            See :meth:`qvis.running.Runner.run`.
        others
            By layer, the tensor in which it has another weight.
        differentiate
            Whether derivatives by what enters the layers are wanted.
        follow
            Whether to follow what depends on the weights.
        at
            The operations, by number, whose inputs are wanted.
        protected
            The memory that the model may not write to for good.
        """
        super().__init__()
        self._weights: dict[int, list[tuple[Leaf, Tensor]]] = {}
        for leaf, tensor in zip(leaves, tensors, strict=True):
            self._weights.setdefault(memory_of(tensor), []).append((leaf, tensor))
        self._grids = grids or {}
        self._watch = watch
        self._others = others or {}
        self._differentiate = differentiate
        self._graph = differentiate or follow
        self._follows = follow
        self._at = set(at)
        self._protected = protected
        self._written: list[tuple[Tensor, Tensor, Tensor]] = []
        self.last = ""
        """The operation that was begun last."""
        self.used: set[int] = set()
        """The weights that were read."""
        self.begin()
        self.entered: dict[str, list[tuple[Tensor, int]]] = {}
        """What entered the calls of each layer, with the axis of its channels."""

    def begin(self) -> None:
        """A new sample begins: count its operations anew."""
        self.count = 0
        self.caught: dict[int, list[Tensor]] = {}
        """What went into the wanted operations."""
        self.follower = Follower(lambda tensor: bool(self._leaves_of(tensor))) if self._follows else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").partition(".")[0]  # in a program it is followed by the overload's
        if name == "_set_grad_enabled" and self._graph and not args[0]:
            return None  # a model that switches derivatives off is differentiated all the same
        if name in _COMPOSITE:
            with patch("torch.nn.functional.has_torch_function", lambda *_: False), self:
                return func(*args, **kwargs)
        self.count += 1
        place = self.count
        if name != "__get__":
            self.last = name
        if place in self._at:
            self.caught[place] = [*tensors_in((args, kwargs))]
        if name in _LAYERS:
            result = self._layer(func, name, args, kwargs)
        elif name[-1:] == "_":
            result = self._write(func, name, args, kwargs)
        else:
            result = func(*args, **kwargs)
        result = _widened(name, args, result)
        if self.follower is not None:
            self.follower.see(place, name, args, kwargs, result)
        return result

    # -----------------------------------------------------------------------------------------------------------------
    # Layers

    def _layer(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        import torch

        slots = [("args", i, value) for i, value in enumerate(args)]
        slots += [("kwargs", key, value) for key, value in kwargs.items()]
        slots = [slot for slot in slots if isinstance(slot[2], torch.Tensor)]
        known = ((slot, self._names(slot[2])) for slot in slots)
        weight = next(((slot, names) for slot, names in known if names), None)
        if weight is None:
            return func(*args, **kwargs)
        (kind, key, tensor), names = weight
        data = None if name in _EMBEDDINGS else _data(name, slots, tensor)
        args, kwargs, axis = list(args), dict(kwargs), -1
        if data is not None:
            entered = self._entering(data[2], names)
            (args if data[0] == "args" else kwargs)[data[1]] = entered
            axis = _axis(name, args, entered, tensor, before=slots.index(data) < slots.index((kind, key, tensor)))
            for layer in names:
                self.entered.setdefault(layer, []).append((entered, axis))
        if name in _EMBEDDINGS and (kwargs.get("max_norm") or args[3:4] not in ([], [None])):
            self._keep(tensor)  # it may shrink the rows that it reads
        result = func(*args, **kwargs)
        if self._watch is not None:
            for layer in names:
                changed = None
                if layer in self._others:
                    (args if kind == "args" else kwargs)[key] = self._other(layer, tensor)
                    changed = func(*args, **kwargs)
                self._show(layer, None if data is None else entered, axis, result, changed)
        return result

    def _leaves_of(self, tensor: Tensor) -> list[tuple[Leaf, Tensor]]:
        """The weights that a tensor is, or is a view of."""
        if not tensor.is_floating_point() or not (known := self._weights.get(memory_of(tensor))):
            return []
        first = tensor.storage_offset()
        # several weights may lie in one piece of memory, together with biases
        found = [
            (leaf, whole)
            for leaf, whole in known
            if whole.storage_offset() <= first < whole.storage_offset() + whole.numel()
        ]
        self.used.update(id(leaf) for leaf, _ in found)
        return found

    def _names(self, tensor: Tensor) -> list[str]:
        """The layers whose weight a tensor is, or is a view of."""
        found: list[str] = []
        for leaf, whole in self._leaves_of(tensor):
            first = tensor.storage_offset()
            found += [
                name
                for name, part in leaf.parts.items()
                if len(leaf.parts) == 1
                or tensor.numel() == whole.numel()
                or first <= part.view(whole).storage_offset() < first + tensor.numel()
            ]
        return found

    def _other(self, layer: str, tensor: Tensor) -> Tensor:
        """The other weight of a layer, seen through the view of its weight that ``tensor`` is."""
        other = self._others[layer]
        whole = next(whole for leaf, whole in self._leaves_of(tensor) if layer in leaf.parts)
        offset = tensor.storage_offset() - whole.storage_offset()
        return other.as_strided(tensor.size(), tensor.stride(), offset)

    def _entering(self, x: Tensor, names: list[str]) -> Tensor:
        """The input of a layer as the layer is to see it."""
        grid = next((self._grids[name] for name in names if name in self._grids), None)
        if grid is not None:
            x = fake_quantize(x, grid)
        if self._differentiate:
            # a copy: the derivative by it is of this use alone, and later changes in place do not reach it
            x = x.clone() if x.requires_grad else x.detach().clone().requires_grad_()
        return x

    def _show(self, layer: str, entered: Tensor | None, axis: int, result: Tensor, changed: Tensor | None) -> None:
        import numpy as np
        from torch._C import DisableTorchFunction

        from qvis.adapters.torch.running import to_numpy

        assert self._watch is not None
        inputs = np.zeros((0,), np.float32) if entered is None else to_numpy(entered)
        passage = Passage(layer, inputs, axis, to_numpy(result), None if changed is None else to_numpy(changed))
        with DisableTorchFunction():
            self._watch(passage)

    # -----------------------------------------------------------------------------------------------------------------
    # What a model writes

    def _write(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Run an operation that may write to its first argument, and remember what was there if it is the model's."""
        import torch

        target = args[0] if args else None
        if not isinstance(target, torch.Tensor):
            return func(*args, **kwargs)
        if name == "__set__" or is_in_place(name):
            self._keep(target)
            if target.is_leaf and target.requires_grad and self._graph:
                with torch.no_grad():
                    return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _keep(self, tensor: Tensor) -> None:
        """Remember a weight or another parameter that is going to be written to."""
        memory = memory_of(tensor)
        if memory in self._protected or memory in self._weights:
            whole = tensor.detach()
            self._written.append((tensor, whole, whole.clone()))

    def put_back(self) -> None:
        """Undo what the model wrote to its weights."""
        import torch

        with torch.no_grad():
            for tensor, place, numbers in reversed(self._written):
                if isinstance(tensor, torch.nn.Parameter):
                    tensor.data = place
                place.copy_(numbers)
        self._written = []


def fake_quantize(x: Tensor, grid: Grid) -> Tensor:
    """``x`` rounded to the points of a grid."""
    codes = (x / grid.step).round_().clamp_(-grid.zero, 2**grid.bits - 1 - grid.zero)
    return codes.mul_(grid.step)


def _widened(name: str, args: Any, result: Any) -> Any:
    """Half-precision results in float32: the model runs in float32, whatever it casts to."""
    import torch

    if isinstance(result, torch.Tensor) and result.dtype in (torch.float16, torch.bfloat16):
        if name in _CASTS and args[0].dtype == torch.float32:
            return args[0].clone()
        return result.float()
    return result


def _data(name: str, slots: list[Any], weight: Tensor) -> Any:
    """The argument that the weight is applied to."""
    import torch

    real = [slot for slot in slots if slot[2] is not weight and slot[2].is_floating_point()]
    if name in ("addmm", "baddbmm") and len(real) > 1:
        real = real[1:]  # the first is what is added
    return next((slot for slot in real if slot[2].layout == torch.strided), None)


def _axis(name: str, args: Any, x: Tensor, weight: Tensor, before: bool) -> int:
    """The axis of the input that a layer sums over."""
    if name in _CONVOLUTIONS:
        return 1 if x.ndim == weight.ndim else 0
    if name == "einsum" and isinstance(args[0], str) and "..." not in args[0]:
        given, _, result = args[0].replace(" ", "").partition("->")
        letters = given.split(",")[next(i for i, one in enumerate(args[1:]) if one is x)]
        summed = [axis for axis, letter in enumerate(letters) if letter not in result and given.count(letter) > 1]
        return summed[-1] if summed else -1
    return -1 if before or x.ndim < 2 else -2
