"""Which layer of one model is which layer of another: by name within a framework, by content across formats.

Exporters rename layers and permute the axes of kernels, so that across formats neither names nor shapes tell. What
stays is the set of weights of each output channel, in the order of the channels, and with it their statistics; rounding
to integers moves them a little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from qvis.layers import Analysis, FloatArray, LayerAnalysis, Skipped

SAME = 0.1
"""Two layers are taken for the same when their statistics differ by less than this, relative to their size."""
FOLDED = 0.03
"""The same where each channel is measured in its own standard deviation."""
STATISTICS = ("min", "q25", "q50", "mean", "q75", "max", "std")

Pair = tuple[LayerAnalysis, LayerAnalysis]


def match_layers(before: Analysis, after: Analysis) -> tuple[list[Pair], list[Skipped]]:
    """Pairs of layers in the order of the model after, and the layers that have no partner, with the reason.

    Layers of the same name, shape and channels are pairs. Where the frameworks differ, so are those of the same name
    and matrix (channels, elements), and of the others those whose channels have the same statistics within
    :data:`SAME` and that are each other's nearest; then those within :data:`FOLDED` but for a factor for each channel,
    which is what folding a BatchNorm leaves.
    """
    across = _family(before) != _family(after)
    old = {layer.name: layer for layer in before.layers}
    partners: dict[str, LayerAnalysis] = {}
    for layer in after.layers:
        same = old.get(layer.name)
        if same is not None and _alike(same, layer, across):
            partners[layer.name] = same
    if across:
        for mark, limit in ((_mark, SAME), (_scaled_mark, FOLDED)):
            taken = {same.name for same in partners.values()}
            free_old = [layer for layer in before.layers if layer.name not in taken]
            free_new = [layer for layer in after.layers if layer.name not in partners]
            partners.update(_nearest(free_old, free_new, mark, limit))
    taken = {same.name for same in partners.values()}
    unmatched = [
        Skipped(layer.name, _why_not(layer, old, across)) for layer in after.layers if layer.name not in partners
    ]
    named = {layer.name for layer in unmatched}
    unmatched += [
        Skipped(name, "only in the old model" if not across else "no layer of the new model has weights like these")
        for name in old
        if name not in taken and name not in named
    ]
    pairs = [(partners[layer.name], layer) for layer in after.layers if layer.name in partners]
    return pairs, unmatched


def _family(analysis: Analysis) -> str:
    lite = analysis.framework == "TensorFlow Lite"  # whose converter renames what TensorFlow calls otherwise
    return analysis.framework if lite else analysis.framework.split(" ")[0]


def _alike(old: LayerAnalysis, new: LayerAnalysis, across: bool) -> bool:
    """Whether two layers of one name have the same channels, as far as shapes tell."""
    if old.shape == new.shape:
        return old.channels == new.channels
    return across and _matrix(old) == _matrix(new)


def _matrix(layer: LayerAnalysis) -> tuple[int, int]:
    return layer.statistics.min.size, layer.statistics.elements


def _why_not(layer: LayerAnalysis, old: dict[str, LayerAnalysis], across: bool) -> str:
    if layer.name in old and old[layer.name].shape == layer.shape:
        return f"its channels were {old[layer.name].channels} and are {layer.channels}"
    if layer.name in old and not across:
        was, now = ("×".join(map(str, shape)) for shape in (old[layer.name].shape, layer.shape))
        return f"its shape was {was} and is {now}"
    return "no layer of the old model has weights like these" if across else "only in the new model"


def _nearest(
    old: Sequence[LayerAnalysis],
    new: Sequence[LayerAnalysis],
    mark: Callable[[LayerAnalysis], FloatArray],
    limit: float,
) -> dict[str, LayerAnalysis]:
    """Pairs that prefer each other; of several alike the one that comes first in its model."""
    marks = {id(layer): mark(layer) for layer in (*old, *new)}

    def closest(layer: LayerAnalysis, others: Sequence[LayerAnalysis]) -> LayerAnalysis | None:
        alike = [other for other in others if _matrix(other) == _matrix(layer)]
        distances = [_distance(marks[id(layer)], marks[id(other)]) for other in alike]
        return alike[int(np.argmin(distances))] if alike and min(distances) < limit else None

    found: dict[str, LayerAnalysis] = {}
    free_old, free_new = list(old), list(new)
    while True:
        pairs = [(layer, closest(layer, free_old)) for layer in free_new]
        mutual = [(layer, other) for layer, other in pairs if other is not None and closest(other, free_new) is layer]
        if not mutual:
            return found
        found.update({layer.name: other for layer, other in mutual})
        free_new = [layer for layer in free_new if layer.name not in found]
        used = {id(other) for _, other in mutual}
        free_old = [layer for layer in free_old if id(layer) not in used]


def _mark(layer: LayerAnalysis) -> FloatArray:
    table = np.stack([getattr(layer.statistics, name) for name in STATISTICS])
    return np.where(np.isfinite(table), table, 0.0)


def _scaled_mark(layer: LayerAnalysis) -> FloatArray:
    table = _mark(layer)
    deviation = table[STATISTICS.index("std")]
    scaled: FloatArray = np.divide(table, deviation, out=table.copy(), where=deviation > 0)
    return scaled


def _distance(one: FloatArray, other: FloatArray) -> float:
    size = float(np.linalg.norm(one) + np.linalg.norm(other)) / 2
    return float(np.linalg.norm(one - other)) / size if size > 0 else 0.0
