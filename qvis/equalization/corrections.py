r"""High biases absorbed, and biases corrected: what changes the function a little so that rounding does less damage.

*Absorption* (Nagel et al., arXiv 1906.04721, section 4.1.3): where nearly all that enters a ReLU lies above some
:math:`c > 0`, :math:`\mathrm{relu}(x) \approx \mathrm{relu}(x - c) + c`. So the layer before it adds :math:`c` less,
the layer after it :math:`W c` more, and the range of what lies between is smaller by :math:`c`.

*Correction* (the same, section 4.2): rounding moves what a layer puts out by :math:`\Delta W x`, whose mean
:math:`\Delta W\,E[x]` can be taken out of its bias.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from qvis import adapters
from qvis.analysis.study import Study, stretched
from qvis.equalization.expectations import expect
from qvis.equalization.flow import LAYERS
from qvis.equalization.sites import Sites
from qvis.equalization.trials import Trial, Trials
from qvis.folding import Folded, input_channels
from qvis.layers import FloatArray, Graph, Layer, Network, Node
from qvis.noise import round_weight
from qvis.rewriting import Rewriting

DEVIATIONS = 3
"""What lies more deviations below the mean of a normalization's result than this is taken to be rare."""

Vectors = dict[str, FloatArray]
"""By layer, numbers to add to its output channels, or the means of its input channels; (channels,)."""


class Biases:
    """Where numbers can be added to what layers put out: in their biases, or in normalizations that follow."""

    def __init__(self, network: Network, folded: Folded | None) -> None:
        self._layers = {layer.name: layer for layer in network.layers}
        folds = folded.folds if folded else ()
        self._norms = {fold.layer: fold.norm for fold in folds if fold.direction == "backward"}

    def __contains__(self, layer: str) -> bool:
        known = self._layers.get(layer)
        return layer in self._norms or (known is not None and _bias(known) is not None)

    def add(self, written: Rewriting, vectors: Mapping[str, FloatArray]) -> Rewriting:
        """The rewriting, with these numbers added to the outputs of layers."""
        biases, norms = dict(written.biases), dict(written.norms)
        for name, vector in vectors.items():
            own = _bias(self._layers[name])
            if own is not None:
                biases[name] = (biases[name] if name in biases else np.asarray(own(), np.float64)) + vector
            else:
                norm = norms[self._norms[name]]
                norms[norm.name] = replace(norm, shift=norm.shift + vector)
        return replace(written, biases=biases, norms=norms)


def _bias(layer: Layer) -> Callable[[], FloatArray] | None:
    """What the model itself holds."""
    return (layer.stored or layer).bias


# ---------------------------------------------------------------------------------------------------------------------
# Absorption


def absorb(
    trial: Trial,
    graph: Graph,
    sites: Sites,
    factors: FloatArray,
    folded: Folded | None,
    given: Study,
    biases: Biases,
) -> Vectors:
    """What to add to the outputs of layers so that high biases are absorbed by the layers that follow.

    Parameters
    ----------
    trial
        The scaled model.
    graph
        How data flows, with the normalizations as they were.
    sites, factors
        How it was scaled; (count,).
    folded
        What was folded into which layer.
    given
        What is known of the model before it was scaled.
    biases
        Where numbers can be added: what one layer takes away the next one must be able to give back.

    Returns
    -------
    dict
        By layer, (channels,). Empty where no bias is high.
    """
    norms = {fold.layer: fold.norm for fold in folded.folds if fold.direction == "backward"} if folded else {}
    found: Vectors = {}
    for name, call in sites.calls.items():
        source = _absorbable(graph, call)
        if source is None or name not in given.entering or norms.get(source.layer, "") != _norm_of(graph, call):
            continue
        if source.layer not in biases or name not in biases:
            continue
        low = given.entering[name].low
        if source.layer in norms:
            norm = graph.norms[norms[source.layer]]
            low = norm.shift - DEVIATIONS * np.abs(norm.scale)
        if len(low) != len(sites.inputs[name]):
            continue
        amount = np.maximum(low, 0) * np.append(factors, 1.0)[sites.inputs[name]]
        if amount.any():
            found[source.layer] = found.get(source.layer, 0) - amount
            found[name] = found.get(name, 0) + _through(trial.study.weights[name], amount, call)
    return found


