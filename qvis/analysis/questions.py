"""The three questions that a comparison of grids answers: uniform or not, what shares a scale, and how many bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qvis.analysis.frontier import Answer, Option, Point, best_first, tell_sides, told_db, weigh
from qvis.analysis.schemes import UNIFORM, label_schemes
from qvis.quantization.grids import Scheme
from qvis.words import size

if TYPE_CHECKING:
    from qvis.analysis.grids import GridComparison, GridResult, LayerGrids

QUESTIONS = ("Uniform or not?", "Per tensor, channel or group?", "How many bits?")
KINDS = {
    "uniform": "with uniform grids",
    "power_of_two": "with steps of powers of two",
    "offset": "with even steps off zero",
    "kmeans": "with k-means codebooks",
    "logarithmic": "with powers of two",
    "quantile": "with quantiles",
    "float8_e4m3fn": "with small floats",
    "float8_e5m2": "with small floats",
    "float4_e2m1": "with small floats",
}
"""How each kind is called in an answer."""
LOOKED_UP = ("k-means codebooks", "quantiles")


def answer_layer(layer: LayerGrids) -> tuple[Answer, ...]:
    """The answers for one layer."""
    if not layer.weights or layer.nonfinite == layer.weights:
        return _nothing("there are no numbers in it.")
    if all(one.error != one.error for one in layer.results):
        return _nothing("all its weights are zero, which any grid holds.")
    if not any(one.error > 0 for one in layer.results):
        return _nothing("no grid makes an error that counts.")
    return _answer(layer.results, layer.same_as, layer.keep_db)


def answer_model(found: GridComparison) -> tuple[Answer, ...]:
    """The answers for the whole model, all layers on one scheme."""
    if all(one.error != one.error for one in found.totals):
        return _nothing("there is no weight to judge by.")
    return _answer(found.totals, found.same_as, found.keep_total_db)


def _nothing(why: str) -> tuple[Answer, ...]:
    return tuple(Answer(question, "any", why) for question in QUESTIONS)


def _answer(results: Sequence[GridResult], same_as: Sequence[int], keep_db: float) -> tuple[Answer, ...]:
    results = [one for place, one in enumerate(results) if same_as[place] == place]
    kinds = _sides(results, lambda scheme: KINDS[scheme.kind])
    even = [one for one in results if one.scheme.kind in UNIFORM] or results
    shared = _sides(even, _share)
    uniform = tell_sides(QUESTIONS[0], *weigh(kinds, keep_db), KINDS["uniform"])
    if uniform.short in LOOKED_UP:
        uniform = replace(uniform, text=f"{uniform.text} Their codes are looked up: that saves memory, not arithmetic.")
    return (
        uniform,
        tell_sides(QUESTIONS[1], *weigh(shared, keep_db), "per channel"),
        _bits(results, keep_db),
    )


def _sides(results: Sequence[GridResult], side: Callable[[Scheme], str]) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for one in results:
        found.setdefault(side(one.scheme), []).append(one.point)
    return found


def _share(scheme: Scheme) -> str:
    if isinstance(scheme.granularity, str):
        return f"per {scheme.granularity}"
    return f"in groups of {scheme.granularity}"


def _bits(results: Sequence[GridResult], keep_db: float) -> Answer:
    """The width of the smallest grid that keeps enough, and what other widths keep at most."""
    labels = label_schemes([one.scheme for one in results])
    place = best_first([one.point for one in results], keep_db)[0]
    best = results[place]
    limit = 10 ** (-keep_db / 10)
    options = []
    for bits in sorted({one.scheme.bits for one in results}):
        known = [one for one in results if one.scheme.bits == bits and one.error == one.error]
        # not with codebooks that are larger than what they are for
        known = [one for one in known if one.bits_per_weight < 2 * bits] or known
        if known:
            enough = [one.bits_per_weight for one in known if one.error <= limit]
            most = max(one.kept_db for one in known)
            options.append(Option(f"{bits} bits", min(enough, default=float("inf")), most, most))
    own = f"{best.scheme.bits} bits"
    others = ", ".join(f"{told_db(one.most_db)} with {one.label}" for one in options if one.label != own)
    takes = f"{best.bits_per_weight:.2f} bits a weight with all that it takes, {size(best.bytes)}"
    kept = told_db(best.kept_db)
    if best.error <= limit:
        text = f"the smallest that keeps {keep_db:g} dB is {labels[place]} ({takes}, {kept})"
        answer = own
    else:
        text = f"none keeps {keep_db:g} dB; the best is {labels[place]} ({takes}, {kept})"
        answer = f"more than {max(one.scheme.bits for one in results)} bits"
    return Answer(QUESTIONS[2], answer, f"{text}; the best keep {others}." if others else f"{text}.", tuple(options))
