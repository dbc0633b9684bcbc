"""Copies PyTorch modules, also those that ``copy.deepcopy`` refuses: that hold locks, generators or open files."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from types import FunctionType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def copied(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """A module with memory of its own, and notes on what it still shares with the original.

    Parameters that are tied stay tied, and what is a view of another tensor stays one.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch itself copies parts of its graphs in ways it warns of
        try:
            found = copy.deepcopy(model)
            notes: list[str] = []
        except Exception:  # whatever a class of the user's raises
            found, notes = _rebuilt(model)
        else:
            if set(memories(found)) & set(memories(model)):  # by a __deepcopy__ that hands on what it has
                found, notes = _rebuilt(model)
    return found, [*notes, *_bound(model)]


def memories(model: nn.Module) -> Iterator[int]:
    """Where the parameters and buffers of a module lie."""
    from qvis.adapters.torch import _walk

    for _, module in _walk(model):
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            try:
                place = 0 if tensor is None else tensor.untyped_storage().data_ptr()
            except (RuntimeError, NotImplementedError):  # without memory of its own
                continue
            if place:
                yield place


def _rebuilt(model: nn.Module) -> tuple[nn.Module, list[str]]:
    copier = _Copier()
    found: nn.Module = copier.copy(model, "")
    if not copier.shared:
        return found, []
    names = ", ".join(map(repr, copier.shared))
    return found, [f"{names}: cannot be copied, and is shared with the original model"]


class _Copier:
    """Makes new objects of modules, containers and tensors; of all else where it can be copied."""

    def __init__(self) -> None:
        self.memo: dict[int, Any] = {}
        self.alive: list[Any] = []
        """Originals, so that no other takes their place in memory."""
        self.shared: list[str] = []

    def copy(self, value: Any, path: str) -> Any:
        from torch import Tensor, jit, nn

        if id(value) in self.memo:
            return self.memo[id(value)]
        self.alive.append(value)
        if isinstance(value, nn.Module) and not isinstance(value, jit.ScriptModule):
            return self._module(value, path)
        if isinstance(value, Tensor):
            new: Any = self._tensor(value)
        elif type(value) in (dict, OrderedDict, defaultdict):
            new = self.memo[id(value)] = copy.copy(value)
            for key, one in value.items():
                new[key] = self.copy(one, _below(path, key))
        elif type(value) in (list, deque):
            new = self.memo[id(value)] = copy.copy(value)
            for index, one in enumerate(value):
                new[index] = self.copy(one, _below(path, index))
        elif type(value) is tuple:
            new = tuple(self.copy(one, _below(path, index)) for index, one in enumerate(value))
        else:
            try:
                new = copy.deepcopy(value, self.memo)
            except Exception:  # whatever it is, it does not want to be copied
                new = value
                self.shared.append(path)
        self.memo[id(value)] = new
        return new

    def _module(self, module: nn.Module, path: str) -> nn.Module:
        new = object.__new__(type(module))
        self.memo[id(module)] = new
        later = {}
        for name, value in module.__dict__.items():
            if name in ("_parameters", "_buffers", "_modules"):
                # first, so that attributes which refer to them find the copies
                held = new.__dict__[name] = copy.copy(value)
                held.update({key: self.copy(one, _below(path, key)) for key, one in value.items()})
            else:
                new.__dict__[name] = None
                later[name] = value
        for name, value in later.items():
            new.__dict__[name] = self.copy(value, _below(path, name))
        return new

    def _tensor(self, tensor: Tensor) -> Tensor:
        if not tensor.is_leaf:  # what a run left there, which has no derivative any more
            inner: Tensor = copy.deepcopy(tensor.detach(), self.memo)
            return inner
        try:
            return copy.deepcopy(tensor, self.memo)
        except Exception:  # such as a kind of tensor without the method
            return tensor.detach().clone()


def _below(path: str, name: object) -> str:
    return f"{path}.{name}" if path else str(name)


def _bound(model: nn.Module) -> list[str]:
    """Say which functions that are attributes hold on to the original's modules."""
    from torch import nn

    from qvis.adapters.torch import _walk

    found = []
    for path, module in _walk(model):
        for name, value in module.__dict__.items():
            cells = (value.__closure__ or ()) if isinstance(value, FunctionType) else ()
            try:
                if any(isinstance(cell.cell_contents, nn.Module) for cell in cells):
                    found.append(_below(path, name))
            except ValueError:  # a name that was never given a value
                continue
    names = ", ".join(map(repr, found))
    return [f"{names}: a function that goes on to use the modules of the original model"] if found else []