def _absorbable(graph: Graph, call: Node) -> Node | None:
    """The node of the layer before a ReLU before a layer, where nothing else takes what lies between."""
    rectified = False
    node = call
    while node.inputs and len(graph.calls[call.layer]) == 1:
        node = graph.by_name[node.inputs[0]]
        if len(graph.users[node.name]) > 1 or len(node.inputs) > 1:
            return None
        if node.op in LAYERS and node.layer:
            return node if rectified and len(graph.calls[node.layer]) == 1 else None
        if node.op == "relu" and not rectified:
            rectified = True
        elif not (
            node.op in ("identity", "dropout")
            or (node.op == "batch_norm" and rectified)
            or (node.attributes.get("bias_of") and rectified)
        ):
            return None
    return None


def _norm_of(graph: Graph, call: Node) -> str:
    """The normalization between a layer and the ReLU before it; empty where there is none."""
    node = call
    while node.op != "relu":
        node = graph.by_name[node.inputs[0]]
    while node.op != "batch_norm" and node.op not in LAYERS:
        node = graph.by_name[node.inputs[0]]
    return node.name if node.op == "batch_norm" else ""


def _through(weight: FloatArray, inputs: FloatArray, call: Node) -> FloatArray:
    """What a layer makes of the same numbers everywhere; (input channels,) to (channels,)."""
    columns = input_channels(weight.shape, len(inputs), call)
    result: FloatArray = np.einsum("ij,ij->i", weight.astype(np.float64), inputs[columns])
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Correction


def find_means(how: str, given: Study, graph: Graph, sites: Sites, folded: Folded | None) -> Vectors:
    """The means of what enters the layers of a model before it is scaled, (input channels,) each.

    Parameters
    ----------
    how
        ``inputs``: as they were when the model ran; ``analytic``: as its normalizations tell, for the layers that
        normalized values enter.
    given
        What is known from running the model.
    graph, sites, folded
        The model.
    """
    if how == "inputs":
        known = given.entering.items()
        return {name: one.total / max(1, one.count) for name, one in known if name in sites.calls}
    forward = [fold.norm for fold in folded.folds if fold.direction == "forward"] if folded else []
    moments = expect(graph, without=forward)
    sources = {name: call.inputs[0] for name, call in sites.calls.items() if call.inputs}
    return {name: moments[source].mean for name, source in sources.items() if source in moments}


class Correction:
    """Takes the mean of what rounding does out of the biases of a scaled model."""

    def __init__(
        self, trials: Trials, trial: Trial, sites: Sites, factors: FloatArray, means: Vectors, biases: Biases
    ) -> None:
        self.trials = trials
        self.trial = trial
        self.calls = sites.calls
        self.biases = biases
        whole = np.append(factors, 1.0)
        wanted = {name: mean for name, mean in means.items() if len(mean) == len(sites.inputs.get(name, ()))}
        self.means = {name: mean * whole[sites.inputs[name]] for name, mean in wanted.items() if name in biases}
        """Of what enters the layers that can be corrected, scaled; (input channels,) each."""

    def written(self, stretch: Mapping[str, float] | None = None) -> Rewriting:
        """The numbers of the model, corrected for rounding with these steps."""
        vectors = {}
        for name, mean in self.means.items():
            weight = self.trial.study.weights[name]
            rounded = round_weight(weight, self.trials.grid, (stretch or {}).get(name, 1.0))
            vectors[name] = -_through(rounded - weight, mean, self.calls[name])
        return self.biases.add(self.trial.written, vectors)

    def damages(self) -> FloatArray:
        """The damage of rounding with corrected biases in each draw of the first round, (draws,).

        Each draw rounds to other steps, and is corrected for these.
        """
        trial, study, grid = self.trial, self.trial.study, self.trials.grid
        draws = self.trials.draws[: self.trials.once]
        inputs = {name: known.grids[0] for name, known in study.entering.items()} if self.trials.activations else {}
        noises = np.zeros(len(draws))
        model = None
        for index, (batch, stretch) in enumerate(self.trials.given.track(draws, "Measuring corrected biases")):
            written = self.written(stretch)
            rounded = {name: round_weight(one, grid, stretch[name]) for name, one in study.weights.items()}
            numbers = Rewriting(rounded, written.biases, written.norms)
            first = model is None
            model = adapters.rewrite(trial.model if first else model, trial.network, numbers, inplace=not first).model
            runner = adapters.runner(model, adapters.read(model))
            grids = {name: stretched(grid, stretch[name]) for name, grid in inputs.items()}
            outputs = runner.run(batch, grids=grids)
            noises[index] = study.relative_noise(outputs, self.trials.exact[index]) / batch.size
        return noises
