"""Which output of one model is which of another: by order, where shapes allow it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from qvis.errors import BadArgumentError
from qvis.layers import FloatArray
from qvis.words import count

MOST = 6
"""With more outputs no other order is tried."""
NEARER = 10
"""Another order that fits too is taken where the noise is so many times smaller."""

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

    Outputs are pairs by their order. Shapes may differ by axes of length 1, and by the place of the channels. Where the
    order does not fit, or the values of another one are much nearer, that is taken, since some writers sort outputs by
    name. Outputs that only one model has are left out. All that is noted.

    Raises
    ------
    BadArgumentError
        Shapes do not fit.
    """
    notes = []
    number = min(len(found), len(expected))
    if len(found) != len(expected):
        notes.append(
            f"It has {count(len(found), 'output')} and the baseline {len(expected)}; what the other does not have was "
            "left out."
        )
    table = [[_change(one.shape, other.shape) for one in found] for other in expected[:number]]
    places = _order(table, found, expected)
    if places is None:
        shapes = ["; ".join(str(one.shape[1:]) for one in which) for which in (found, expected)]
        raise BadArgumentError(
            f"model: the outputs of {name!r} have shapes {shapes[0]} for a sample, those of the baseline {shapes[1]}; "
            "compare models that do the same"
        )
    if places != tuple(range(number)):
        notes.append("Its outputs come in another order than the baseline's; they were matched by what they hold.")
    changes = []
    for row, place in zip(table, places, strict=True):
        change = row[place]
        assert change is not None
        changes.append(change)
        if change is _last or change is _first:
            notes.append(f"Output {place} has its channels elsewhere than the baseline's; they were moved.")
    return Matching(places, tuple(changes), tuple(notes))


def _order(
    table: Sequence[Sequence[Change | None]], found: Sequence[FloatArray], expected: Sequence[FloatArray]
) -> tuple[int, ...] | None:
    """Which output belongs to each of the baseline's; None where shapes fit in no order."""
    noise = np.array(
        [
            [
                np.inf if change is None else _distance(change(one), other)
                for change, one in zip(row, found, strict=True)
            ]
            for row, other in zip(table, expected, strict=False)
        ]
    ).reshape(len(table), len(found))
    own = tuple(range(len(table)))
    orders = list(permutations(range(len(found)), len(own))) if len(found) <= MOST else [own]
    sums = {order: float(noise[list(own), list(order)].sum()) for order in orders}
    best = min(orders, key=lambda order: sums[order])
    if np.isfinite(sums[own]) and not sums[best] < sums[own] / NEARER:
        return own
    return best if np.isfinite(sums[best]) else None


def _distance(one: FloatArray, other: FloatArray) -> float:
    """How far an output is from another, relative to its power; a large number where it holds NaN."""
    with np.errstate(all="ignore"):
        noise = float(np.square(one.astype(np.float64) - other).sum())
        power = float(np.square(other.astype(np.float64)).sum())
    if not np.isfinite(noise):
        return 1e30
    return noise / power if power else float(noise > 0)


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
