"""Equalizes a model: finds what can be scaled, chooses the scales, writes a copy, and proves it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from qvis import adapters
from qvis.analysis import analyze_network
from qvis.analysis.preparing import Ready, open_model, prepare
from qvis.analysis.rounding import checked_bits
from qvis.analysis.sensitivity import PROBES
from qvis.analysis.study import Study
from qvis.equalization.result import Equalization
from qvis.equalization.work import GRANULARITIES, Asked, Base, Work, choose, pairs_of
from qvis.errors import BadArgumentError
from qvis.noise import WeightGrid
from qvis.running import Track, silently

METHODS = ("noise", "square root")
MEANS = ("inputs", "analytic")
SAMPLES = 32


def equalize(
    model: Any,
    inputs: Any = None,
    *,
    example_inputs: Any = None,
    bits: int = 8,
    granularity: str = "tensor",
    activations: bool = False,
    method: str = "noise",
    replace_relu6: bool = False,
    multiply: str | Collection[str] = (),
    absorb_biases: bool = False,
    correct_biases: str | None = None,
    samples: int = SAMPLES,
    probes: int = PROBES,
    name: str | None = None,
    inplace: bool = False,
    seed: int = 0,
    track: Track = silently,
) -> Equalization:
    """Scale channels between the layers of a model so that rounding them does least damage to its output.

    What a layer multiplies its output channels by, the next one divides its input channels by: the model computes the
    same, and rounds better. The scales are those with the least damage by the noise model (:mod:`qvis.noise`); they are
    only kept where rounding is measured to do less damage, by more than chance, over draws of the rounding.
    Normalizations are folded first.

    Parameters
    ----------
    model
        A ``torch.nn.Module``, a Keras or ONNX model, or the path of a file with one.
    inputs
        Data to run it on; see :func:`qvis.sensitivity`. Without, inputs are made up like ``example_inputs``.
    example_inputs
        Inputs of which only shapes and types are used. Needed without data, but for the method ``"square root"``: with
        neither, that scales without running the model, and nothing is verified.
    bits, granularity
        The grid of the weights to equalize for: its width, and ``"tensor"`` or ``"channel"``.
    activations
        Make the damage of rounded activations small as well, and judge by both, at the same width.
    method
        ``"noise"``, or ``"square root"`` for the rule of Nagel et al. (arXiv 1906.04721, eq. 11), for comparison.
    replace_relu6
        Put ReLU in place of ReLU6 and of other clips from 0, through which nothing can be scaled. Kept only where it
        helps, what it changes in the outputs included.
    multiply
        Layers, by name or pattern, before which a multiplication may be inserted, or ``"offered"`` for those of
        :attr:`Equalization.offers`.
    absorb_biases
        Absorb high biases (the same paper, section 4.1.3), which makes the ranges of activations smaller; only with
        ``activations``, and kept only where it helps.
    correct_biases
        ``"inputs"`` or ``"analytic"``: take the mean of what rounding does out of the biases (section 4.2), by the
        means of what enters the layers when the model runs, or as its normalizations tell. For this one grid, and kept
        only where it helps.
    samples, probes, seed
        See :func:`qvis.sensitivity`.
    name
        What a report calls the model.
    inplace
        Write into the given model instead of a copy.
    track
        Shows how far the work has come.

    Raises
    ------
    NoGraphError
        How data flows through the model is not known.
    NotRunnableError
        The model cannot be run.
    BadArgumentError
        An argument is out of bounds, or two of them do not go together.
    """
    grid = WeightGrid(checked_bits(bits), granularity)
    known = {"granularity": (granularity, GRANULARITIES), "method": (method, METHODS)}
    known |= {"correct_biases": (correct_biases, MEANS)} if correct_biases is not None else {}
    for argument, (value, allowed) in known.items():
        if value not in allowed:
            raise BadArgumentError(f"{argument}: got {value!r}, expected one of {', '.join(map(repr, allowed))}")
    if absorb_biases and not activations:
        raise BadArgumentError(
            "absorb_biases: it makes the ranges of activations smaller, which are not rounded here; give "
            "activations=True too, or leave it out"
        )
    if multiply and method != "noise":
        raise BadArgumentError("multiply: it needs the noise model; give method='noise', or leave it out")
    asked = Asked(grid, activations, method, replace_relu6, multiply, absorb_biases, correct_biases, probes, seed)
    if inputs is None and example_inputs is None and method == "square root":
        return _scale_unseen(model, prepare(model, name=name), asked, inplace)
    opened = open_model(model, inputs, example_inputs, samples=samples, name=name, seed=seed)
    return Work(model, opened, asked, track).equalize(inplace)


def _scale_unseen(model: Any, ready: Ready, asked: Asked, inplace: bool) -> Equalization:
    """Scale by the square-root rule without running anything."""
    for argument, value in (("replace_relu6", asked.replace_relu6), ("correct_biases", asked.correct_biases)):
        if value:
            raise BadArgumentError(f"{argument}: whether it helps shows on inputs only; give inputs or example_inputs")
    base, network, grid = Base(model, ready), ready.network, asked.grid
    base.study = Study(network, adapters.runner(model, network), [], [grid], silently)
    sites = base.find_sites()
    (scales,) = choose(base, sites, asked)
    before = analyze_network(network, bits=grid.bits) if inplace else network
    new, notes = adapters.rewrite(model, network, base.numbers(sites, scales.factors), inplace=inplace)
    return Equalization(
        model=new,
        pairs=pairs_of(sites, scales.factors),
        skipped=list(sites.skipped),
        verification=None,
        found=len(sites.sites),
        accepted=bool(sites.sites),
        method=asked.method,
        bits=grid.bits,
        granularity=grid.granularity,
        activations=asked.activations,
        notes=(*ready.notes, *notes),
        sides=(before, adapters.read(new, name=f"{network.name} equalized")),
        source=model,
    )
