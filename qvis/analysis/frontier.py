"""Choosing among grids that differ in size and in error: who beats whom, and what each way of rounding needs.

Grids come in few sizes, so that two kinds seldom have one in common. They are compared along their *curves*: the dB
that the best grid of a kind keeps with a number of bits for each weight, straight lines in between, since a bit more is
worth about 6 dB everywhere. Grids below such a line are passed over: with a width in between the kind would do better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan
from typing import NamedTuple

import numpy as np

from qvis.layers import IntArray, decibels

NOTICEABLE = 0.05
"""A kind that needs this share of bits less than another is better; below, it hardly matters."""
MOST_SIDES = 4
"""So many sides of a question are told of, and the usual one."""


class Point(NamedTuple):
    """Where a grid stands."""

    bits: float
    """For each weight, with scales and codebooks."""
    error: float
    """0 is best; NaN where it is not known."""


def beaten_by(points: Sequence[Point]) -> IntArray:
    """Of each point the place of the best that beats it: no larger, no worse, and one of them less; -1 for none.

    The best is the one of the least error, of several the smallest.
    """
    found = np.full(len(points), -1)
    for i, point in enumerate(points):
        better = [
            (other.error, other.bits, j)
            for j, other in enumerate(points)
            if other.bits <= point.bits and other.error <= point.error and other != point
        ]
        if better:
            found[i] = min(better)[2]
    return found


def best_first(points: Sequence[Point], keep_db: float) -> list[int]:
    """The places of points that keep enough, the smallest first, then of the others by what they keep; unknown last."""
    limit = 10 ** (-keep_db / 10)

    def key(i: int) -> tuple[float, ...]:
        bits, error = points[i]
        if error != error:
            return (2, bits, 0)
        return (0, bits, error) if error <= limit else (1, error, bits)

    return sorted(range(len(points)), key=key)


class Curve:
    """What the best of some grids keep by the bits that they take."""

    def __init__(self, points: Sequence[Point]) -> None:
        self.bits: list[float] = []
        self.kept: list[float] = []
        self.exact = inf
        """The bits of the smallest grid that makes no error, to which no line leads."""
        for bits, error in sorted(point for point in points if point.error == point.error):
            kept = decibels(1.0, error)
            if kept == inf:
                self.exact = bits
                break
            if not self.kept or kept > self.kept[-1]:
                while len(self.bits) > 1 and self._below(bits, kept):
                    del self.bits[-1], self.kept[-1]
                self.bits.append(bits)
                self.kept.append(kept)

    def _below(self, bits: float, kept: float) -> bool:
        """Whether the last grid lies below the line from the one before it to another."""
        slope = (kept - self.kept[-2]) / (bits - self.bits[-2])
        return self.kept[-1] <= self.kept[-2] + slope * (self.bits[-1] - self.bits[-2])

    def __bool__(self) -> bool:
        return bool(self.bits) or isfinite(self.exact)

    @property
    def most(self) -> float:
        """The dB of the best grid."""
        return inf if isfinite(self.exact) else self.kept[-1]

    def at(self, bits: float) -> float:
        """The dB kept with so many bits; NaN where that is less than the smallest grid takes."""
        if bits >= self.exact:
            return inf
        return float(np.interp(bits, self.bits, self.kept, left=nan)) if self.bits else nan

    def needed(self, kept: float) -> float:
        """The bits that it takes to keep so many dB; inf where no grid does."""
        return float(np.interp(kept, self.kept, self.bits, right=self.exact)) if self.bits else self.exact


@dataclass(frozen=True)
class Option:
    """One side of a question."""

    label: str
    bits: float
    """For each weight, that keeping as much as is asked for takes; inf where it cannot."""
    kept_db: float
    """What it keeps with the bits that the best side takes; NaN where it takes more even so."""
    most_db: float
    """What its best grid keeps, whatever it takes."""


@dataclass(frozen=True)
class Answer:
    """The answer to one of three questions, with its numbers."""

    question: str
    """``Uniform or not?``, ``Per tensor, channel or group?`` or ``How many bits?``"""
    short: str
    """In a word or two, such as ``per channel``."""
    text: str
    """In a sentence."""
    options: tuple[Option, ...] = ()
    """The sides, best first."""

    def __str__(self) -> str:
        return f"{self.question} {self.short[:1].upper()}{self.short[1:]}: {self.text}"


def weigh(families: Mapping[str, Sequence[Point]], keep_db: float) -> tuple[list[Option], float]:
    """The sides of a question, best first, and the dB at which they are compared.

    That is what is to be kept, or the most that any of them keeps where that is less.
    """
    curves = {label: curve for label, points in families.items() if (curve := Curve(points))}
    if not curves:
        return [], keep_db
    target = min(keep_db, max(curve.most for curve in curves.values()))
    needed = {label: curve.needed(target) for label, curve in curves.items()}
    least = min(needed.values())
    options = [Option(label, needed[label], curve.at(least), curve.most) for label, curve in curves.items()]
    return sorted(options, key=lambda one: (one.bits, -one.most_db)), target


def told_db(kept: float) -> str:
    """``21.3 dB``, or that nothing is lost."""
    return "everything" if kept == inf else f"{kept:.1f} dB"


def tell_sides(question: str, options: Sequence[Option], target: float, plain: str) -> Answer:
    """Which side is best; ``plain`` is the one to take where it hardly matters."""
    if not options:
        return Answer(question, "nothing to tell", "no grid can be judged here.")
    first = options[0]
    text = f"{told_db(target)} take {first.bits:.2f} bits a weight {first.label}"
    if len(options) == 1:
        return Answer(question, _short(first), f"{text}; nothing else was looked at.", tuple(options))
    usual = next((one for one in options if one.label == plain), first)
    will_do = usual is not first and usual.bits <= (1 + NOTICEABLE) * first.bits
    named = [one for one in options[1:] if one is usual or options.index(one) < MOST_SIDES]
    text = ", ".join([text, *(_tell_side(one, first) for one in named)])
    return Answer(question, f"{_short(usual)} will do" if will_do else _short(first), f"{text}.", tuple(options))


def _short(side: Option) -> str:
    return side.label.removeprefix("with ")


def _tell_side(one: Option, first: Option) -> str:
    if not isfinite(one.bits):
        return f"and {one.label} {told_db(one.most_db)} are the most"
    instead = "" if one.kept_db != one.kept_db else f", or {told_db(one.kept_db)} with as many"
    return f"{one.bits:.2f} {one.label} ({100 * (one.bits / first.bits - 1):.0f} % more{instead})"
