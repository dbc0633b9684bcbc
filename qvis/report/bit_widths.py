"""The summary behind everything that shows a choice of bit widths: plain dicts, lists, numbers and words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from math import nan
from typing import Any

from qvis.analysis.widths import FLOAT_BYTES, Accuracy, BitWidths, LayerWidths, Mix, Option, Verified, stored_bytes
from qvis.exporting import FORMATS, export_widths
from qvis.layers import decibels
from qvis.noise import WeightGrid
from qvis.report.bit_widths_text import render_widths_markdown, tell_details
from qvis.report.cells import shorten
from qvis.report.document import SCHEMA_VERSION, Document, Sentence, plain
from qvis.report.report import DocumentReport
from qvis.report.sensitivity import significant
from qvis.version import __version__
from qvis.words import size

KIND = "bit_widths"
TOOLS = tuple(name for name in FORMATS if name not in ("json", "csv"))
"""Formats whose texts a document holds, for the chosen mix."""
LONGEST_TEXT = 400_000
"""Characters of such a text; a longer one is only written to a file."""
LONGEST_NOTE = 500
"""Characters of a note, which may name all layers."""
FIRST = 3
"""Details that stand right below the verdict."""


class WidthsReport(DocumentReport):
    """The page, the JSON and the Markdown of a choice of bit widths; made by :meth:`qvis.BitWidths.write`.

    Attributes
    ----------
    layers
        What each width would cost each layer, in the model's own order.
    """

    def __init__(self, found: BitWidths) -> None:
        super().__init__(summarize_widths(found))
        self.layers = list(found.layers)

    def to_html(self) -> str:
        """The page."""
        from qvis.report.bit_widths_page import render_widths

        return render_widths(self.document)

    def to_markdown(self) -> str:
        """The verdict and the chosen widths, for a pull request."""
        return render_widths_markdown(self.document)


def summarize_widths(found: BitWidths) -> Document:
    """Summarize a choice of widths."""
    table = _Grids(found)
    weights = sum(layer.weights for layer in found.layers)
    parameters = weights + found.rest_bytes // FLOAT_BYTES
    document: Document = {
        "schema_version": SCHEMA_VERSION,
        "qvis": __version__,
        "kind": KIND,
        "title": "Bit widths",
        "evidence": f"measured on {found.source}",
        "asked": found.asked,
        "model": {
            "name": found.name,
            "framework": found.framework,
            "parameters": parameters,
            "weights": weights,
        },
        "samples": found.samples,
        "sizes": {
            "bytes": found.bytes,
            "rest_bytes": found.rest_bytes,
            "float_bytes": FLOAT_BYTES * weights + found.rest_bytes,
        },
        "granularities": list(found.granularities),
        "grids": [{"bits": grid.bits, "granularity": grid.granularity} for grid in table.grids],
        "chosen": table.mix(found.chosen),
        "verified": _verified(found.verified),
        "corrected": list(found.corrected),
        "layers": [_layer(layer, found, table) for layer in found.layers],
        "frontier": [table.mix(mix) for mix in found.frontier],
        "uniform": [table.mix(mix) for mix in found.uniform],
        "exports": _exports(found),
        "notes": list(found.notes),
        "skipped": [asdict(skipped) for skipped in found.skipped],
    }
    return {**document, "verdict": _verdict(found, document)}


class _Grids:
    """All grids that layers were looked at on, or have in a mix, and the place of each."""

    def __init__(self, found: BitWidths) -> None:
        options = [option.grid for layer in found.layers for option in layer.options]
        mixes = (found.chosen, *found.frontier, *found.uniform)
        self.grids = list(dict.fromkeys([*options, *(grid for mix in mixes for grid in mix.grids.values())]))
        self.names = [layer.name for layer in found.layers]
        self._places = {grid: place for place, grid in enumerate(self.grids)}

    def place(self, grid: WeightGrid) -> int:
        return self._places[grid]

    def mix(self, mix: Mix) -> Document:
        measured = mix.measured
        return {
            "bytes": mix.bytes,
            "average_bits": significant(mix.average_bits, 6),
            "predicted_db": significant(mix.predicted_db, 6),
            "measured_db": significant(mix.measured_db, 6),
            "measured_spread_db": nan if measured is None else significant(measured.spread_db, 2),
            "accuracy": _accuracy(mix.accuracy),
            "grids": [self.place(mix.grids[name]) for name in self.names],
        }


def _accuracy(accuracy: Accuracy | None) -> Document | None:
    if accuracy is None:
        return None
    return {"share": significant(accuracy.share), "error": significant(accuracy.error, 2)}


def _verified(found: Verified) -> Document:
    return {
        "sqnr_db": significant(found.sqnr_db, 6),
        "spread_db": significant(found.spread_db, 2),
        "uniform_db": significant(found.uniform_db, 6),
        "gain_db": significant(found.gain_db, 6),
        "accuracy": _accuracy(found.accuracy),
        "uniform_accuracy": significant(found.uniform_accuracy),
        "float_accuracy": significant(found.float_accuracy),
        "answers": found.answers,
    }


def _layer(layer: LayerWidths, found: BitWidths, table: _Grids) -> Document:
    options = {option.grid: option for option in layer.options}
    grid = found.chosen.grids[layer.name]
    known = [options.get(one) for one in table.grids]
    return {
        "name": layer.name,
        "op": layer.op,
        "shape": list(layer.shape),
        "channels": layer.channels,
        "elements": layer.elements,
        "weights": layer.weights,
        "bits": grid.bits,
        "granularity": grid.granularity,
        "bytes": stored_bytes(layer.channels, layer.elements, grid),
        "damage_db": _decibels(options.get(grid)),
        "options": {
            "bytes": [stored_bytes(layer.channels, layer.elements, one) for one in table.grids],
            "damage": [nan if one is None else significant(one.damage) for one in known],
            "damage_db": [_decibels(one) for one in known],
            "spread": [nan if one is None else significant(one.spread, 2) for one in known],
        },
    }


def _decibels(option: Option | None) -> float:
    return nan if option is None else significant(decibels(1.0, option.damage), 6)


def _exports(found: BitWidths) -> list[Document]:
    """What tools are told of the chosen mix; none where the model's layers are not at hand."""
    if found.network is None:
        return []
    exports = []
    for name in TOOLS:
        written = export_widths(found.network, found.chosen.grids, name)
        notes, text = [shorten(note, LONGEST_NOTE) for note in written.notes], written.text
        if len(text) > LONGEST_TEXT:
            notes.insert(0, f"{size(len(text))} are too long to be shown; qvis bits --export {name}=FILE writes them")
            text = ""
        exports.append(
            {
                "format": name,
                "title": FORMATS[name],
                "file": f"widths_{name}{written.suffix}",
                "text": text,
                "notes": notes,
                "missing": dict(written.missing),
            }
        )
    return exports


def _verdict(found: BitWidths, document: Mapping[str, Any]) -> Document:
    text = f"{found.verdict[:1].lower()}{found.verdict[1:]}"
    evidence = document["evidence"]
    kept = f"{found.verified.sqnr_db:.1f} dB"
    before, kept, after = text.partition(kept)
    sentence: Sentence = [(f"{evidence[0].upper()}{evidence[1:]}: {before}", ""), (kept, "strong"), (after, "")]
    return {"sentence": sentence, "text": plain(sentence), "details": tell_details(document), "first": FIRST}
