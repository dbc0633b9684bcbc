"""Which numbers count as the outputs of a running PyTorch model: those it returns, or what they are chosen from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from qvis.errors import NotRunnableError
from qvis.words import listed_names

if TYPE_CHECKING:
    from torch import Tensor

_SELECTIONS = {"nms", "batched_nms", "nonzero", "masked_select", "unique", "unique_consecutive", "argwhere"}
"""What they return has a size that depends on numbers."""
_STEPS = {"round", "floor", "ceil", "trunc", "fix", "sign", "sgn"}
"""PyTorch differentiates these, and the derivative is zero everywhere."""


class Call(NamedTuple):
    """An operation on tensors that depend on the weights."""

    place: int
    """How many operations came before it, and one."""
    function: str
    smooth: bool
    """Whether its result can be differentiated."""


class Follower:
    """Follows what depends on the weights through a run, and what was selected by number, such as detected objects."""

    def __init__(self, is_weight: Callable[[Tensor], bool]) -> None:
        self._is_weight = is_weight
        self._alive: dict[int, Tensor] = {}
        self._selected: set[int] = set()
        self._flat: set[int] = set()
        self.calls: list[Call] = []
        self.selections: list[str] = []
        """The selections by number, in words."""
        self.goes_on = False
        """Whether weights are applied to what was selected."""
        self.border: list[Tensor] = []
        """What went into selections, and what joins their results later."""

    def depends(self, tensor: Tensor) -> bool:
        """Whether a tensor is made with weights that can be exchanged."""
        return id(tensor) in self._alive or self._is_weight(tensor)

    def see(self, place: int, name: str, args: Any, kwargs: Any, result: Any) -> None:
        """Take in an operation."""
        given = [*tensors_in((args, kwargs))]
        dependent = [one for one in given if self.depends(one)]
        made = [*tensors_in(result)]
        if is_in_place(name) and given and args and args[0] is given[0]:
            made.append(given[0])
        if not dependent or not made:
            return
        selected = any(id(one) in self._selected for one in given)
        selection = _selection(name, args, self.depends)
        if selection:
            self.selections.append(selection)
        if selected and any(map(self._is_weight, given)):
            self.goes_on = True
        if selection or selected:
            whole = [one for one in dependent if id(one) not in self._selected and not self._is_weight(one)]
            self.border += [one for one in whole if one.is_floating_point()]
            self._selected.update(map(id, made))
        smooth = [one for one in given if one.is_floating_point() and self.is_smooth(one)]
        # a weight that is rounded on its way in is no output that could be cut off before
        if (name.removesuffix("_") in _STEPS and not any(map(self._is_weight, given))) or not smooth:
            self._flat.update(map(id, made))
        else:
            self._flat.difference_update(map(id, made))
        if smooth:
            self.calls.append(Call(place, name, any(map(self.is_smooth, made))))
        self._alive.update((id(one), one) for one in made)

    def is_smooth(self, tensor: Tensor) -> bool:
        """Whether it can be differentiated, and not only in steps, between which nothing changes."""
        return tensor.requires_grad and id(tensor) not in self._flat

    def unselected(self, tensor: Tensor) -> bool:
        """Whether its size does not depend on numbers."""
        return id(tensor) not in self._selected


def _selection(name: str, args: Any, depends: Callable[[Tensor], bool]) -> str:
    """What selects by numbers that depend on the weights, in words; empty for any other operation."""
    import torch

    if name in _SELECTIONS or (name == "where" and len(args) == 1):
        return name
    if name == "__getitem__":
        masks = [one for one in tensors_in(args[1]) if one.dtype in (torch.bool, torch.uint8)]
        return "a selection by a mask" if any(map(depends, masks)) else ""
    return ""


def is_in_place(name: str) -> bool:
    """Whether an operation writes to its first argument.

    >>> [name for name in ("add_", "__iadd__", "__setitem__", "add", "__invert__", "__init__") if is_in_place(name)]
    ['add_', '__iadd__', '__setitem__']
    """
    if name.endswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in _NOT_IN_PLACE)
    return name.endswith("_")


_NOT_IN_PLACE = {"__invert__", "__index__", "__init__", "__int__", "__iter__"}


@dataclass(frozen=True)
class Cut:
    """Which tensors are a model's outputs."""

    paths: tuple[str, ...]
    """Those that it returns."""
    at: tuple[int, ...] = ()
    """Else what went into these calls."""
    before_selection: bool = False
    """Else, with those of :attr:`paths`, what went into selections by number."""
    notes: tuple[str, ...] = ()

    def choose(self, result: Any, caught: Mapping[int, list[Tensor]], follower: Follower | None) -> list[Tensor]:
        """The outputs of a run."""
        if self.at:
            chosen = [one for index in self.at for one in caught.get(index, ()) if one.is_floating_point()]
        else:
            found = dict(outputs_of(result))
            chosen = [found[path] for path in self.paths if path in found]
        if self.before_selection and follower is not None:
            chosen += follower.border
        return list({id(one): one for one in chosen}.values())


def find_cut(follower: Follower, result: Any, size: int) -> Cut:
    """Which outputs can be differentiated, after a run of ``size`` samples that was followed.

    Raises
    ------
    NotRunnableError
        There is no output.
    """
    found = dict(outputs_of(result))
    if not found:
        raise NotRunnableError(
            f"model: it returns {_describe(result)}; expected a tensor, or tensors in tuples, lists, mappings or "
            "dataclasses; give a module around it that returns those"
        )
    smooth = [path for path, one in found.items() if one.is_floating_point() and follower.is_smooth(one)]
    harmless = follower.goes_on and all(found[path].shape[:1] == (size,) for path in smooth)
    if follower.selections and not (smooth and harmless):
        kept = tuple(path for path in smooth if follower.unselected(found[path]))
        if kept or follower.border:
            names = listed_names([*dict.fromkeys(follower.selections)])
            return Cut(
                kept,
                before_selection=True,
                notes=(
                    f"cut off before {names}, which chooses by number; what goes in there counts as the output, and "
                    "samples are run one by one",
                ),
            )
    if smooth:
        rest = [path for path in found if path not in smooth]
        notes = (f"{listed_names(rest)} cannot be differentiated and is left out",) if rest else ()
        return Cut(tuple(smooth), notes=notes)
    last = max((call.place for call in follower.calls if call.smooth), default=0)
    rough = [call for call in follower.calls if not call.smooth]
    tail = [call for call in rough if call.place > last] or rough[-1:]
    if not tail:
        return Cut(tuple(path for path, one in found.items() if one.is_floating_point()))
    names = listed_names([*dict.fromkeys(call.function for call in tail)])
    note = f"cut off before {names}, which cannot be differentiated; what goes in there counts as the output"
    return Cut((), tuple(call.place for call in tail), notes=(note,))


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
            yield from outputs_of(getattr(value, one.name, None), f"{path}.{one.name}")


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in a nest of containers."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def _describe(value: Any) -> str:
    if isinstance(value, (list, tuple, Mapping)):
        return f"a {type(value).__name__} without tensors"
    return "nothing" if value is None else f"an object of type {type(value).__name__}"
