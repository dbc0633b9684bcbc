"""Which output of one model is which of another: by order, where shapes allow it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from qvis.errors import BadArgumentError
from qvis.layers import FloatArray
from qvis.words import count

Shape = tuple[int, ...]
Change = Callable[[FloatArray], FloatArray]


@dataclass(frozen=True)
class Matching:
    """The outputs of a model that belong to those of the baseline, in the baseline's order."""

    places: tuple[int, ...]
    changes: tuple[Change, ...]
    """What brings each into the shape of the baseline's."""
    notes: tuple[str, ...] = ()

    def apply(self, outputs: Sequence[FloatArray]) -> list[FloatArray]:
        """The outputs, each beside the baseline's."""
        return [change(outputs[place]) for place, change in zip(self.places, self.changes, strict=True)]


def match_outputs(name: str, found: Sequence[FloatArray], expected: Sequence[FloatArray]) -> Matching:
    """Match the outputs of two models for the same samples.

    Outputs are pairs by their order. Shapes may differ by axes of length 1, and by the place of the channels; where
    that does not do and just one other order fits, it is taken. Outputs that only one model has are left out, and that
    is noted.

    Raises
    ------
    BadArgumentError
        Shapes do not fit.
    """
    notes = []
    number = min(len(found), len(expected))
    if len(found) != len(expected):
        notes.append(
            f"It has {count(len(found), 'output')} and the baseline {len(expected)}: compared by the first {number}."
        )
    table = [[_change(one.shape, other.shape) for one in found] for other in expected]
    places = list(range(number))
    if any(table[place][place] is None for place in places):
        fitting = [[at for at, change in enumerate(row) if change is not None] for row in table]
        places = [row[0] for row in fitting if len(row) == 1]
        if len(places) < len(expected) or len(set(places)) < len(places):
            shapes = ["; ".join(str(one.shape[1:]) for one in which) for which in (found, expected)]
            raise BadArgumentError(
                f"model: the outputs of {name!r} have shapes {shapes[0]} for a sample, those of the baseline "
                f"{shapes[1]}; compare models that do the same"
            )
        notes.append("Its outputs come in another order than the baseline's; they were matched by their shapes.")
    changes = []
    for row, place in zip(table, places, strict=False):
        change = row[place]
        assert change is not None
        changes.append(change)
        if change is _last or change is _first:
            notes.append(f"Output {place} has its channels elsewhere than the baseline's; they were moved.")
    return Matching(tuple(places), tuple(changes), tuple(notes))


def _same(values: FloatArray) -> FloatArray:
    return values


def _last(values: FloatArray) -> FloatArray:
    return np.moveaxis(values, 1, -1)


def _first(values: FloatArray) -> FloatArray:
    return np.moveaxis(values, -1, 1)


def _change(shape: Shape, expected: Shape) -> Change | None:
    """What turns the one shape into the other; None where nothing surely does."""
    if shape == expected:
        return _same
    if [side for side in shape[1:] if side != 1] == [side for side in expected[1:] if side != 1]:
        return lambda values: values.reshape((len(values), *expected[1:]))
    if len(shape) < 4 or len(shape) != len(expected):
        return None
    fitting = [
        change
        for change, moved in (
            (_last, (shape[0], *shape[2:], shape[1])),
            (_first, (shape[0], shape[-1], *shape[1:-1])),
        )
        if moved == expected
    ]
    return fitting[0] if len(fitting) == 1 else None
