"""Keeps what the damage to the output does not tell: that a mix of widths gives as many right answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from qvis.analysis.answers import Answers, Hits, compare
from qvis.analysis.mixing import Mixer
from qvis.analysis.study import Change
from qvis.analysis.widths import Mix
from qvis.layers import FloatArray
from qvis.noise import WeightGrid

NEAR = 2
"""A gentle mix has no layer further from one width for all than that."""

Within = Callable[[Sequence[FloatArray] | None], Mix]


class Keeper:
    """Sees to it that a mix gives no fewer right answers than one width for all layers of the same size does."""

    def __init__(
        self,
        mixer: Mixer,
        answers: Answers,
        within: Within,
        fits: Callable[[Mix], bool],
        by_class: Callable[[], Sequence[FloatArray]] | None,
    ) -> None:
        self.mixer = mixer
        self.answers = answers
        self.within = within
        """Gives the best mix within the limit that was asked for."""
        self.fits = fits
        """Whether a mix is within it."""
        self.by_class = by_class
        """Gives damages of what the outputs say of classes; None where nothing can be differentiated."""
        self.told: list[str] = []
        """What was tried, where it was needed."""
        self.replaced: Mix | None = None
        """The mix of least damage, where another one was taken."""
        self._hits: dict[tuple[WeightGrid, ...], Hits] = {}

    def hits(self, mix: Mix) -> Hits:
        """How often each answer is right with a mix."""
        key = tuple(mix.grids.values())
        if key not in self._hits:
            self._hits[key] = self.answers.hits(Change(mix.grids))
        return self._hits[key]

    @cached_property
    def exact(self) -> Hits:
        """The same with nothing rounded."""
        return self.answers.hits(Change())

    def uniform(self, size: int) -> Hits | None:
        """The same with one width for all layers, interpolated between the two nearest sizes; None beyond them."""
        mixes = self.mixer.uniform
        sizes = [mix.bytes for mix in mixes]
        if not sizes[0] <= size <= sizes[-1]:
            return None
        above = next(at for at, one in enumerate(sizes) if one >= size)
        below = above if sizes[above] == size else above - 1
        share = (size - sizes[below]) / max(1, sizes[above] - sizes[below])
        return (1 - share) * self.hits(mixes[below]) + share * self.hits(mixes[above])

    def count(self, chosen: Mix) -> Mix:
        """The mix with its right answers counted."""
        hits, others = self.hits(chosen), self.uniform(chosen.bytes)
        return replace(chosen, accuracy=compare(hits, self.exact if others is None else others))

    def keep(self, chosen: Mix) -> Mix:
        """The mix itself where its answers are as good; else the best of several others that give more.

        Answers follow where the mix gives as many as one width for all layers of its size, or as the model in float,
        but for what chance may bring: one standard error of the difference.
        """
        counted, hits, others = self.count(chosen), self.hits(chosen), self.uniform(chosen.bytes)
        if others is None or not clearly(others, hits) or not clearly(self.exact, hits):
            return counted
        self.told.append(
            f"The mix of least damage gives {100 * hits.mean():.1f} % right answers, one width for all layers at equal"
            f" size {100 * others.mean():.1f} %. So others were tried:"
        )
        tried = [(what, mix, self.hits(mix)) for what, mix in self._others()]
        self.told += [f"{what}: {100 * found.mean():.1f} % right." for what, _, found in tried]
        better = [(mix, found) for _, mix, found in tried if clearly(found, hits)]
        if not better:
            self.told.append("None of them is clearly better.")
            return counted
        _, best = max(better, key=lambda one: float(one[1].mean()))
        as_good = [mix for mix, found in better if not clearly(best, found)]
        [found] = self.mixer.measure([min(as_good, key=lambda mix: mix.predicted)])
        self.told.append("The best of them was taken, by these same answers.")
        self.replaced = counted
        return self.count(found)

    def _others(self) -> Iterator[tuple[str, Mix]]:
        """Other mixes within the limit, and what they are made by."""
        mixer = self.mixer
        if self.by_class is not None:
            likely = self.by_class()
            middle = [np.sqrt(a * b) for a, b in zip(likely, mixer.damages, strict=True)]
            yield "least change of the likelihood of classes", self.within(likely)
            yield "half that, half the output", self.within(middle)
        narrower = mixer.alike(self.fits)
        if narrower:
            bits = round(narrower[-1].average_bits)
            held = self.within(mixer.near(bits, NEAR))
            yield f"least damage with no layer more than {NEAR} bits from {bits}", held
            yield f"{bits} bits for all layers", narrower[-1]


def clearly(hits: Hits, others: Hits) -> bool:
    """Whether there are more right answers than others, by more than one standard error of the difference."""
    return float(hits.mean() - others.mean()) > compare(hits, others).error
