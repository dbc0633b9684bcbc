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

NEAR = 2
"""A gentle mix has no layer further from one width for all than that."""
FAR = 1e9
"""Times the damage of an option that is not to be taken."""

Within = Callable[[Sequence[FloatArray] | None], Mix]


class Keeper:
    """Sees to it that a mix gives no fewer right answers than one width for all layers of the same size does."""

    def __init__(
        self, mixer: Mixer, answers: Answers, within: Within, by_class: Callable[[], Sequence[FloatArray]] | None
    ) -> None:
        self.mixer = mixer
        self.answers = answers
        self.within = within
        """Gives the best mix within the limit that was asked for."""
        self.by_class = by_class
        """Gives damages of what the outputs say of classes; None where nothing can be differentiated."""
        self.told: list[str] = []
        """What was tried, where it was needed."""
        self._hits: dict[int, Hits] = {}

    def hits(self, mix: Mix) -> Hits:
        """How often each answer is right with a mix."""
        return self.answers.hits(Change(mix.grids))

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
        for at in (below, above):
            if at not in self._hits:
                self._hits[at] = self.hits(mixes[at])
        share = (size - sizes[below]) / max(1, sizes[above] - sizes[below])
        return (1 - share) * self._hits[below] + share * self._hits[above]

    def count(self, chosen: Mix) -> Mix:
        """The mix with its right answers counted."""
        hits, others = self.hits(chosen), self.uniform(chosen.bytes)
        return replace(chosen, accuracy=compare(hits, self.exact if others is None else others))

    def keep(self, chosen: Mix) -> Mix:
        """The mix itself where its answers are as good; else the one with the best answers of several."""
        hits, others = self.hits(chosen), self.uniform(chosen.bytes)
        if others is None:
            return replace(chosen, accuracy=compare(hits, self.exact))
        if hits.mean() >= others.mean():
            return replace(chosen, accuracy=compare(hits, others))
        self.told.append(
            f"The mix of least damage gives {hits.mean():.1%} right answers, one width for all layers at equal size "
            f"{others.mean():.1%}. So others were tried:"
        )
        best, most = chosen, hits
        for what, mix in self._others(chosen):
            found = self.hits(mix)
            self.told.append(f"{what}: {found.mean():.1%} right.")
            if found.mean() > most.mean():
                best, most = mix, found
        self.told.append(
            "None of them is better." if best is chosen else "The best of them was taken, by these same answers."
        )
        [best] = self.mixer.measure([best])
        against = self.uniform(best.bytes)
        return replace(best, accuracy=compare(most, self.exact if against is None else against))

    def _others(self, chosen: Mix) -> Iterator[tuple[str, Mix]]:
        """Other mixes within the limit, and what they are made by."""
        mixer, limit = self.mixer, chosen.bytes
        if self.by_class is not None:
            likely = self.by_class()
            middle = [np.sqrt(a * b) for a, b in zip(likely, mixer.damages, strict=True)]
            yield "least change of the likelihood of classes", self.within(likely)
            yield "half that, half the output", self.within(middle)
        narrower = [mix for mix in mixer.uniform if mix.bytes <= limit + len(mixer.layers)]
        if narrower:
            bits = round(narrower[-1].average_bits)
            held = [
                np.where([abs(one.grid.bits - bits) <= NEAR for one in own], cost, FAR * (1 + cost.max()))
                for own, cost in zip(mixer.options, mixer.damages, strict=True)
            ]
            yield f"least damage with no layer more than {NEAR} bits from {bits}", self.within(held)
            yield f"{bits} bits for all layers", narrower[-1]
