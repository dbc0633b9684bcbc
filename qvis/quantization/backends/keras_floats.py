"""Where rounding has to be left out so that TensorFlow Lite's converter leaves chosen layers in float.

It takes any layer between two grids for one of integers, whether or not its kernel is rounded. So one side of such a
layer has to be free of grids: an end of the model, or an operation that there is for floats alone, and that changes
nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from qvis.errors import UnsupportedModelError
from qvis.quantization.backends import keras_operations as to_do
from qvis.quantization.backends.keras_steps import Step, Steps
from qvis.words import listed_names


@dataclass
class Floats:
    """Steps, by their id."""

    unrounded: set[int] = field(default_factory=set)
    """Whose results are not rounded."""
    behind: set[int] = field(default_factory=set)
    """That take their input through an operation for floats."""
    before: set[int] = field(default_factory=set)
    """Whose result goes through one."""


def find_floats(model: Steps, keys: Collection[int]) -> Floats:
    """What to do so that the steps with these kernels stay in float.

    Raises
    ------
    UnsupportedModelError
        Nothing helps, for layers that are named.
    """
    found, stuck = Floats(), []
    for step in reversed(model.steps):
        if step.weight is None or id(step.weight) not in keys:
            continue
        after = _after(model, step)
        source = _source(step.inputs[0])
        takers = [one for one in _takers(model, source) if one.kind not in ("keep", "dropout")]
        is_last = all(one.weight is None or id(one.weight) in keys for one in after)
        if is_last:
            found.unrounded |= {id(one) for one in (step, *after)}
        if (source.kind == "input" or _is_one_of(source, keys)) and all(_is_one_of(one, keys) for one in takers):
            found.unrounded.add(id(source))
        elif is_last:
            continue
        elif _is_positive(step.inputs[0]):
            found.behind.add(id(step))
        elif step.after is not to_do.nothing:
            found.before.add(id(step))
        else:
            stuck.append(step.name)
    if stuck:
        raise UnsupportedModelError(
            f"bits: {listed_names([repr(one) for one in stuck])} cannot be left in float between layers of integers: "
            "TensorFlow Lite's converter rounds it all the same, since neither its input nor its result comes from "
            "ReLU; leave all layers after it in float too, or give it 8 bits"
        )
    return found


def _is_one_of(step: Step, keys: Collection[int]) -> bool:
    return step.weight is not None and id(step.weight) in keys


def _source(step: Step) -> Step:
    """The step whose numbers one hands on."""
    while step.kind in ("keep", "dropout"):
        step = step.inputs[0]
    return step


def _takers(model: Steps, step: Step) -> list[Step]:
    """What takes the numbers of a step, also those that are handed on."""
    found: list[Step] = []
    for user in model.users(step):
        found += [user, *(_takers(model, user) if user.kind in ("keep", "dropout") else [])]
    return found


def _after(model: Steps, step: Step) -> list[Step]:
    """All steps that depend on one."""
    reached = {id(step)}
    found = []
    for other in model.steps:
        if any(id(one) in reached for one in other.inputs):
            reached.add(id(other))
            found.append(other)
    return found


def _is_positive(step: Step) -> bool:
    """Whether numbers are never negative."""
    step = _source(step)
    return step.after is not to_do.nothing or step.kind == "clip" or step.limits == to_do.SHARE
