"""What the adapters share that write new numbers into models: the result, and the checks of what is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from qvis.adapters.encodings import Array
from qvis.errors import BadArgumentError, suggest
from qvis.layers import FloatArray, Network, Norm
from qvis.words import listed_names


class Rewritten(NamedTuple):
    """A model with other numbers."""

    model: Any
    """Of the same kind as the one that was given; of a file, what it holds."""
    notes: tuple[str, ...] = ()
    """What is not as it was beside the numbers, or not exactly the numbers that were asked for."""


def check_layers(
    network: Network,
    argument: str,
    given: Iterable[str],
    writable: Iterable[str],
    reasons: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Refuse names that are no layers, and layers that cannot be written, with the ``reasons`` that are known."""
    known = {name: layer for layer in network.layers for name in (layer.name, *layer.aliases)}
    kept = set(writable)
    for name in given:
        if name not in known:
            raise BadArgumentError(f"{argument}: no layer is called {name!r}{suggest(name, known)}")
        if name in kept:
            continue
        if argument == "biases":
            raise BadArgumentError(
                f"biases: {name!r} ({known[name].op}) has no bias that could be written; give one to the model first, "
                "or leave the layer out"
            )
        reason = reasons.get(known[name].name, "is quantized or packed already; give the model before that")
        raise BadArgumentError(f"{argument}: {name!r} cannot be written: its weight {reason}")


def fitted(argument: str, name: str, numbers: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """The numbers as an array, if they have the shape that they must have."""
    array: FloatArray = np.asarray(numbers)
    if array.shape != shape:
        raise BadArgumentError(f"{argument}: {name!r} has the shape {shape}, got {array.shape}")
    return array


def check_stored(argument: str, name: str, wanted: Array, stored: Array, kind: str) -> bool:
    """Whether a narrow type keeps what was asked for; refuses numbers that are too large for it."""
    if bool((np.isfinite(wanted) & ~np.isfinite(stored)).any()):
        raise BadArgumentError(
            f"{argument}: {name!r} is stored in {kind}, which has no room for {float(np.abs(wanted).max()):.4g}; "
            "give the model in float32"
        )
    return bool(np.array_equal(wanted, stored, equal_nan=True))


def precision_notes(rounded: Mapping[str, Iterable[str]]) -> list[str]:
    """Say which numbers a type could not hold exactly, by the name of the type."""
    return [
        f"{listed_names(list(names))}: stored in {kind}, so that the numbers, and what the model computes, are only as "
        f"exact as {kind} is"
        for kind, names in rounded.items()
    ]


def express(norm: Norm, epsilon: float, *, has_scale: bool, has_shift: bool) -> dict[str, FloatArray]:
    """What the numbers of a normalization must be that has its own epsilon, and maybe no scale or shift.

    What it has no numbers for is put into mean and variance: with ``s`` for the deviation,
    ``(x - m) / s * a + b = (x - (m - b s / a)) / (s / a)``. What can stay stays to the last bit.

    Raises
    ------
    BadArgumentError
        It has no scale, and is to multiply by a number that is not positive.
    """
    scale, shift, mean, variance = (
        np.asarray(one, np.float64) for one in (norm.scale, norm.shift, norm.mean, norm.variance)
    )
    if np.float32(norm.epsilon) != np.float32(epsilon):
        variance = variance + (norm.epsilon - epsilon)
    deviation = np.sqrt(variance + epsilon)
    if not has_scale:
        if not bool((scale > 0).all()):
            raise BadArgumentError(
                f"norms: {norm.name!r} has no scale of its own, so that it cannot multiply by "
                f"{float(scale.min()):.4g}; only positive numbers can be put into its variance"
            )
        variance = np.where(scale == 1, variance, (deviation / scale) ** 2 - epsilon)
        deviation, scale = deviation / scale, np.ones_like(scale)
    if not has_shift:
        if bool(((scale == 0) & (shift != 0)).any()):
            raise BadArgumentError(
                f"norms: {norm.name!r} has no shift of its own, and multiplies a channel by 0, so that it cannot add "
                "anything to it"
            )
        mean = mean - shift * deviation / np.where(scale == 0, 1, scale)
    found = {"scale": scale, "shift": shift, "mean": mean, "variance": variance}
    return {name: one for name, one in found.items() if {"scale": has_scale, "shift": has_shift}.get(name, True)}
