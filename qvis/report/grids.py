"""Compares grids of numbers for the layers of a model, and writes the page, the JSON and the words that tell of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from os import PathLike
from typing import Any

import numpy as np

from qvis import adapters
from qvis.adapters import arrays
from qvis.analysis import Progress
from qvis.analysis.frontier import Answer
from qvis.analysis.gridding import SAMPLES, find_grids
from qvis.analysis.grids import GridComparison, GridResult, LayerGrids, Shown
from qvis.analysis.preparing import Opened, Ready, open_model, prepare
from qvis.analysis.schemes import LEFT_OUT, checked_schemes, default_schemes
from qvis.errors import BadArgumentError
from qvis.layers import FloatArray
from qvis.quantization.grids import Scheme
from qvis.report.document import SCHEMA_VERSION, Document, Sentence, plain
from qvis.report.report import DocumentReport
from qvis.report.sensitivity import significant
from qvis.running import Track, silently
from qvis.version import __version__
from qvis.words import size

UNKNOWN = (
    "Without data nothing is known of the output: the SQNR says how well a grid keeps the weights, and a layer that"
    " loses much of them can matter little. Give inputs, and the damage is told."
)


class GridReport(DocumentReport):
    """The result of :func:`qvis.compare_grids`: the findings, and the files that show them.

    Attributes
    ----------
    layers
        What each grid would do to each layer, in the model's own order.
    comparison
        All that was found.
    """

    def __init__(self, comparison: GridComparison) -> None:
        super().__init__(summarize_grids(comparison))
        self.comparison = comparison
        self.layers = list(comparison.layers)

    @property
    def problematic_layers(self) -> list[LayerGrids]:
        """The layers for which no grid that was looked at keeps as much as was asked for."""
        return [layer for layer in self.layers if layer.best is None and layer.frontier]

    def to_html(self) -> str:
        """The page."""
        from qvis.report.grids_page import render_grids

        return render_grids(self.document)

    def to_markdown(self) -> str:
        """The answers and the best grids, for a pull request."""
        from qvis.report.grids_text import render_grids_markdown

        return render_grids_markdown(self.document)


def compare_grids(
    model: Any,
    out_dir: str | PathLike[str],
    *,
    schemes: Sequence[Scheme] | None = None,
    inputs: Any = None,
    example_inputs: Any = None,
    selected_layers: str | Sequence[str] | None = None,
    keep_db: float = 30.0,
    samples: int = SAMPLES,
    fold: bool = True,
    name: str | None = None,
    formats: Sequence[str] = ("html",),
    channel_axis: int | Mapping[str, int] | None = None,
    seed: int = 0,
    progress: Progress = iter,
    track: Track = silently,
) -> GridReport:
    """Write ``grids.html``: what each kind of grid would do to each layer, for choosing one.

    Uniform or not, per tensor, channel or group, how many bits: for the model and for each layer the answers with their
    numbers, every scheme with its size and what it keeps, and the levels on the distribution of the weights.

    Parameters
    ----------
    model
        A ``torch.nn.Module``, a Keras, ONNX or exported model, or the path of a file or folder; or weights alone, as an
        array with its channels along axis 0 or a mapping of such by name. It is not changed.
    out_dir
        The folder to write to; made when missing.
    schemes
        The grids to compare: :class:`qvis.quantization.grids.Scheme`. By default those of
        :func:`qvis.analysis.schemes.default_schemes`, at 8, 6, 4, 3 and 2 bits.
    inputs, example_inputs
        Data to run the model on, or else the shapes of its inputs; see :func:`qvis.sensitivity`. Then grids are judged
        by the damage that they do to the output: predicted, and for those that matter most measured on all layers at
        once. By default the model is not run, and the SQNR of the weights is all there is to go by.
    selected_layers
        Names or glob patterns (``"features.*"``); all layers by default.
    keep_db
        How many dB a layer is to keep, of the output where the model is run and of its weights elsewhere. The best grid
        is the smallest that does. Where the model is run all layers together are to keep 10 dB less, since their
        damages add up.
    samples
        Take so many of the data at most.
    fold
        Judge weights with normalizations folded in, where the model's graph is known: those are quantized.
    name
        What the report calls the model.
    formats
        Any of ``"html"``, ``"json"`` and ``"md"``.
    channel_axis
        For a bare checkpoint or arrays, the axis of the output channels: of all tensors, or by name or pattern.
    seed
        Of the random numbers of the backward passes.
    progress, track
        Wrap the layers, and the steps of running the model, to show how far the work has come.

    Raises
    ------
    UnsupportedModelError
        The model, or a tensor in it, cannot be read.
    NotRunnableError
        There are inputs, but the model can only be read, such as a bare checkpoint.
    UnknownLayerError
        An entry of ``selected_layers`` matches nothing.
    BadArgumentError
        An argument is out of bounds, or is no scheme.
    OutputError
        The folder cannot be written, or holds a file of that name that qvis did not write.
    """
    chosen = default_schemes() if schemes is None else checked_schemes(schemes)
    if isinstance(keep_db, bool) or not isinstance(keep_db, (int, float)) or not 0 < keep_db < 200:
        raise BadArgumentError(f"keep_db: got {keep_db!r}, expected a number of dB above 0 and below 200")
    for argument, number, least in (("samples", samples, 1), ("seed", seed, 0)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise BadArgumentError(f"{argument}: got {number!r}, expected a whole number of {least} or more")
    opened: Opened | None = None
    if arrays.handles(model):
        if inputs is not None or example_inputs is not None:
            raise BadArgumentError("inputs: arrays of weights cannot be run on data; give the model, or leave it out")
        network = arrays.read(model, name)
        if channel_axis is not None:
            network = replace(network, layers=adapters.turn(network, channel_axis))
        ready = Ready(network)
    elif inputs is not None or example_inputs is not None:
        opened = open_model(model, inputs, example_inputs, samples=samples, fold=fold, name=name, seed=seed)
        ready = opened.ready
    else:
        ready = prepare(model, fold=fold, name=name, channel_axis=channel_axis)
    if selected_layers is not None:
        ready = replace(ready, network=adapters.select(ready.network, selected_layers))
    found = find_grids(
        ready,
        chosen,
        opened=opened,
        keep_db=float(keep_db),
        left_out=LEFT_OUT if schemes is None else (),
        seed=seed,
        progress=progress,
        track=track,
    )
    return GridReport(found).write(out_dir, formats)


# ---------------------------------------------------------------------------------------------------------------------
# The document


def summarize_grids(found: GridComparison) -> Document:
    """The comparison as plain values; described under "The JSON report"."""
    sentence = _verdict(found)
    return {
        "schema_version": SCHEMA_VERSION,
        "qvis": __version__,
        "kind": "grids",
        "title": "Grids",
        "evidence": found.evidence,
        "judged_by": "damage" if found.ran else "sqnr",
        "keep_db": found.keep_db,
        "keep_total_db": found.keep_total_db,
        "model": {
            "name": found.name,
            "framework": found.framework,
            "parameters": found.parameters,
            "weights": sum(layer.weights for layer in found.layers),
            "fingerprint": found.fingerprint,
        },
        "verdict": {
            "text": plain(sentence),
            "sentence": sentence,
            "details": [*_advice(found), *found.notes, *found.left_out],
        },
        "passes": found.passes,
        "answers": [_answer(one) for one in found.answers],
        "schemes": _schemes(found),
        "layers": [_layer(layer, found) for layer in found.layers],
        "notes": list(found.notes),
        "left_out": list(found.left_out),
        "skipped": [asdict(one) for one in found.skipped],
    }


def _verdict(found: GridComparison) -> Sentence:
    """Which grid to take for all layers, and what that rests on."""
    best = found.ranked[0]
    if best.error != best.error:
        return [("There is nothing to round: no layer has a weight other than zero.", "")]
    label = found.labels[found.schemes.index(best.scheme)]
    takes = f"{best.bits_per_weight:.2f} bits a weight ({size(best.bytes)})"
    of = "the output" if found.ran else "the weights of the mean layer"
    measured = best.damage.confidence == "measured"
    evidence = found.evidence.replace("predicted from", "measured on") if measured else found.evidence
    kept = f"{best.kept_db:.1f} dB of {of}" if best.error else f"all of {of}"
    if best.error <= 10 ** (-found.keep_total_db / 10):
        first = [(label, "strong"), (f" is the smallest grid that keeps {found.keep_total_db:g} dB: with {takes} ", "")]
        return [*first, (f"{kept} are left, {evidence}.", "")]
    return [
        (f"No grid keeps {found.keep_total_db:g} dB of {of}; the best is ", ""),
        (label, "strong"),
        (f" with {takes}: {kept} are left, {evidence}.", ""),
    ]


def _advice(found: GridComparison) -> list[str]:
    """What the verdict has to be read with."""
    best, integers = found.ranked[0], [one for one in found.ranked if one.runs_on == "integers"]
    lines = []
    if best.error == best.error and best.runs_on != "integers" and integers:
        other = integers[0]
        kept = f"{other.kept_db:.1f} dB" if other.error else "all"
        how = ", measured" if other.damage.confidence == "measured" else ""
        lines.append(
            "Of the grids whose codes integer engines multiply as they are, the first is"
            f" {found.labels[found.schemes.index(other.scheme)]}: {other.bits_per_weight:.2f} bits a weight,"
            f" {kept}{how}."
        )
    return lines if found.ran else [*lines, UNKNOWN]


def _answer(one: Answer) -> Document:
    options = [
        {
            "label": option.label,
            "bits_per_weight": significant(option.bits),
            "kept_db": significant(option.kept_db),
            "most_db": significant(option.most_db),
        }
        for option in one.options
    ]
    return {"question": one.question, "short": one.short, "text": one.text, "options": options}


def _schemes(found: GridComparison) -> list[Document]:
    """Each scheme with what it does to the whole model."""
    places = {id(one): rank for rank, one in enumerate(found.ranked, 1)}
    made = []
    for place, (scheme, label, total) in enumerate(zip(found.schemes, found.labels, found.totals, strict=True)):
        by, same = int(found.beaten[place]), found.same_as[place]
        made.append(
            {
                "label": label,
                **asdict(scheme),
                "runs_on": total.runs_on,
                "block_bits": scheme.block_bits,
                "rank": places[id(total)],
                "bytes": total.bytes,
                "bits_per_weight": significant(total.bits_per_weight),
                "sqnr_db": significant(total.sqnr_db),
                "kept_db": significant(total.kept_db),
                **_damage(total),
                "beaten_by": None if by < 0 else found.labels[by],
                "same_as": None if same == place else found.labels[same],
            }
        )
    return made


def _damage(one: GridResult) -> Document:
    known = one.damage
    return {
        "damage": significant(known.value),
        "predicted": significant(known.predicted),
        "spread": significant(known.spread, 2),
        "measured": significant(known.measured),
        "confidence": known.confidence if known.value == known.value else None,
    }


def _layer(layer: LayerGrids, found: GridComparison) -> Document:
    best = layer.best
    order = {id(one): rank for rank, one in enumerate(layer.ranked, 1)}
    return {
        "name": layer.name,
        "op": layer.op,
        "shape": list(layer.shape),
        "dtype": layer.dtype,
        "channels": layer.channels,
        "elements": layer.elements,
        "weights": layer.weights,
        "nonfinite": layer.nonfinite,
        "rows": layer.rows,
        "judged_by": layer.judged_by,
        "why_no_damage": layer.why_no_damage,
        "best": None if best is None else found.labels[found.schemes.index(best.scheme)],
        "answers": [_answer(one) for one in layer.answers],
        "grids": {
            "rank": [order[id(one)] for one in layer.results],
            "bytes": [one.bytes for one in layer.results],
            "bits_per_weight": [significant(one.bits_per_weight) for one in layer.results],
            "sqnr_db": [significant(one.sqnr_db) for one in layer.results],
            "damage": [significant(one.damage.value) for one in layer.results],
            "spread": [significant(one.damage.spread, 2) for one in layer.results],
            "confidence": [_damage(one)["confidence"] for one in layer.results],
            "beaten_by": [None if by < 0 else int(by) for by in layer.beaten],
            "same_as": list(layer.same_as),
        },
        "shown": [_shown(one) for one in layer.shown],
    }


def _shown(one: Shown) -> Document:
    return {
        "channel": one.channel,
        "low": significant(one.low, 6),
        "high": significant(one.high, 6),
        "counts": one.counts.tolist(),
        "scales": _rounded(one.scales),
        "zeros": _rounded(one.zeros),
        "codebooks": {str(place): _rounded(levels) for place, levels in one.codebooks.items()},
    }


def _rounded(values: FloatArray) -> list[float]:
    return [significant(float(one), 6) for one in np.asarray(values)]
