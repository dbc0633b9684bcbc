"""What would help a layer that quantization hurts: what each remedy would leave of the damage, or would cost."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from qvis.analysis.calibration import best, candidates
from qvis.analysis.damage import LayerSensitivity, Sensitivity
from qvis.layers import Analysis, Graph, LayerAnalysis, Node, Remedy, Severity, Thresholds, decibels
from qvis.words import listed, listed_names, percent

HOMOGENEOUS = {"relu", "leaky_relu", "prelu", "identity", "dropout", "max_pool", "avg_pool"}
"""Operations that a positive factor for each channel passes through."""
APPLYING = {"conv", "conv_transpose", "linear"}
WIDTHS = (4, 8, 16)
"""Widths that devices compute with."""


def find_remedies(layer: LayerAnalysis, analysis: Analysis) -> tuple[Remedy, ...]:
    """What would help a layer that needs help; nothing for one that does not.

    Without samples only what the weights tell is suggested.
    """
    if layer.severity not in (Severity.WATCH, Severity.PROBLEM):
        return ()
    free = [*_of_grid(layer, analysis), *_of_inputs(layer, analysis), *_of_neighbours(layer, analysis)]
    # what costs nothing first, but for what is known not to be enough
    free.sort(key=lambda remedy: hurts(remedy.damage, analysis.thresholds))
    return (*free, *_of_bits(layer, analysis), *_of_dead(layer), *_of_float(layer, analysis))


def _of_grid(layer: LayerAnalysis, analysis: Analysis) -> Iterator[Remedy]:
    known = _known(layer, analysis)
    if known is None:
        if layer.noise_share_channel < layer.noise_share / 4:
            left = decibels(1.0, layer.noise_share_channel)
            text = f"A grid per channel: a quarter of the channels would keep {left:.1f} dB or less."
            yield Remedy("per_channel", text)
        return
    if known[0].granularities[0] != "tensor":
        return
    own, shared = (known[1].damage(analysis.bits, one).value for one in ("channel", "tensor"))
    if hurts(shared, analysis.thresholds) and own < shared / 2:
        yield Remedy("per_channel", f"A grid per channel for its weights leaves {_left(own)}.", own)


def _of_inputs(layer: LayerAnalysis, analysis: Analysis) -> Iterator[Remedy]:
    """Another range for what enters, where that is what hurts."""
    known = _known(layer, analysis)
    if known is None or known[1].entering is None:
        return
    sensitivity, result = known
    damage = result.damage(analysis.bits, what="inputs").value
    if not hurts(damage, analysis.thresholds) or not sensitivity.passes:
        return
    chosen = best(candidates(result.entering.histogram, analysis.bits, sensitivity.differentiated))  # type: ignore[union-attr]
    if chosen is not None and chosen.damage < damage / 2:
        low, high = chosen.grid.ends
        clip = f"Clipping what enters to {low:.3g} to {high:.3g} ({chosen.method} calibration)"
        yield Remedy("clip", f"{clip} leaves {_left(chosen.damage)}.", chosen.damage)


def _of_bits(layer: LayerAnalysis, analysis: Analysis) -> Iterator[Remedy]:
    known = _known(layer, analysis)
    if known is None:
        return
    for what, words in (("weights", "weights"), ("inputs", "inputs")):
        damage = known[1].damage(analysis.bits, known[0].granularities[0], what).value
        if not hurts(damage, analysis.thresholds):
            continue
        # each bit more halves the step, and quarters the noise
        by_width = {bits: damage * 4.0 ** (analysis.bits - bits) for bits in WIDTHS if bits > analysis.bits}
        enough = (width for width, left in by_width.items() if not hurts(left, analysis.thresholds))
        bits = next(enough, max(by_width, default=0))
        if bits:
            yield Remedy("more_bits", f"{bits} bits for its {words} leave {_left(by_width[bits])}.", by_width[bits])


def _of_neighbours(layer: LayerAnalysis, analysis: Analysis) -> Iterator[Remedy]:
    folded = frozenset(norm for one in analysis.layers for norm in one.norms)
    others = [] if analysis.graph is None else neighbours(analysis.graph, layer.name, folded)
    if others:
        names = listed_names([repr(name) for name in others])
        yield Remedy("equalize", f"Equalize it with {names}: scaling their shared channels changes no output.")


def _of_dead(layer: LayerAnalysis) -> Iterator[Remedy]:
    dead = layer.flags.get("dead")
    if dead is not None and dead.size:
        whose = "its" if dead.size == 1 else "their"
        yield Remedy("prune", f"Prune {listed(dead)}: {whose} weights are zero, or as good as zero.")


def _of_float(layer: LayerAnalysis, analysis: Analysis) -> Iterator[Remedy]:
    known, weights = _known(layer, analysis), percent(layer.weights / max(1, _weights(analysis)))
    if known is None:
        yield Remedy("float", f"Leave it in float: {weights} of the weights.")
        return
    total = sum(one.operations for one in known[0].layers)
    share = known[1].operations / total if total else 0.0
    cost = f"{percent(share)} of the multiplications and {weights} of the weights"
    yield Remedy("float", f"Leave it in float: {cost} stay so, and its damage is gone.", 0.0)


def _weights(analysis: Analysis) -> int:
    return sum(layer.weights for layer in analysis.layers)


def _known(layer: LayerAnalysis, analysis: Analysis) -> tuple[Sensitivity, LayerSensitivity] | None:
    if analysis.sensitivity is None or layer.sensitivity is None:
        return None
    return analysis.sensitivity, layer.sensitivity


def hurts(damage: float, thresholds: Thresholds) -> bool:
    """Whether a damage deserves a look."""
    return bool(decibels(1.0, damage) < thresholds.watch_db)  # nothing is known of NaN


def _left(damage: float) -> str:
    return f"a damage of {percent(damage)} ({decibels(1.0, damage):.1f} dB)"


# ---------------------------------------------------------------------------------------------------------------------


def neighbours(graph: Graph, layer: str, folded: Collection[str] = ()) -> list[str]:
    """The layers that the channels of a layer could be equalized with (Nagel et al., arXiv 1906.04721, section 4.1).

    Between the two, every operation hands a positive factor on, and every result goes to one place only. A
    normalization does where it is one of those ``folded`` into weights.
    """
    calls = graph.calls.get(layer, ())
    if len(calls) != 1 or calls[0].op not in APPLYING:
        return []
    return [one for one in (_before(graph, calls[0], folded), _after(graph, calls[0], folded)) if one]


def _after(graph: Graph, node: Node, folded: Collection[str]) -> str:
    users = graph.users[node.name]
    while len(users) == 1 and _hands_on(users[0], folded):
        users = graph.users[users[0].name]
    return users[0].layer if len(users) == 1 and _applies_once(graph, users[0]) else ""


def _before(graph: Graph, node: Node, folded: Collection[str]) -> str:
    source = graph.by_name[node.inputs[0]] if node.inputs else node
    while _hands_on(source, folded) and source.inputs and len(graph.users[source.name]) == 1:
        source = graph.by_name[source.inputs[0]]
    single = source is not node and len(graph.users[source.name]) == 1
    return source.layer if single and _applies_once(graph, source) else ""


def _hands_on(node: Node, folded: Collection[str]) -> bool:
    return node.op in HOMOGENEOUS or (node.op == "batch_norm" and node.name in folded)


def _applies_once(graph: Graph, node: Node) -> bool:
    return node.op in APPLYING and len(graph.calls.get(node.layer, ())) == 1
