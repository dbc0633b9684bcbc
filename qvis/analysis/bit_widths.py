"""Chooses a width for each layer: the mix of least damage to the output at a size, or the smallest for a damage."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, floor, isfinite, nan, prod
from typing import Any

import numpy as np

from qvis import adapters
from qvis.analysis.answers import Answers, why_no_answers
from qvis.analysis.keeping import Keeper
from qvis.analysis.mixing import Mixer
from qvis.analysis.preparing import Opened, cut, open_model, spread_passes
from qvis.analysis.rounding import checked_bits
from qvis.analysis.sensitivity import PROBES, SAMPLES, calibrate, check_whole, several
from qvis.analysis.study import Change, Study
from qvis.analysis.widths import FLOAT_BYTES, BitWidths, LayerWidths, Mix, Option, Verified, interpolate, stored_bytes
from qvis.data import load_batches
from qvis.errors import BadArgumentError
from qvis.layers import FloatArray, Network, Skipped
from qvis.noise import CACHE_BYTES, Estimate, Granularity, WeightGrid
from qvis.running import Track, silently
from qvis.words import listed_names

WIDTHS = (8, 7, 6, 5, 4, 3, 2)
GRANULARITIES: tuple[Granularity, ...] = ("tensor", "channel", 128, 64, 32)
"""What a table tells of each layer."""
POINTS = 8
"""Mixes of the frontier that are measured beside the one that was chosen."""
SHOWN = 64
"""Mixes of the frontier that are named."""
ANSWERS = 512
"""So many answers are counted at most, where there are labels."""
HELD = (1, 2)
"""So many bits at most from one width for all, in mixes that are tried where the best one brings no clear gain."""
ROUNDS = 4
"""So many times a mix is chosen anew where it is measured to miss the damage that was asked for."""
CLOSE_DB = 0.25
"""As near as that to the damage that was asked for is near enough."""


def bit_widths(
    model: Any,
    inputs: Any = None,
    *,
    average_bits: float | None = None,
    target_size: int | None = None,
    max_damage_db: float | None = None,
    example_inputs: Any = None,
    labels: Any = None,
    bits: Sequence[int] = WIDTHS,
    granularity: Granularity | Sequence[Granularity] = "channel",
    samples: int = SAMPLES,
    probes: int = PROBES,
    selected_layers: str | Sequence[str] | None = None,
    name: str | None = None,
    seed: int = 0,
    track: Track = silently,
) -> BitWidths:
    """Choose the width of each layer's weights.

    The damage of every layer at every width is predicted by the noise model (:mod:`qvis.noise`), and the mix that is
    best in sum is found exactly (:mod:`qvis.analysis.assignment`). It is then verified: the weights are rounded and the
    model is run, in several draws of the rounding, beside mixes of other sizes and one width for all layers. Where the
    samples have labels, answers are counted too; a mix with fewer right ones than one width for all at equal size is
    replaced, see :attr:`BitWidths.corrected`. The model is not changed.

    Parameters
    ----------
    model
        A ``torch.nn.Module``, a Keras or ONNX model, or the path of a file with one.
    inputs, example_inputs
        Data to run it on, or instead the shapes of its inputs; see :func:`qvis.sensitivity`.
    average_bits
        Give the layers so many bits for each weight on average, scales not counted. With several granularities: as
        many bytes as one width for all layers on the first of them.
    target_size
        Have all parameters take so many bytes at most; those that are not rounded take four each.
    max_damage_db
        Find the smallest mix with which the output keeps so many dB, measured: 20 lets rounding change the output by
        1 % of its power, 30 by 0.1 %.
    labels
        The classes of the samples, for counting right answers; those that come with the data by default.
    bits
        The widths to choose from, 2 to 16.
    granularity
        What shares a step: ``"tensor"``, ``"channel"``, a number of neighbours in a row such as 32, or several to
        choose from for each layer.
    samples, probes, selected_layers, name, seed, track
        See :func:`qvis.sensitivity`. Of samples with labels, up to 512 are answered. Layers that are not selected stay
        in float.

    Returns
    -------
    BitWidths
        Its ``bits`` are the widths by layer.

    Raises
    ------
    BadArgumentError
        Not exactly one of ``average_bits``, ``target_size`` and ``max_damage_db`` is given, it cannot be reached, or
        an argument is out of bounds.
    NotRunnableError
        The model can be read but not run.
    """
    for argument, number, least in (("samples", samples, 1), ("probes", probes, 1), ("seed", seed, 0)):
        check_whole(argument, number, least)
    widths = tuple(sorted({checked_bits(one) for one in several(bits)}, reverse=True))
    granularities = _checked_granularities(granularity)
    if not widths:
        raise BadArgumentError("bits: got none, expected at least one width such as 8")
    goal = Goal.of(average_bits=average_bits, target_size=target_size, max_damage_db=max_damage_db)
    opened = open_model(
        model,
        inputs,
        example_inputs,
        labels=labels,
        samples=samples,
        name=name,
        seed=seed,
    )
    whole = network = opened.ready.network
    if selected_layers is not None:
        network = adapters.select(network, selected_layers)
    opened = opened._replace(ready=replace(opened.ready, network=_without_broken(network)))
    search = Search(opened, widths, granularities, probes=probes, seed=seed, track=track)
    mixer = search.prepare(goal, whole)
    chosen = search.choose(mixer, goal)
    keeper = search.keeper(mixer, goal, inputs, labels)
    if keeper is not None:
        chosen = keeper.keep(chosen) if goal.kind != "max_damage_db" else keeper.count(chosen)
    return search.finish(mixer, goal, chosen, keeper)


def _without_broken(network: Network) -> Network:
    """The network with layers left out that no grid can hold; as it is where there are no others."""
    left_out = [layer.name for layer in network.layers if not np.isfinite(layer.weight).all()]
    sound = tuple(layer for layer in network.layers if layer.name not in left_out)
    if not left_out or not sound:
        return network
    skipped = [Skipped(name, "some of its weights are NaN or infinite") for name in left_out]
    return replace(network, layers=sound, skipped=(*network.skipped, *skipped))


def _checked_granularities(given: Any) -> tuple[Granularity, ...]:
    found = tuple(dict.fromkeys(several(given)))
    for one in found or ("none",):
        if one not in ("tensor", "channel") and (isinstance(one, bool) or not isinstance(one, int) or one < 1):
            raise BadArgumentError(
                f"granularity: got {one!r}, expected 'tensor', 'channel' or how many weights share a step, such as 32"
            )
    return found


@dataclass(frozen=True)
class Goal:
    """What was asked for: exactly one limit."""

    kind: str
    value: float

    @classmethod
    def of(cls, **given: float | None) -> Goal:
        """The one that was given."""
        known = {kind: value for kind, value in given.items() if value is not None}
        if len(known) != 1:
            got = "none of them" if not known else " and ".join(known)
            raise BadArgumentError(f"{', '.join(given)}: got {got}, expected exactly one")
        [(kind, value)] = known.items()
        least = "" if kind == "max_damage_db" else " above 0"
        real = isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and isfinite(value)
        if not real or (least and value <= 0):
            raise BadArgumentError(f"{kind}: got {value!r}, expected a number{least}")
        return cls(kind, float(value))

    def __str__(self) -> str:
        if self.kind == "average_bits":
            return f"{self.value:g} bits on average"
        if self.kind == "target_size":
            return f"at most {self.value:,.0f} bytes"
        return f"at least {self.value:g} dB of the output"


class Search:
    """Looks for the best mix of widths for one model."""

    def __init__(
        self,
        opened: Opened,
        widths: Sequence[int],
        granularities: Sequence[Granularity],
        *,
        probes: int,
        seed: int,
        track: Track,
    ) -> None:
        network, runner = opened.ready.network, opened.runner
        self.opened = opened
        self.granularities = tuple(granularities)
        self.widths = tuple(widths)
        self.probes, self.seed = probes, seed
        self.notes = list(opened.ready.notes)
        served = set(runner.layers)
        weights = sum(prod(layer.shape) for layer in network.layers if layer.name in served)
        looked_at = tuple(dict.fromkeys([*self.granularities, *GRANULARITIES]))
        if 4 * weights * len(looked_at) * len(self.widths) > CACHE_BYTES:
            looked_at = self.granularities
        self.study = Study(network, runner, opened.batches, self._grids(looked_at), track)
        if not self.study.layers:
            raise BadArgumentError(f"model: none of its {len(network.layers)} layers can be run on other weights")
        self.rest_bytes = FLOAT_BYTES * max(0, network.parameters - weights)

    def _grids(self, granularities: Sequence[Granularity]) -> list[WeightGrid]:
        return [WeightGrid(width, one) for one in granularities for width in self.widths]

    # -- look ---------------------------------------------------------------------------------------------------------

    def prepare(self, goal: Goal, whole: Network) -> Mixer:
        """Find out what every width costs every layer, and how far predictions are off."""
        calibrate(self.study, whole, locally=False)
        if not self.opened.runner.differentiable:
            self.study.grids = tuple(self._grids(self.granularities))  # each of them has to be tried
        layers = self._tell(self._damages())
        mixer = Mixer(self.study, layers, self.granularities, self.seed)
        near = {floor(goal.value), ceil(goal.value)} if goal.kind == "average_bits" else set()
        mixer.measure_uniform(sorted({*self.widths, *(width for width in near if 2 <= width <= 16)}))
        return mixer

    def _damages(self, *, classes: bool = False) -> Estimate:
        """The damage of each layer on each grid."""
        study = self.study
        if self.opened.runner.differentiable:
            passes = spread_passes(study.batches, self.probes, self.seed)
            study.differentiate(passes, self.seed, entering=False, classes=classes)
            return study.predict_weights()
        changes = [Change({layer.name: grid}) for layer in study.layers for grid in study.grids]
        found = np.array(study.measure(changes)).reshape(len(study.layers), len(study.grids))
        return Estimate(found, np.zeros_like(found))

    def _tell(self, found: Estimate) -> list[LayerWidths]:
        layers = []
        for layer, damages, spreads in zip(self.study.layers, found.damage, found.spread, strict=True):
            channels, elements = self.study.weights[layer.name].shape
            bare = LayerWidths(layer.name, layer.op, layer.shape, channels, elements, ())
            options = [
                Option(grid, stored_bytes(channels, elements, grid), float(damage), float(spread))
                for grid, damage, spread in zip(self.study.grids, damages, spreads, strict=True)
            ]
            layers.append(replace(bare, options=tuple(options)))
        idle = [layer.name for layer in layers if not any(one.damage for one in layer.options)]
        if idle:
            self.notes.append(
                f"Rounding {listed_names(idle)} does nothing to the output on these inputs, as predicted."
            )
        return layers

    # -- choose -------------------------------------------------------------------------------------------------------

    def choose(self, mixer: Mixer, goal: Goal) -> Mix:
        """The best mix within the limit, measured."""
        if goal.kind == "max_damage_db":
            return self._smallest(mixer, goal.value)
        [found] = mixer.measure([self.within(mixer, goal)])
        narrower = mixer.alike(partial(self.fits, goal))
        if not narrower or mixer.gain(narrower[-1], found).is_real:
            return found
        # few dB are left, and predictions do not hold: keep nearer to one width for all, and see
        bits = round(narrower[-1].average_bits)
        held = [self.within(mixer, goal, mixer.near(bits, away)) for away in HELD]
        return max([found, *mixer.measure(held), narrower[-1]], key=lambda mix: mix.measured_db)

    def within(self, mixer: Mixer, goal: Goal, damages: Sequence[FloatArray] | None = None) -> Mix:
        """The mix of least damage within a limit of the size."""
        if goal.kind == "average_bits":
            return mixer.within_bits(goal.value, damages)
        least = sum(int(sizes.min()) for sizes in mixer.bytes) + self.rest_bytes
        if goal.value < least:
            raise BadArgumentError(
                f"target_size: got {goal.value:,.0f}, expected at least {least:,}: what all layers take at "
                f"{min(self.widths)} bits, and {self.rest_bytes:,} bytes of numbers that are not rounded"
            )
        return mixer.within_bytes(goal.value - self.rest_bytes, damages)

    def fits(self, goal: Goal, mix: Mix) -> bool:
        """Whether a mix is within a limit of the size."""
        if goal.kind == "average_bits":
            return mix.average_bits <= goal.value * (1 + 1e-9)
        return mix.bytes + self.rest_bytes <= goal.value

    def _smallest(self, mixer: Mixer, kept_db: float) -> Mix:
        """The smallest mix that is measured to keep so many dB."""
        wanted = 10 ** (-kept_db / 10)
        [best] = mixer.measure([mixer.least()])
        if best.measured_db < kept_db:
            raise BadArgumentError(
                f"max_damage_db: got {kept_db:g}, but with all layers at {max(self.widths)} bits the output keeps "
                f"{best.measured_db:.1f} dB; ask for less, or give more bits or a finer granularity"
            )
        limit = wanted
        for _ in range(ROUNDS):
            [found] = mixer.measure([mixer.within_damage(limit)])
            assert found.measured is not None
            if found.measured_db >= kept_db and found.bytes < best.bytes:
                best = found
            if 0 <= found.measured_db - kept_db <= CLOSE_DB:
                break
            limit *= wanted / max(found.measured.mean, np.finfo(float).tiny)
        return best

    # -- answers ------------------------------------------------------------------------------------------------------

    def keeper(self, mixer: Mixer, goal: Goal, inputs: object, labels: object) -> Keeper | None:
        """Counts right answers, on more samples where there are more; None where no labels can be compared with."""
        batches, runner = self.opened.batches, self.opened.runner
        if batches[0].labels is None:
            return None
        why = why_no_answers(runner.run(batches[0]), batches)
        if why:
            self.notes.append(f"Answers were not counted: {why}.")
            return None
        with suppress(BadArgumentError):  # such as an iterator that gives its batches only once
            more = load_batches(inputs, labels=labels, samples=ANSWERS)
            if sum(batch.size for batch in more) > self.study.samples and not why_no_answers(runner.run(more[0]), more):
                batches = cut(more)
        by_class = (lambda: mixer.select(self._damages(classes=True).damage)) if runner.differentiable else None
        return Keeper(
            mixer,
            Answers(self.study, batches, self.seed),
            partial(self.within, mixer, goal),
            partial(self.fits, goal),
            by_class,
        )

    # -- verify -------------------------------------------------------------------------------------------------------

    def finish(self, mixer: Mixer, goal: Goal, chosen: Mix, keeper: Keeper | None) -> BitWidths:
        """Measure mixes of other sizes, and put together what was found."""
        frontier = mixer.frontier(SHOWN)
        places = np.unique(np.linspace(0, len(frontier) - 1, POINTS).round().astype(int))
        tried = dict(zip(places, mixer.learn(mixer.measure([frontier[at] for at in places])), strict=True))
        frontier = [tried.get(at, mix) for at, mix in enumerate(mixer.predict(frontier))]
        network = self.opened.ready.network
        served = {layer.name for layer in mixer.layers}
        return BitWidths(
            name=network.name,
            framework=network.framework,
            layers=tuple(mixer.layers),
            chosen=chosen,
            verified=verify(mixer, chosen, keeper),
            frontier=tuple(frontier),
            uniform=mixer.uniform,
            asked=str(goal),
            granularities=self.granularities,
            corrected=() if keeper is None else tuple(keeper.told),
            replaced=None if keeper is None else keeper.replaced,
            rest_bytes=self.rest_bytes,
            samples=self.study.samples,
            source=self.opened.source,
            notes=tuple(dict.fromkeys([*self.notes, *self.opened.runner.notes])),
            skipped=(
                *network.skipped,
                *(
                    Skipped(one.name, "cannot be run on other weights")
                    for one in network.layers
                    if one.name not in served
                ),
            ),
            network=network,
        )


def verify(mixer: Mixer, chosen: Mix, keeper: Keeper | None) -> Verified:
    """What was measured of a mix, beside one width for all layers at equal size."""
    assert chosen.measured is not None
    sizes = np.array([mix.bytes for mix in mixer.uniform], dtype=np.float64)
    uniform = interpolate(chosen.bytes, sizes, np.array([mix.measured_db for mix in mixer.uniform]))
    found = Verified(chosen.measured_db, chosen.measured.spread_db, uniform)
    if keeper is None or chosen.accuracy is None:
        return found
    others = keeper.uniform(chosen.bytes)
    return replace(
        found,
        accuracy=chosen.accuracy,
        uniform_accuracy=nan if others is None else float(others.mean()),
        float_accuracy=float(keeper.exact.mean()),
        answers=keeper.answers.count,
    )
