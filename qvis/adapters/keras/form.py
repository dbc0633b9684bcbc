"""How a Keras model is called, flat: a list of arrays goes in, a list of tensors comes out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qvis.adapters.keras.live import ends
from qvis.adapters.keras.outputs import arrange, described
from qvis.data.arrays import convert, is_array
from qvis.errors import BadArgumentError, NotRunnableError
from qvis.running import Batch
from qvis.words import count

_INVENTED = re.compile(r"keras_tensor(_\d+)?|input_layer(_\d+)?|input_\d+")
"""Names of inputs that Keras made up, with a number that depends on what was made before."""

AnyArray = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Input:
    """One array that a model takes."""

    name: str
    shape: tuple[int | None, ...]
    """The samples first; None for sizes that may be any."""
    dtype: str


class Form:
    """The inputs of a model in the order in which they are given one by one.

    A functional or sequential model knows them; of others, an example tells.
    """

    def __init__(self, model: Any, example: Batch | None) -> None:
        import keras

        self.model = model
        both = ends(model)
        self._nest = None if both is None else both[0]
        if self._nest is not None:
            tensors = keras.tree.flatten(self._nest)
            keys = list(self._nest) if isinstance(self._nest, Mapping) else []
            names = sorted(keys) if len(keys) == len(tensors) else [str(one.name) for one in tensors]
            self.inputs = tuple(
                Input(name, tuple(one.shape), str(one.dtype)) for name, one in zip(_named(names), tensors, strict=True)
            )
        elif example is None:
            raise BadArgumentError(
                f"example_inputs: what the model {model.name!r} takes cannot be seen, since it is a class of its own; "
                "give what it can be called with, such as '1x224x224x3'"
            )
        else:
            args, kwargs = arrange(model, example)
            found = list(_leaves((args, kwargs)))
            self._example = args, kwargs
            names = [
                path[-1] if isinstance(path[-1], str) else f"input_{number}" for number, (path, _) in enumerate(found)
            ]
            self.inputs = tuple(
                Input(name, (None, *one.shape[1:]) if one.shape else (), _narrowed(one.dtype.name))
                for name, (_, one) in zip(_named(names), found, strict=True)
            )

    @property
    def knows_inputs(self) -> bool:
        """Whether the model itself says what it takes."""
        return self._nest is not None

    @property
    def fixed_batch(self) -> int | None:
        """The only number of samples that the model takes at once; None where any will do."""
        sizes = {one.shape[0] for one in self.inputs if one.shape}
        return next((size for size in sizes if size is not None), None)

    def arrays(self, batch: Batch) -> list[AnyArray]:
        """The arrays of a batch, one for each of :attr:`inputs`, with any number of samples.

        Raises
        ------
        BadArgumentError
            It does not fit the model.
        """
        import keras

        args, kwargs = arrange(self.model, batch)
        if self._nest is None:
            found = [one for _, one in _leaves((args, kwargs))]
        else:
            given = args[0] if len(args) == 1 and not kwargs else list(args) or kwargs
            own = [one.name for one in keras.tree.flatten(self._nest)]
            if isinstance(given, Mapping):
                order = own if set(own) <= set(given) else [one.name for one in self.inputs]
                found = [given[name] for name in order if name in given]
            else:
                found = keras.tree.flatten(given)
        if len(found) != len(self.inputs):
            names = [one.name for one in self.inputs]
            raise BadArgumentError(
                f"data: the model takes {count(len(names), 'input')} ({', '.join(names)}), and a batch has {len(found)}"
            )
        arrays = [np.asarray(one).astype(to.dtype, copy=False) for one, to in zip(found, self.inputs, strict=True)]
        for array, to in zip(arrays, self.inputs, strict=True):
            if not fits(array.shape[1:], to.shape[1:]) or array.ndim != len(to.shape):
                raise BadArgumentError(
                    f"data: the model's input {to.name!r} is {_spelled(to.shape)}, and a batch has "
                    f"{_spelled(array.shape)}"
                )
        return arrays

    def call(self, tensors: Sequence[Any]) -> list[tuple[str, Any]]:
        """The outputs that are numbers, with names, for tensors in the order of :attr:`inputs`."""
        import keras

        if self._nest is not None:
            result = self.model(keras.tree.pack_sequence_as(self._nest, list(tensors)), training=False)
        else:
            waiting = iter(tensors)
            args, kwargs = convert(self._example, lambda _: next(waiting))
            result = self.model(*args, **kwargs, training=False)
        found = [(path, one) for path, one in described(result) if is_array(one) and one.dtype.name != "string"]
        if not found:
            raise NotRunnableError("model: none of its outputs is an array of numbers; give a model that returns some")
        return [(_output_name(path, number), one) for number, (path, one) in enumerate(found)]


def fits(given: Sequence[int], expected: Sequence[int | None]) -> bool:
    """Whether an array of one shape can be given where another is expected."""
    return len(given) == len(expected) and all(b is None or a == b for a, b in zip(given, expected, strict=True))


def _spelled(shape: Sequence[int | None]) -> str:
    return "×".join("any" if size is None else str(size) for size in shape) or "a single number"


def _leaves(nest: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    """The arrays of a nest with the way to each, in the order in which :func:`convert` comes to them."""
    found: list[tuple[tuple[Any, ...], Any]] = []

    def visit(value: Any, path: tuple[Any, ...]) -> None:
        if is_array(value):
            found.append((path, value))
        elif isinstance(value, Mapping):
            for key, one in value.items():
                visit(one, (*path, key))
        elif isinstance(value, (list, tuple)):
            for place, one in enumerate(value):
                visit(one, (*path, place))

    visit(nest, path)
    return found


def _named(names: Sequence[str]) -> list[str]:
    """The names of the inputs; those that Keras made up are numbered from the first, and none comes twice."""
    plain = [
        ("input" if len(names) == 1 else f"input_{number}") if _INVENTED.fullmatch(name) else re.sub(r"\W", "_", name)
        for number, name in enumerate(names)
    ]
    return [
        f"{name}_{plain[:number].count(name) + 1}" if name in plain[:number] else name
        for number, name in enumerate(plain)
    ]


def _narrowed(dtype: str) -> str:
    return "float32" if dtype == "float64" else dtype


def _output_name(path: str, number: int) -> str:
    key = re.fullmatch(r"\['(\w+)'\]", path)
    return key[1] if key else f"output_{number}"
