"""What goes into a Keras model that is run, and which of its results count as outputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np

from qvis.adapters.keras.live import ends
from qvis.errors import BadArgumentError, NotRunnableError
from qvis.running import Batch
from qvis.words import listed_names

_STEPS = {"Round", "Sign", "Signbit", "Floor", "Ceil", "Trunc", "Rint", "OneHot", "StopGradient", "FloorDivide"}
"""Operations of Keras that return real numbers, but have no derivative."""
_MARKS = re.compile("\x1b\\[[0-9;]*m")
"""Of colour."""
_WAY_OUT = "give a model that ends before them"


# ---------------------------------------------------------------------------------------------------------------------
# Inputs


def arrange(model: Any, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs as tensors, in the form in which the model takes them.

    A functional model takes one argument, a nest of all its inputs; they may be given one by one as well. Another model
    may take a dictionary of them.
    """
    args, kwargs = to_tensors(tuple(batch.args)), to_tensors(dict(batch.kwargs))
    kwargs.pop("training", None)
    expected, _ = ends(model) or (None, None)
    if isinstance(expected, Mapping) or (isinstance(expected, (list, tuple)) and len(expected) > 1):
        import keras

        names = [one.name for one in keras.tree.flatten(expected)]
        if len(args) == len(names) > 1:
            args = (keras.tree.pack_sequence_as(expected, list(args)),)
        elif not args and set(kwargs) == set(expected if isinstance(expected, Mapping) else names):
            args, kwargs = (kwargs,), {}
    elif expected is not None and not args and list(kwargs) == [getattr(expected, "name", None)]:
        args, kwargs = tuple(kwargs.values()), {}
    elif expected is None and kwargs and not args and not _takes(model.call, kwargs):
        args, kwargs = (kwargs,), {}
    return args, kwargs


def _takes(call: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function can be called with arguments of these names."""
    try:
        signature(call).bind(**kwargs)
    except TypeError:
        return False
    return True


def to_tensors(value: Any) -> Any:
    """Arrays in a nest of containers as tensors."""
    import tensorflow as tf

    if isinstance(value, Mapping):
        return {name: to_tensors(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [to_tensors(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    if isinstance(value, tf.Tensor) or not hasattr(value, "__array__"):
        return value
    return tf.convert_to_tensor(np.asarray(value))


def described(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor in a nest of containers, with how to reach it."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from described(item, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from described(item, f"{path}[{index}]")
    else:
        yield path, value


def first_line(error: Exception) -> str:
    """What an error says, without what Keras puts around it."""
    lines = [_MARKS.sub("", line).strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith("Exception encountered when calling")]
    return told[0].rstrip(".") if told else "no message"


# ---------------------------------------------------------------------------------------------------------------------
# Outputs


@dataclass(frozen=True)
class End:
    """Where a model ends that is to be differentiated."""

    model: Any
    """Returns the outputs, and maybe more."""
    left_out: tuple[str, ...] = ()
    """How to reach what does not count."""
    notes: tuple[str, ...] = ()

    def outputs(self, result: Any) -> tuple[list[Any], list[str]]:
        """The outputs that count, and notes on the others."""
        kept, notes = [], []
        for path, one in described(result, "output"):
            if one is None:
                continue
            dtype = getattr(getattr(one, "dtype", None), "name", type(one).__name__)
            if path in self.left_out:
                notes.append(f"{path} cannot be differentiated and is left out")
            elif "float" not in dtype or "tensor" not in type(one).__name__.lower():
                notes.append(f"{path} holds no real numbers ({dtype}) and is left out")
            elif not len(one.shape):
                notes.append(f"{path} is one number for all samples and is left out")
            else:
                kept.append(one)
        if not kept:
            raise NotRunnableError(f"model: {'; '.join(notes) or 'it returns nothing'}; {_WAY_OUT}")
        return kept, notes


def find_end(model: Any) -> End:
    """Where a model ends: for one that knows its graph, before operations such as an argmax."""
    import keras

    both = ends(model)
    if both is None:
        return End(model)
    found = dict(described(both[1], "output"))
    rough = [path for path, one in found.items() if one is not None and not _is_smooth(one)]
    if len(rough) < len(found):
        return End(model, tuple(rough))
    before: dict[int, Any] = {}
    cut: list[str] = []
    for one in found.values():
        _step_back(one, before, cut)
    if not before:
        raise NotRunnableError(f"model: {listed_names(rough)} cannot be differentiated; {_WAY_OUT}")
    note = f"cut off before {listed_names(cut)}, which cannot be differentiated; what goes in there is the output"
    return End(keras.Model(both[0], list(before.values()), name=model.name), notes=(note,))


def _is_smooth(one: Any) -> bool:
    """Whether a symbolic tensor may be differentiated, by the operation that returns it."""
    operation, index, _ = one._keras_history
    if "float" not in one.dtype or operation is None:
        return False
    given = operation._inbound_nodes[index].input_tensors
    if getattr(operation, "variables", None):
        return True
    return type(operation).__name__ not in _STEPS and any("float" in each.dtype for each in given)


def _step_back(one: Any, before: dict[int, Any], cut: list[str]) -> None:
    """Gather the last tensors before ``one`` that may be differentiated, and what is cut off."""
    if _is_smooth(one):
        before[id(one)] = one
        return
    operation, index, _ = one._keras_history
    if operation is None or getattr(operation, "variables", None):
        return
    node = operation._inbound_nodes[index]
    if node.input_tensors and operation.name not in cut:
        cut.append(operation.name)
    for given in node.input_tensors:
        _step_back(given, before, cut)


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def per_sample(loss: object) -> Callable[[Any, Any, int], Any] | None:
    """A function of labels, outputs and their number that returns the loss of each sample, (samples,)."""
    if loss is None:
        return None
    import keras

    function: Any = loss
    if isinstance(loss, str):
        try:
            function = keras.losses.get(loss)
        except ValueError as error:
            raise BadArgumentError(f"loss: Keras has no loss {loss!r}; see keras.losses for their names") from error
    if isinstance(function, keras.losses.Loss):
        function = function.call
    if not callable(function):
        raise BadArgumentError(
            f"loss: got {loss!r}, expected the name of a loss of Keras, a keras.losses.Loss or a function "
            "(labels, outputs)"
        )

    def of_samples(labels: Any, outputs: Any, size: int) -> Any:
        import tensorflow as tf

        value = tf.convert_to_tensor(function(labels, outputs))
        if len(value.shape):
            return tf.reduce_mean(tf.reshape(value, [size, -1]), axis=1)
        # One number for all: ask for each sample alone.
        each = [
            function(*tf.nest.map_structure(lambda one, at=at: one[at : at + 1], (labels, outputs)))
            for at in range(size)
        ]
        return tf.stack([tf.reshape(one, []) for one in each])

    return of_samples
