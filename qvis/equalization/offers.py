r"""What a multiplication before a Linear would bring, and what it would cost.

Where nothing before a layer can take the inverse, as after a GELU or a normalization whose result goes elsewhere too,
what enters channel :math:`i` can be multiplied by :math:`s_i` by an operation of its own, and the layer's weights be
divided by it. With one grid for the layer, and with :math:`a_i = \max_o A_{oi}` and :math:`f_i = \sum_o F_{oi}`, its
damage is in proportion to :math:`\max_i (a_i / s_i)^2 \sum_i f_i s_i^2` (:mod:`qvis.equalization.scales`). With the
maximum held at 1, each :math:`s_i` is at least :math:`a_i`, and just that makes the sum least. With a grid for each
channel the best of :math:`a_i` to some powers is taken, so that what is promised is a lower bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qvis.analysis.study import Study
from qvis.equalization.scales import assess_scales
from qvis.equalization.sites import Sites
from qvis.equalization.terms import LayerTerm
from qvis.equalization.weighing import weigh_pairs
from qvis.layers import FloatArray, Graph
from qvis.noise import WeightGrid

POWERS = (1.0, 0.75, 0.5, 0.25)
WORTHWHILE = 0.01
"""An offer takes away at least this share of the model's damage. That is little, but once the worst layers are mended
it is the next ones that count."""


@dataclass(frozen=True)
class Offer:
    """A multiplication that could be inserted before a layer."""

    layer: str
    before: float
    """Predicted damage of rounding the layer's weights as they are now."""
    after: float
    """With the multiplication."""
    share: float
    """Which part of the model's predicted damage that takes away, 0 to 1."""
    multiplications: int
    """For one sample."""
    cost: float
    """The same as a share of the model's multiplications."""

    def __str__(self) -> str:
        return (
            f"{self.layer}: multiplying what enters it would take away {self.share:.0%} of the predicted damage, for "
            f"{self.multiplications:,} more multiplications a sample ({self.cost:.2%})"
        )


def find_offers(study: Study, sites: Sites, x: FloatArray, graph: Graph, grid: WeightGrid, total: float) -> list[Offer]:
    """The multiplications that would bring something, the most helpful one first.

    Parameters
    ----------
    study
        What is known of the model's layers.
    sites
        What can be scaled without.
    x
        The logarithms of the scales chosen for that, (count,).
    graph
        How data flows.
    grid
        What is equalized for.
    total
        The damage that is predicted with these scales.
    """
    found = []
    operations = sum(study.operations.values())
    for name in [layer.name for layer in study.layers if layer.name in sites.calls]:
        known, call = study.entering.get(name), sites.calls[name]
        if call.op != "linear" or known is None or np.any(sites.inputs[name] >= 0) or name in sites.multiplied:
            continue
        if len(graph.calls[name]) > 1 or len(sites.inputs[name]) != len(known.low):
            continue
        shift = np.append(x, 0.0)[sites.outputs[name], None]
        magnitude, importance = weigh_pairs(study, sites, name)
        before, after = _damages(magnitude * np.exp(shift), importance * np.exp(-2 * shift), grid)
        share = (before - after) / total if total > 0 else 0.0
        more = int(known.count / study.samples * len(known.low))
        if share >= WORTHWHILE:
            found.append(Offer(name, before, after, share, more, more / operations if operations else 0.0))
    return sorted(found, key=lambda offer: -offer.share)


def _damages(magnitude: FloatArray, importance: FloatArray, grid: WeightGrid) -> tuple[float, float]:
    """The damage of a layer without and with the best multiplication; (rows, columns)."""
    rows, columns = magnitude.shape
    term = LayerTerm("", np.full(rows, -1), np.arange(columns), magnitude, importance)
    largest = magnitude.max(axis=0, initial=0)
    logs = np.log(np.where(largest > 0, largest, largest.max(initial=0) or 1.0))
    powers = POWERS if grid.granularity == "channel" else POWERS[:1]
    tried = [assess_scales(power * logs, [term], [], grid.bits, grid.granularity) for power in powers]
    return tried[0].before.total, min(one.after.total for one in tried)
