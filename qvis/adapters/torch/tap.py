"""Sees every operation of a running PyTorch model: what enters its layers, and where its outputs stop to be smooth.

It stands in the way of PyTorch's own functions (``TorchFunctionMode``), so that layers written as modules and as
functions of parameters are seen alike, however often they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

from torch.overrides import TorchFunctionMode

from qvis.adapters.torch.parts import Part
from qvis.running import Grid, Passage
from qvis.words import listed_names

if TYPE_CHECKING:
    from torch import Tensor

_CONVOLUTIONS = {f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)}
_PRODUCTS = {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum"}
_LAYERS = _CONVOLUTIONS | _PRODUCTS | {"embedding", "embedding_bag"}
_COMPOSITE = {"multi_head_attention_forward"}
"""Functions of PyTorch written in Python, which hide those that they call."""
_SELECTIONS = {"nms", "batched_nms", "nonzero", "masked_select", "unique", "unique_consecutive", "argwhere"}
"""What they return has a size that depends on numbers."""


class Call(NamedTuple):
    """An operation on tensors that depend on the weights."""

    place: int
    """How many operations came before it, and one."""
    function: str
    given: list[Tensor]
    """Its inputs that can be differentiated."""
    smooth: bool
    """Whether its result can be."""


class Tap(TorchFunctionMode):
    """See the module's description. Everything that it is to do is off by default."""

    def __init__(
        self,
        weights: Mapping[int, tuple[Tensor, dict[str, Part]]],
        *,
        grids: Mapping[str, Grid] | None = None,
        watch: Callable[[Passage], None] | None = None,
        taps: bool = False,
        record: bool = False,
        cut: Cut | None = None,
    ) -> None:
        super().__init__()
        self._weights = weights
        self._grids = grids or {}
        self._watch = watch
        self._taps = taps
        self._record = record
        self._cut = cut
        self._count = 0
        self.others: dict[str, Tensor] = {}
        self.entered: dict[str, list[tuple[Tensor, int]]] = {}
        """What entered the calls of each layer, with the axis of its channels."""
        self.calls: list[Call] = []
        self.caught: dict[int, list[Tensor]] = {}
        """What went into the calls at which outputs are cut."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "_set_grad_enabled":
            return None  # a model that switches derivatives off is differentiated all the same
        if name in _COMPOSITE:
            with patch("torch.nn.functional.has_torch_function", lambda *_: False), self:
                return func(*args, **kwargs)
        self._count += 1
        index = self._count
        if self._cut is not None and index in self._cut.at:
            self.caught[index] = [*_tensors((args, kwargs))]
        result = self._layer(func, name, args, kwargs) if name in _LAYERS else func(*args, **kwargs)
        if self._record:
            self._note(index, name, args, kwargs, result)
        return result

    def _note(self, index: int, name: str, args: Any, kwargs: Any, result: Any) -> None:
        given = [one for one in _tensors((args, kwargs)) if one.requires_grad and one.is_floating_point()]
        made = [*_tensors(result)]
        if given and made:
            selecting = name == "__getitem__" and _has_mask(args[1])
            name = "a selection by a mask" if selecting else name
            self.calls.append(Call(index, name, given, any(one.requires_grad for one in made)))

    # -----------------------------------------------------------------------------------------------------------------
    # Layers

    def _layer(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        import torch

        slots = [("args", i, value) for i, value in enumerate(args)]
        slots += [("kwargs", key, value) for key, value in kwargs.items()]
        slots = [slot for slot in slots if isinstance(slot[2], torch.Tensor)]
        known = [(slot, self._names(slot[2])) for slot in slots]
        weight = next(((slot, names) for slot, names in known if names), None)
        if weight is None:
            return func(*args, **kwargs)
        (kind, key, tensor), names = weight
        data = None if "embedding" in name else _data(name, slots, tensor)
        args, kwargs = list(args), dict(kwargs)
        if data is not None:
            replaced = self._entering(data[2], names)
            (args if data[0] == "args" else kwargs)[data[1]] = replaced
            axis = _axis(name, replaced, tensor, before=slots.index(data) < slots.index((kind, key, tensor)))
            for layer in names:
                self.entered.setdefault(layer, []).append((replaced, axis))
        result = func(*args, **kwargs)
        if self._watch is not None:
            for layer in names:
                changed = None
                if layer in self.others:
                    (args if kind == "args" else kwargs)[key] = _same_view(self.others[layer], tensor)
                    changed = func(*args, **kwargs)
                entered = None if data is None else (args if data[0] == "args" else kwargs)[data[1]]
                self._show(layer, entered, result, changed, -1 if data is None else axis)
        return result

    def _names(self, tensor: Tensor) -> list[str]:
        """The layers whose weight a tensor is, or is a view of."""
        if not tensor.is_floating_point() or type(tensor).__name__ == "FakeTensor":
            return []
        known = self._weights.get(tensor.untyped_storage().data_ptr())
        if known is None:
            return []
        whole, parts = known
        if len(parts) == 1 or tensor.numel() == whole.numel():
            return list(parts)
        first = tensor.storage_offset()
        return [
            name
            for name, part in parts.items()
            if first <= part.view(whole).storage_offset() < first + tensor.numel()
        ]

    def _entering(self, x: Tensor, names: list[str]) -> Tensor:
        """The input of a layer as the layer is to see it."""
        grid = next((self._grids[name] for name in names if name in self._grids), None)
        if grid is not None:
            x = fake_quantize(x, grid)
        if self._taps:
            # a copy: the derivative by it is of this use alone, and later changes in place do not reach it
            x = x.clone() if x.requires_grad else x.detach().clone().requires_grad_()
        return x

    def _show(self, layer: str, entered: Tensor | None, result: Tensor, changed: Tensor | None, axis: int) -> None:
        import numpy as np

        from qvis.adapters.torch.running import _numpy

        assert self._watch is not None
        inputs = np.zeros((0,), np.float32) if entered is None else _numpy(entered)
        passage = Passage(layer, inputs, axis, _numpy(result), None if changed is None else _numpy(changed))
        with _unseen():
            self._watch(passage)


def fake_quantize(x: Tensor, grid: Grid) -> Tensor:
    """``x`` rounded to the points of a grid."""
    codes = (x / grid.step).round().add(grid.zero).clamp(0, 2**grid.bits - 1)
    return (codes - grid.zero) * grid.step


def _data(name: str, slots: list[Any], weight: Tensor) -> Any:
    """The argument that the weight is applied to."""
    real = [slot for slot in slots if slot[2] is not weight and slot[2].is_floating_point()]
    if name in ("addmm", "baddbmm") and len(real) > 1:
        real = real[1:]  # the first is what is added
    return real[0] if real else None


def _axis(name: str, x: Tensor, weight: Tensor, before: bool) -> int:
    """The axis of the input that a layer sums over."""
    if name in _CONVOLUTIONS:
        return 1 if x.ndim == weight.ndim else 0
    return -1 if before or x.ndim < 2 else -2


def _same_view(other: Tensor, weight: Tensor) -> Tensor:
    """``other`` seen through the view that ``weight`` is."""
    return other.as_strided(weight.size(), weight.stride(), weight.storage_offset())


def _unseen() -> Any:
    """What happens inside is none of the model's operations."""
    from torch._C import DisableTorchFunction

    return DisableTorchFunction()


