"""Copies Keras models as they are, without the code that made them: also models of classes of one's own.

Cloning from a configuration runs constructors, loses what is set outside of them, and goes on to use the original's
variables where an operation takes one itself. So the objects are copied, each once, in the order in which they come up
and not inside one another, since the graph of a deep model would be a recursion as deep.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict, defaultdict, deque
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from qvis.adapters.keras.live import TRACED, package_of, walk
from qvis.errors import UnsupportedModelError

_LEFT = {
    "optimizer", "_optimizer", "train_function", "test_function", "predict_function", "_compile_config", "loss",
    "_compile_loss", "_compile_metrics", "_loss_tracker", "_distribute_strategy", "_distribute_reduction_method",
}  # fmt: skip
"""Attributes that have to do with training, and are not copied."""
_BOUND = ("build", "quantize")
"""Functions that Keras makes for each layer anew, and that hold on to it."""
_NODE = re.compile(r"(\d+)(_ib-\d+)")
"""How Keras names a call of a layer, which it knows by its place in memory."""
_SHARED = (type, FunctionType, BuiltinFunctionType, ModuleType, str, bytes, int, float, complex, bool, type(None))


def copied(model: Any) -> tuple[Any, list[str]]:
    """A model with variables of its own that is not compiled, and notes on what it still shares with the original.

    Raises
    ------
    UnsupportedModelError
        It cannot be copied.
    """
    if not hasattr(package_of(model), "StatelessScope"):
        found, shared = _cloned(model), []
    else:
        copier = _Copier(model)
        found = copier.copy(model, "")
        copier.finish()
        shared = copier.shared
    before, after = _variables(model), _variables(found)
    same = [(name, shape) for name, shape, _ in before] == [(name, shape) for name, shape, _ in after]
    if not same or {id(one) for *_, one in before} & {id(one) for *_, one in after}:
        raise _refusal(model, "the copy has other variables than it")
    notes = ["the copy is not compiled; call compile before training or evaluating it"]
    notes = notes if getattr(model, "compiled", False) or getattr(model, "optimizer", None) is not None else []
    if shared:
        names = ", ".join(map(repr, dict.fromkeys(shared)))
        notes.append(f"{names}: cannot be copied, and is shared with the original model")
    return found, notes


def _variables(model: Any) -> list[tuple[str, tuple[int, ...], Any]]:
    return [(str(one.name), tuple(one.shape), one) for one in model.weights]


def _refusal(model: Any, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"model: no exact copy can be made of {model.name!r}: {why}; write into the model itself, with inplace=True"
    )


def _cloned(model: Any) -> Any:
    """A copy of a model of Keras 2 that is made of layers."""
    keras = package_of(model)
    try:
        found = keras.models.clone_model(model)
        found.set_weights(model.get_weights())
    except Exception as error:
        raise _refusal(model, f"{type(error).__name__}: {error}".splitlines()[0]) from error
    for (_, _, one), (_, _, other) in zip(walk(model), walk(found), strict=True):
        other.trainable = one.trainable
    return found


class _Copier:
    def __init__(self, model: Any) -> None:
        layers = [layer for _, _, layer in walk(model)]
        held = [getattr(layer, "optimizer", None) for layer in layers]
        held += [vars(layer).get(name) for layer in layers for name in TRACED]
        self.left = {id(one) for one in held if one is not None}
        """What is neither copied nor shared."""
        self.memo: dict[int, Any] = {}
        self.alive: list[Any] = []
        """Originals, so that no other takes their place in memory."""
        self.waiting: deque[tuple[Any, Any, str]] = deque()
        """Objects that were made, whose attributes are still to come."""
        self.made: list[Any] = []
        self.shared: list[str] = []

    def copy(self, value: Any, path: str) -> Any:
        """The copy of a value; of an object of Keras one that is filled later."""
        if isinstance(value, _SHARED):
            return value
        if id(value) in self.memo:
            return self.memo[id(value)]
        self.alive.append(value)
        new = self._new(value, path)
        self.memo[id(value)] = new
        return new

    def finish(self) -> None:
        """Give all objects their attributes."""
        while self.waiting:
            value, new, path = self.waiting.popleft()
            for name, one in vars(value).items():
                if name in _BOUND and name in vars(new) and isinstance(one, FunctionType):
                    continue
                below = f"{path}.{name}" if path else name
                new.__dict__[name] = None if name in _LEFT and hasattr(value, "fit") else self.copy(one, below)
            if "compiled" in vars(new):
                new.__dict__["compiled"] = False
        for new in self.made:
            self._renumber(new)

    def _new(self, value: Any, path: str) -> Any:
        kind = type(value)
        if kind is MethodType:
            return MethodType(value.__func__, self.copy(value.__self__, path))
        if kind is tuple or (isinstance(value, tuple) and hasattr(value, "_fields")):
            items = [self.copy(one, path) for one in value]
            return kind(*items) if hasattr(value, "_fields") else tuple(items)
        if kind in (set, frozenset):
            return kind(self.copy(one, path) for one in value)
        if kind in (dict, OrderedDict, defaultdict):
            new = self.memo[id(value)] = copy.copy(value)
            new.clear()
            new.update(
                {
                    self.copy(key, path): self.copy(one, _below(path, key))
                    for key, one in value.items()
                    if self._stays(one)
                }
            )
            return new
        if kind in (list, deque):
            new = self.memo[id(value)] = copy.copy(value)
            new.clear()
            new.extend(self.copy(one, _below(path, index)) for index, one in enumerate(value) if self._stays(one))
            return new
        if kind.__name__ == "ListWrapper" or any(cls.__module__.startswith("keras.") for cls in kind.__mro__):
            return self._of_keras(value, path)
        if kind.__name__ == "TrackableReference":  # what TensorFlow notes down of an object
            return kind(value.name, self.copy(value.ref, path))
        try:
            return copy.deepcopy(value, self.memo)
        except Exception:  # whatever it is, it does not want to be copied
            self.shared.append(path)
            return value

    def _of_keras(self, value: Any, path: str) -> Any:
        """An empty object of the same class, which is filled later; containers at once."""
        import keras

        if not hasattr(value, "__dict__"):
            self.shared.append(path)
            return value
        kind, base = type(value), _base(value)
        # a layer's own way to be made gives it the functions that are bound to it
        new = kind.__new__(kind) if isinstance(value, keras.Operation) else base.__new__(kind)  # type: ignore[call-overload]
        self.memo[id(value)] = new
        self.made.append(new)
        if base is dict:
            dict.update(
                new, {key: self.copy(one, _below(path, key)) for key, one in dict.items(value) if self._stays(one)}
            )
        elif base is not object:
            items = [self.copy(one, path) for one in value if self._stays(one)]
            list.extend(new, items) if base is list else set.update(new, items)
        self.waiting.append((value, new, path))
        return new

    def _stays(self, value: Any) -> bool:
        """Whether it is no optimizer or traced function, and no reference to one."""
        inner = value.ref if type(value).__name__ == "TrackableReference" else value
        return id(inner) not in self.left

    def _renumber(self, new: Any) -> None:
        """Where Keras knows objects by their place in memory, give it the place of the copy."""
        tracked = vars(new).get("stored_ids")
        if isinstance(tracked, dict):
            for name, places in tracked.items():
                tracked[name] = {id(self.memo[one]) for one in places if one in self.memo}
        for name, value in vars(new).items():
            if name == "_nodes" and isinstance(value, set):
                found = {one: _NODE.fullmatch(one) if isinstance(one, str) else None for one in value}
                places = {one: self.memo.get(int(match[1])) for one, match in found.items() if match}
                new.__dict__[name] = {
                    f"{id(places[one])}{match[2]}" if match and places[one] is not None else one
                    for one, match in found.items()
                }


def _base(value: Any) -> type:
    return next((base for base in (list, set, dict) if isinstance(value, base)), object)


def _below(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)
