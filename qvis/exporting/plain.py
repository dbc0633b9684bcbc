"""The widths as plain data: for a script, and for a spreadsheet."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from qvis.exporting.widths import Widths, scales_of
from qvis.exporting.written import Written
from qvis.version import __version__
from qvis.words import encodable

VERSION = 1
"""Of the JSON; raised when a field changes its meaning or goes."""
COLUMNS = ("layer", "op", "shape", "weights", "bits", "granularity", "bytes")


def write_json(widths: Widths) -> Written:
    """The layers with their grids, and all scales of these."""
    document = {
        "format": "qvis bit widths",
        "version": VERSION,
        "qvis": __version__,
        "model": {"name": widths.network.name, "framework": widths.network.framework},
        "layers": [_record(widths, index) for index in range(len(widths.network.layers))],
    }
    return Written(json.dumps(document, indent=1, allow_nan=False) + "\n", ".json")


def _record(widths: Widths, index: int) -> dict[str, Any]:
    layer = widths.network.layers[index]
    grid = widths.grids.get(layer.name)
    return {
        "name": layer.name,
        "op": layer.op,
        "shape": list(layer.shape),
        "channels": layer.channels,
        "aliases": list(layer.aliases),
        "norms": list(layer.norms),
        "bits": None if grid is None else grid.bits,
        "granularity": None if grid is None else grid.granularity,
        "bytes": widths.bytes(layer),
        "scales": None if grid is None else scales_of(layer, grid).tolist(),
    }


def write_csv(widths: Widths) -> Written:
    """A row for each layer; bits are empty for one that stays in float."""
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    for layer in widths.network.layers:
        grid = widths.grids.get(layer.name)
        writer.writerow(
            [
                _text(layer.name),
                _text(layer.op),
                " x ".join(map(str, layer.shape)),
                layer.weight.size,
                "" if grid is None else grid.bits,
                "float" if grid is None else grid.granularity,
                widths.bytes(layer),
            ]
        )
    return Written(table.getvalue(), ".csv")


def _text(cell: str) -> str:
    """A cell that begins like a formula must stay text in a spreadsheet."""
    return encodable(f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else cell)
