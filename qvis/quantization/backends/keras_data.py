"""Samples for Keras models as plain arrays, so that they can be put into any order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qvis.adapters.keras.live import ends
from qvis.adapters.keras.outputs import arrange
from qvis.data.arrays import is_array
from qvis.errors import BadArgumentError
from qvis.layers import IntArray
from qvis.quantization.backends.keras_steps import Steps
from qvis.running import Batch

AnyArray = np.ndarray[Any, Any]


@dataclass
class Samples:
    """Some samples, the first axis of all arrays."""

    inputs: list[AnyArray]
    """One for each input of the model, float32."""
    targets: list[AnyArray] = field(default_factory=list)
    """What is trained for."""
    labels: AnyArray | None = None
    """As they were given; None without."""

    def __len__(self) -> int:
        return len(self.inputs[0])

    def some(self, places: IntArray | slice) -> Samples:
        """Those at some places."""
        return Samples([one[places] for one in self.inputs], [one[places] for one in self.targets])

    def spread(self, most: int) -> Samples:
        """No more than so many, from all over."""
        count = min(most, len(self))
        return self.some(np.arange(count) * len(self) // count)

    def parts(self, size: int) -> Iterator[Samples]:
        """All of them, so many at a time."""
        for start in range(0, len(self), size):
            yield self.some(slice(start, start + size))


def gather(batches: Sequence[Batch], model: Any, steps: Steps, argument: str) -> Samples:
    """The samples of batches, inputs in the order of the model's.

    Raises
    ------
    BadArgumentError
        They do not suit the model, or only some have labels.
    """
    rows = [_inputs(batch, model, steps, argument) for batch in batches]
    inputs = [np.concatenate(one) for one in zip(*rows, strict=True)]
    with_labels = [batch for batch in batches if batch.labels is not None]
    if with_labels and len(with_labels) < len(batches):
        raise BadArgumentError(f"{argument}: some batches have labels and some have none; give all of them labels")
    if any(not is_array(batch.labels) for batch in with_labels):
        raise BadArgumentError(
            f"{argument}: the labels are several arrays; give one, or none: then the float model is what is trained for"
        )
    labels = np.concatenate([_as_array(batch.labels) for batch in with_labels]) if with_labels else None
    return Samples(inputs, [], labels)


def _inputs(batch: Batch, model: Any, steps: Steps, argument: str) -> list[AnyArray]:
    import keras

    args, kwargs = arrange(model, batch)
    given: Any = args[0] if len(args) == 1 and not kwargs else (*args, *kwargs.values())
    expected, _ = ends(model) or (None, None)
    if isinstance(given, Mapping) and expected is not None and not isinstance(expected, Mapping):
        given = [given[one.name] for one in keras.tree.flatten(expected) if one.name in given]
    found = [_as_array(one).astype(np.float32) for one in keras.tree.flatten(given)]
    shapes = [tuple(step.shape[1:]) for step in steps.inputs]
    # as Keras does, take (samples,) for (samples, 1)
    if len(found) == len(shapes):
        pairs = list(zip(found, shapes, strict=True))
        found = [one[..., None] if shape[-1:] == (1,) and one.ndim == len(shape) else one for one, shape in pairs]
    if [one.shape[1:] for one in found] != shapes:
        raise _unfit(argument, found, shapes)
    return found


def _unfit(argument: str, found: list[AnyArray], shapes: list[tuple[Any, ...]]) -> BadArgumentError:
    given = ", ".join(str(one.shape) for one in found)
    expected = ", ".join(str(("samples", *shape)).replace("'", "") for shape in shapes)
    return BadArgumentError(f"{argument}: got inputs of shape {given}, expected {expected}")


def _as_array(value: Any) -> AnyArray:
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
