"""The work of equalizing a model: its sites, ways to scale them, their trials, and what else was asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from qvis import adapters
from qvis.analysis import analyze_network
from qvis.analysis.damage import UNRELIABLE, Draws, Gain, Key
from qvis.analysis.preparing import Opened, Ready, place, prepare, spread_passes
from qvis.analysis.study import Study, average
from qvis.data import split
from qvis.equalization.corrections import Biases, Correction, absorb, find_means
from qvis.equalization.offers import Offer, find_offers
from qvis.equalization.result import KEPT, Equalization, Pair, Step, Verification
from qvis.equalization.scales import Scales, assess_scales, optimal_scales, power_of_two
from qvis.equalization.sites import Sites, find_sites, scaled
from qvis.equalization.square_root import square_root_scales
from qvis.equalization.trials import ROUNDS, Trial, Trials
from qvis.equalization.weighing import weigh_inputs, weigh_layers
from qvis.errors import BadArgumentError, NoGraphError
from qvis.layers import FloatArray, Graph, Network, Node
from qvis.noise import WeightGrid
from qvis.rewriting import Rewriting
from qvis.running import Runner, Track
from qvis.words import count

WIDTHS = (8, 6, 4)
GRANULARITIES = ("tensor", "channel")
NOISE = 3.0
"""So many times what folding alone changes in the outputs is still noise of the arithmetic."""
OFFERED = "offered"
"""In place of names: all that would bring something."""


@dataclass(frozen=True)
class Asked:
    """The arguments of :func:`equalize` that say how."""

    grid: WeightGrid
    activations: bool
    method: str
    replace_relu6: bool
    multiply: str | Collection[str]
    absorb_biases: bool
    correct_biases: str | None
    probes: int
    seed: int


def graph_of(network: Network) -> Graph:
    if network.graph is None:
        raise NoGraphError(f"model: it cannot be equalized, {network.no_graph.removeprefix('no graph: ')}")
    return network.graph


class Base:
    """A model that can be scaled: the given one, or one with clips exchanged."""

    study: Study
    """What is known of it from running it."""

    def __init__(self, model: Any, ready: Ready, unclipped: Collection[str] = ()) -> None:
        self.model = model
        self.ready = ready
        self.network = ready.network
        self.folded = ready.folded
        self.unclipped = unclipped
        self.graph = graph_of(ready.network)
        self.affines = adapters.affines(model)

    def find_sites(self, multiplied: Collection[str] = ()) -> Sites:
        """What can be scaled in it."""
        norms = frozenset(self.folded.norms) if self.folded else frozenset()
        return find_sites(self.graph, self.network, norms, self.affines, multiplied)

    def numbers(self, sites: Sites, factors: FloatArray) -> Rewriting:
        """Its numbers with these scales, and all normalizations folded."""
        folded = self.folded
        norms = dict(folded.norms) if folded else {}
        new = scaled(sites, factors, self.network.layers, {**self.graph.norms, **norms}, self.affines)
        weights = {**(folded.weights if folded else {}), **new.weights}
        return replace(new, weights=weights, norms={**norms, **new.norms})

    @cached_property
    def coarsest(self) -> str:
        """The type with the fewest digits that a layer is stored in; empty where all have as many as float32."""
        stored = {layer.dtype for layer in self.network.layers}
        return next((one for one in ("bfloat16", "float16") if one in stored), "")


def choose(base: Base, sites: Sites, asked: Asked) -> list[Scales]:
    """The scales that are asked for first, then those of the rule, which may do better where a prediction errs."""
    layers = weigh_layers(base.study, sites, base.graph)
    inputs = weigh_inputs(base.study, sites) if asked.activations else []
    found = []
    rule = square_root_scales(sites.count, layers, sweeps=1)  # the scales that AIMET would find
    if asked.method == "noise":
        found.append(optimal_scales(sites.count, layers, inputs, *asked.grid, start=rule))
    if not sites.multiplied:  # of which the rule knows nothing
        found.append(assess_scales(rule, layers, inputs, *asked.grid))
    if base.coarsest:  # powers of two are exact in any type
        found = [assess_scales(power_of_two(one.x), layers, inputs, *asked.grid) for one in found]
    return found


def tolerance(dtype: str) -> float:
    """How far outputs may move, relative to the largest, where numbers are stored in this type."""
    return {"bfloat16": 4 * 2.0**-7, "float16": 4 * 2.0**-10}.get(dtype, KEPT)


class Candidate(NamedTuple):
    """A way to scale a model, tried out."""

    base: Base
    sites: Sites
    scales: Scales
    trial: Trial


class Work:
    """One model on its way."""

    def __init__(self, model: Any, opened: Opened, asked: Asked, track: Track) -> None:
        self.opened = opened
        self.asked = asked
        self.track = track
        self.base = Base(model, opened.ready)
        self.given = self.base.study = self._study(self.base, opened.runner)
        self.trials = Trials(self.given, asked.grid, asked.activations, asked.seed)
        self.steps: list[Step] = []
        self.offers: list[Offer] = []

    def equalize(self, inplace: bool) -> Equalization:
        """Do it all."""
        self.given.calibrate(locally=False)
        found = self._best(self.base)
        if self.asked.replace_relu6:
            found = self._replace_clips(found)
        difference, relative = self.trials.compare(found.trial)
        is_kept = self._is_kept(found, relative)
        studies = (self.given, found.trial.study)
        accepted = bool(found.sites.sites) and is_kept and self.trials.gain(*studies).is_real
        proof = Verification(
            difference=difference,
            relative=relative,
            judged=(self.trials.assess(studies[0]), self.trials.assess(studies[1])),
            samples=self.given.samples,
            source=self.opened.source,
            measure=lambda: self._measure_widths(*studies),
        )
        if inplace:
            _ = proof.before  # the given model is not what it was afterwards
        kept = found if accepted else self._unscaled()
        written = self._correct(kept, self._absorb(kept))
        network = self.base.network
        side = analyze_network(network, bits=self.asked.grid.bits) if inplace else network
        model, notes = kept.trial.model, kept.trial.notes
        if inplace or written is not kept.trial.written:
            model, notes = adapters.rewrite(self.base.model, network, written, inplace=inplace)
        return Equalization(
            model=model,
            pairs=pairs_of(found.sites, found.scales.factors) if accepted else [],
            skipped=list(found.sites.skipped),
            verification=proof,
            found=len(found.sites.sites),
            accepted=accepted,
            function_kept=is_kept,
            method=self.asked.method,
            bits=self.asked.grid.bits,
            granularity=self.asked.grid.granularity,
            activations=self.asked.activations,
            predicted=(found.scales.before, found.scales.after),
            offers=[offer for offer in self.offers if offer.layer not in kept.sites.multiplied],
            steps=self.steps,
            notes=(*self.given.runner.notes, *self.opened.ready.notes, *notes),
            sides=(side, adapters.read(model, name=f"{network.name} equalized")),
            source=self.base.model,
            example=split(self.opened.batches[0], 1)[0],
        )

    def _is_kept(self, found: Candidate, relative: float) -> bool:
        """Whether outputs that change so much, relative to the largest, are those of the same function."""
        if found.base.unclipped:
            return True  # it may be another one: what that changes is part of the damage
        if relative <= tolerance(found.base.coarsest):
            return True
        # a deep model may be as sensitive as that to the last digit of its numbers
        return relative <= NOISE * self.trials.compare(self._unscaled().trial)[1]

    def _measure_widths(self, *studies: Study) -> tuple[Mapping[Key, Draws], Mapping[Key, Draws]]:
        """The damage of rounding the weights of two models to all that a report shows."""
        widths = dict.fromkeys((self.asked.grid.bits, *WIDTHS))
        grids = [WeightGrid(bits, granularity) for bits in widths for granularity in GRANULARITIES]
        before, after = (self.trials.assess_widths(study, grids) for study in studies)
        if not self.asked.activations:  # then more draws were made than for the others
            before, after = (
                {**one, self.asked.grid: self.trials.assess(s)} for one, s in zip((before, after), studies, strict=True)
            )
        return before, after

    def _study(self, base: Base, runner: Runner) -> Study:
        return Study(base.network, runner, self.opened.batches, [self.asked.grid], self.track)

    # -- scales -------------------------------------------------------------------------------------------------------

    def _best(self, base: Base) -> Candidate:
        """What is asked for; another way to scale where that does not help as predicted, and the other clearly does."""
        asked, study = self.asked, base.study
        if study.runner.differentiable:
            passes = spread_passes(self.opened.batches, asked.probes, asked.seed)
            study.differentiate(passes, asked.seed, singly=True, entering=asked.activations)
        elif asked.method == "noise":
            why = "; ".join(study.runner.notes)
            raise BadArgumentError(f"method: got 'noise', which needs derivatives ({why}); give 'square root'")
        sites = base.find_sites()
        ways = [(sites, scales) for scales in choose(base, sites, asked)]
        if asked.method == "noise":
            x, total = ways[0][1].x, ways[0][1].after.total
            possible = adapters.multipliable(base.model, base.network)
            offers = find_offers(study, sites, x, base.graph, asked.grid, total)
            self.offers = [offer for offer in offers if offer.layer in possible]
        if asked.multiply:
            sites = base.find_sites(self._to_multiply(base))
            ways = [(sites, scales) for scales in choose(base, sites, asked)] + ways
        first = self._try(base, *ways[0])
        gain = self.trials.gain(self.given, first.trial.study)
        if gain.is_real and first.scales.after.total < UNRELIABLE:
            return first  # as predicted; so the others are worse
        return self._choose([first, *(self._try(base, *way) for way in ways[1:])])

    def _choose(self, candidates: Sequence[Candidate]) -> Candidate:
        """The first, or one that is clearly better; with more draws where they do not tell whether it helps at all."""
        best = candidates[0]
        while True:
            for one in candidates[1:]:
                gain = self.trials.gain(best.trial.study, one.trial.study)
                best = one if gain.is_real else best
            if self.trials.rounds == ROUNDS or self.trials.gain(self.given, best.trial.study).is_clear:
                return best
            self.trials.rounds += 1

    def _to_multiply(self, base: Base) -> list[str]:
        """The layers before which a multiplication was asked for."""
        if self.asked.multiply == OFFERED:
            return [offer.layer for offer in self.offers]
        names = [layer.name for layer in adapters.select(base.network, self.asked.multiply).layers]
        for name in names:
            calls = base.graph.calls.get(name, ())
            if not calls or any(call.op != "linear" for call in calls):
                raise BadArgumentError(
                    f"multiply: {name!r} is no Linear that the model's graph shows; name layers of "
                    "Equalization.offers, or give 'offered'"
                )
        return names

    def _try(self, base: Base, sites: Sites, scales: Scales) -> Candidate:
        written = replace(base.numbers(sites, scales.factors), unclipped=base.unclipped)
        return Candidate(base, sites, scales, self._tried(written))

    def _unscaled(self) -> Candidate:
        """The model with its normalizations folded alone."""
        sites = self.base.find_sites()
        zero = np.zeros(sites.count)
        return self._try(self.base, sites, assess_scales(zero, [], [], *self.asked.grid))

    def _tried(self, written: Rewriting) -> Trial:
        return self.trials.try_out(self.base.model, self.base.network, written)

    # -- what changes the function ------------------------------------------------------------------------------------

    def _replace_clips(self, found: Candidate) -> Candidate:
        """The best with ReLU in place of clips, if that is better still, all that it changes included."""
        clips = _clips(self.base.graph)
        if not clips:
            self.steps.append(Step("ReLU6", False, "The model has no ReLU6 or other clip from 0."))
            return found
        model, notes = adapters.rewrite(self.base.model, self.base.network, Rewriting(unclipped=clips))
        ready = prepare(model, example=split(self.opened.batches[0], 2)[0])
        left = len(_clips(graph_of(ready.network)))
        what = f"ReLU in place of {count(len(clips) - left, 'clip')}" + f" of {len(clips)}" * (left > 0)
        if left == len(clips):
            self.steps.append(Step("ReLU6", False, " ".join((f"{what}.", *notes))))
            return found
        runner = adapters.runner(model, ready.network)
        base = Base(model, place(ready, model, runner, self.opened.batches[0]), clips)
        base.study = self._study(base, runner)
        base.study.calibrate(locally=False)
        other = self._best(base)
        others = (self.given, found.trial.study)
        better = all(self.trials.gain(one, other.trial.study).is_real for one in others)
        change = self.trials.compare(other.trial)[1]
        text = f"{what}: the outputs change by {change:.1e} of the largest before anything is rounded."
        self.steps.append(self._step("ReLU6", better, text, found.trial.study, other.trial.study))
        return other if better else found

    def _absorb(self, found: Candidate) -> Rewriting:
        """The numbers of the model with high biases absorbed, if that helps."""
        trial, base = found.trial, found.base
        if not self.asked.absorb_biases:
            return trial.written
        biases = Biases(base.network, base.folded)
        vectors = absorb(trial, base.graph, found.sites, found.scales.factors, base.folded, base.study, biases)
        if not vectors:
            self.steps.append(Step("absorption", False, "No bias is high enough to be absorbed by the next layer."))
            return trial.written
        written = biases.add(trial.written, vectors)
        other = self._tried(written)
        better = self.trials.gain(trial.study, other.study).is_real
        moved = f"Biases of {count(len(vectors), 'layer')} moved"
        text = f"{moved}: the outputs change by {self.trials.compare(other)[1]:.1e} of the largest."
        self.steps.append(self._step("absorption", better, text, trial.study, other.study))
        return written if better else trial.written

    def _correct(self, found: Candidate, written: Rewriting) -> Rewriting:
        """The numbers of the model with biases corrected for rounding, if that helps."""
        how, base = self.asked.correct_biases, found.base
        if how is None:
            return written
        trial = found.trial
        if written is not trial.written:
            trial = self._tried(written)
        means = find_means(how, base.study, base.graph, found.sites, base.folded)
        biases = Biases(base.network, base.folded)
        correction = Correction(self.trials, trial, found.sites, found.scales.factors, means, biases)
        if not correction.means:
            why = "no layer has both a bias and a known mean of what enters it"
            self.steps.append(Step("bias correction", False, f"Nothing to correct: {why}."))
            return written
        damages = self.trials.damages(trial.study)[: self.trials.once], correction.damages()
        better = Gain.of(*damages).is_real
        before, after = (average(one, self.trials.draws[: self.trials.once]) for one in damages)
        text = f"Biases of {count(len(correction.means), 'layer')} corrected for int{self.asked.grid.bits}."
        self.steps.append(Step("bias correction", better, text, before, after))
        return correction.written() if better else written

    def _step(self, kind: str, kept: bool, text: str, *studies: Study) -> Step:
        before, after = map(self.trials.assess, studies)
        return Step(kind, kept, text, before, after)


def _clips(graph: Graph) -> list[str]:
    """The clips from 0 to a number."""
    return [node.name for node in graph.nodes if node.op == "clip" and _is_bounded(node)]


def _is_bounded(node: Node) -> bool:
    high = node.attributes.get("high")
    return node.attributes.get("low") == 0 and high is not None and high > 0


def pairs_of(sites: Sites, factors: FloatArray) -> list[Pair]:
    return [Pair(one.producers, one.consumers, one.through, factors[one.variables]) for one in sites.sites]
