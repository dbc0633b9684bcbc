"""Compares grids for all layers of a model: tries them on the weights and, where it can be run, tells the damage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from qvis.analysis import fingerprint, trying
from qvis.analysis.blocks import pool
from qvis.analysis.damage import Damage
from qvis.analysis.frontier import beaten_by, best_first
from qvis.analysis.grids import GridComparison, GridResult, LayerGrids, add_up, same_everywhere
from qvis.analysis.preparing import Opened, Ready, spread_passes
from qvis.analysis.questions import answer_layer, answer_model
from qvis.analysis.sensitivity import calibrate
from qvis.analysis.study import UNSURE, Outcome, Study
from qvis.analysis.trying import Derivatives, Tried, spread_rows, try_layer
from qvis.errors import BadArgumentError
from qvis.layers import FloatArray, Layer, Network
from qvis.noise import WeightGrid, combine
from qvis.quantization.grids import Scheme
from qvis.running import Gradient, Track
from qvis.words import count, encodable, listed_names

SAMPLES = 64
PROBES = 4
"""How often each sample is differentiated at most, each time with other random numbers."""
KEPT_BYTES = 2**28
"""Derivatives by single weights are kept up to this size, for the estimate that knows how errors add up."""
MEASURED = 8
"""So many of the schemes are measured by running the model on weights that are rounded so."""
SHOWN_CHANNELS = 7
"""Channels of a layer that can be looked at, as long as there are few layers."""
MOST_SHOWN = 2000
"""Of all layers together, but for two of each."""


def find_grids(
    ready: Ready,
    schemes: Sequence[Scheme],
    *,
    opened: Opened | None = None,
    keep_db: float = 30.0,
    keep_total_db: float | None = None,
    left_out: Sequence[str] = (),
    seed: int = 0,
    progress: Callable[[Sequence[Layer]], Iterator[Layer]],
    track: Track,
) -> GridComparison:
    """Try all schemes on all layers of a model; :func:`qvis.compare_grids` says what the arguments mean.

    With ``opened`` the model is run; ``ready`` holds the layers that are looked at, which can be fewer.
    """
    network = ready.network
    study, notes = None, list(ready.notes)
    derivatives: dict[str, Derivatives] = {}
    if opened is not None:
        study = Study(network, opened.runner, opened.batches, [WeightGrid(8, "channel")], track)
        derivatives, outcome = differentiate(study, opened.ready.network, seed)
        notes += opened.runner.notes
    keep_total = keep_total_db if keep_total_db is not None else 20.0 if study is not None else keep_db
    layers: list[LayerGrids] = []
    passes: list[tuple[list[Tried], int]] = []
    most = max(2, min(SHOWN_CHANNELS, MOST_SHOWN // max(1, len(network.layers))))
    with pool() as workers:
        for layer in progress(network.layers):
            found, tried = try_layer(layer, schemes, derivatives.pop(layer.name, None), most, workers)
            if tried[0].diagonal.size:
                passes.append((tried, len(layers)))
            elif study is not None:
                found = replace(found, why_no_damage=_why(layer, study))
            layers.append(replace(found, keep_db=keep_db))
    for place, results in zip([at for _, at in passes], predict([tried for tried, _ in passes]), strict=True):
        one = layers[place]
        damages = [results[same] for same in one.same_as]
        known = zip(one.results, damages, strict=True)
        layers[place] = replace(one, results=tuple(replace(result, damage=damage) for result, damage in known))
    layers = [replace(layer, answers=answer_layer(layer)) for layer in layers]
    totals = [add_up(layers, place, scheme) for place, scheme in enumerate(schemes)]
    if study is not None:
        totals = measure_best(study, totals, keep_total, layers)
        unknown = [layer.name for layer in layers if layer.why_no_damage]
        if unknown and outcome.passes:
            notes.append(
                f"{count(len(unknown), 'layer')} judged by the weights alone: {listed_names(unknown)}. What rounding"
                " them does to the output is in the measured figures only."
            )
    sampled = [layer for layer in layers if layer.rows < layer.channels]
    if sampled:
        notes.append(
            f"{count(len(sampled), 'layer')} of more than {trying.TRIED:,} weights tried on some of the channels,"
            f" evenly spaced by their largest weight: {listed_names([layer.name for layer in sampled])}."
        )
    evidence = "from the weights alone"
    if opened is not None and study is not None:
        evidence = f"{'predicted from' if study.noise else 'measured on'} {opened.source}"
    found_grids = GridComparison(
        name=encodable(network.name),
        framework=network.framework,
        schemes=tuple(schemes),
        layers=tuple(layers),
        totals=tuple(totals),
        answers=(),
        evidence=evidence,
        keep_db=keep_db,
        keep_total_db=keep_total,
        parameters=network.parameters,
        passes=outcome.passes if study is not None else 0,
        notes=tuple(dict.fromkeys(notes)),
        left_out=tuple(left_out),
        skipped=tuple(replace(one, name=encodable(one.name)) for one in network.skipped),
        fingerprint=fingerprint(layers),
    )
    return replace(found_grids, answers=answer_model(found_grids))


def _why(layer: Layer, study: Study) -> str:
    if layer.name not in study.weights:
        return "it cannot be run on other weights"
    return "the model cannot be differentiated" if not study.runner.differentiable else "nothing was differentiated"


# ---------------------------------------------------------------------------------------------------------------------
# Running the model


def differentiate(study: Study, whole: Network, seed: int) -> tuple[dict[str, Derivatives], Outcome]:
    """Make the backward passes, and keep what is needed to judge any rounding."""
    if not study.layers:
        raise BadArgumentError("model: none of its layers can be run on other weights; leave the data out")
    calibrate(study, whole, locally=False)
    if not study.runner.differentiable:
        return {}, Outcome()
    passes = spread_passes(study.batches, PROBES, seed)
    numbers = KEPT_BYTES // 4 // len(study.layers) // len(passes)
    rows = {}
    for name, weight in study.weights.items():
        tried = spread_rows(weight, trying.TRIED)
        rows[name] = tried[spread_rows(weight[tried], numbers)]
    seen: dict[str, list[FloatArray]] = {name: [] for name in rows}
    sizes: dict[str, list[int]] = {name: [] for name in rows}

    def watch(gradient: Gradient, samples: int) -> None:
        known = np.nan_to_num(gradient.weight[rows[gradient.layer]], nan=0.0, posinf=0.0, neginf=0.0)
        seen[gradient.layer].append(known.astype(np.float32))
        sizes[gradient.layer].append(samples)

    outcome = study.differentiate(passes, seed, singly=True, entering=False, watch=watch)
    found = {}
    for name, noise in study.noise.items():
        if seen[name] and noise.each is not None:
            found[name] = Derivatives(
                noise.each, np.stack(noise.importance), rows[name], np.stack(seen[name]), np.array(sizes[name], float)
            )
            noise.each = None  # as large as the weights, and given on
    return found, outcome


def predict(tried: Sequence[Sequence[Tried]]) -> list[list[Damage]]:
    """The damage of each scheme to each layer, by both estimates; see :func:`qvis.noise.combine`."""
    if not tried:
        return []
    diagonal, projected = (
        np.stack([np.stack([getattr(one, which) for one in layer], axis=1) for layer in tried])
        for which in ("diagonal", "projected")
    )
    found = combine(diagonal, projected)
    coarse = np.array([[one.coarse for one in layer] for layer in tried])
    spread = np.where(coarse, np.maximum(found.spread, UNSURE), found.spread)
    return [
        [Damage(float(d), float(s)) for d, s in zip(*rows, strict=True)]
        for rows in zip(found.damage, spread, strict=True)
    ]


def measure_best(
    study: Study, totals: Sequence[GridResult], keep_db: float, layers: Sequence[LayerGrids]
) -> list[GridResult]:
    """The totals with the damage of some measured, by running the model on all layers rounded so.

    Always the one that comes first as far as is known, until one that is measured does; likewise the first that runs on
    integers; then those on the frontier that are next to what is to be kept.
    """
    found, same = list(totals), same_everywhere(layers)
    names = {layer.name for layer in layers}
    weights = {name: weight for name, weight in study.weights.items() if name in names}
    exact: list[list[FloatArray]] = []
    for step in study.track(range(MEASURED + 1), "Measuring the best grids"):
        if step == 0:
            exact = [study.runner.run(batch) for batch in study.batches]
            continue
        points = [one.point for one in found]
        order = best_first(points, keep_db)
        integers = [i for i in order if found[i].runs_on == "integers"]
        frontier = np.flatnonzero(beaten_by(points) < 0).tolist()
        near = sorted(frontier, key=lambda i: abs(found[i].kept_db - keep_db))
        wanted = [order[0], *integers[:1], *near]
        place = next((i for i in wanted if not _measured(found[same[i]])), None)
        if place is None:
            break
        rounded = {name: found[place].scheme.fit(weight).rounded() for name, weight in weights.items()}
        noise = [
            study.relative_noise(study.runner.run(batch, weights=rounded), outputs)
            for batch, outputs in zip(study.batches, exact, strict=True)
        ]
        measured = float(sum(noise)) / study.samples
        for i in (i for i in range(len(found)) if same[i] == same[place]):
            found[i] = replace(found[i], damage=replace(found[i].damage, measured=measured))
    return found


def _measured(one: GridResult) -> bool:
    return one.damage.measured == one.damage.measured