# ---------------------------------------------------------------------------------------------------------------------
# Outputs


@dataclass(frozen=True)
class Cut:
    """Which tensors are a model's outputs."""

    paths: tuple[str, ...]
    """Those that it returns."""
    at: tuple[int, ...] = ()
    """Else what went into these calls."""
    notes: tuple[str, ...] = ()

    def choose(self, result: Any, tap: Tap) -> list[Tensor]:
        """The outputs of a run."""
        if self.at:
            caught = [one for index in self.at for one in tap.caught.get(index, ()) if one.is_floating_point()]
            return list({id(one): one for one in caught}.values())
        found = dict(outputs_of(result))
        return [found[path] for path in self.paths if path in found]


def find_cut(tap: Tap, result: Any) -> Cut:
    """Which outputs can be differentiated, after a run that recorded its calls."""
    found = dict(outputs_of(result))
    selection = next((c for c in tap.calls if c.function in _SELECTIONS or c.function.startswith("a selection")), None)
    smooth = [path for path, one in found.items() if one.is_floating_point() and one.requires_grad]
    if smooth and selection is None:
        rest = [path for path in found if path not in smooth]
        notes = (f"{listed_names(rest)} cannot be differentiated and is left out",) if rest else ()
        return Cut(tuple(smooth), notes=notes)
    if selection is not None:
        note = f"cut off before {selection.function}, which chooses by number; what goes in there counts as the output"
        return Cut((), (selection.place,), (note,))
    last = max((call.place for call in tap.calls if call.smooth), default=0)
    tail = [call for call in tap.calls if call.place > last and not call.smooth]
    if not tail:
        return Cut(tuple(path for path, one in found.items() if one.is_floating_point()))
    note = f"cut off before {listed_names([call.function for call in tail])}, which cannot be differentiated; what goes"
    return Cut((), tuple(call.place for call in tail), (f"{note} in there counts as the output",))


def outputs_of(value: Any, path: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in what a model returned, with how to reach it."""
    import torch

    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from outputs_of(item, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from outputs_of(item, f"{path}[{index}]")
    elif is_dataclass(value) and not isinstance(value, type):
        for one in fields(value):
            yield from outputs_of(getattr(value, one.name), f"{path}.{one.name}")


def _tensors(value: Any) -> Iterator[Tensor]:
    return (tensor for _, tensor in outputs_of(value))


def _has_mask(index: Any) -> bool:
    import torch

    return any(one.dtype == torch.bool for _, one in outputs_of(index))
