"""A choice of bit widths, in the words of the tool that is to quantize so.

What each tool reads, and with which version that was tried, stands at its function. Names are put in as literals, so
that a name in a model cannot become code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from qvis.errors import BadArgumentError
from qvis.exporting.aimet import write_aimet
from qvis.exporting.onnxruntime import write_onnxruntime
from qvis.exporting.plain import write_csv, write_json
from qvis.exporting.torchao import write_torchao
from qvis.exporting.widths import Widths, by_reason, folded
from qvis.exporting.written import Written
from qvis.layers import Network
from qvis.noise import WeightGrid
from qvis.words import visible

FORMATS = {
    "json": "qvis' own JSON",
    "csv": "a table (CSV)",
    "aimet": "AIMET's encodings (JSON)",
    "torchao": "torchao (Python)",
    "onnxruntime": "ONNX Runtime (Python)",
}
"""What widths can be written for."""

_WRITERS: dict[str, Callable[[Widths], Written]] = {
    "json": write_json,
    "csv": write_csv,
    "aimet": write_aimet,
    "torchao": write_torchao,
    "onnxruntime": write_onnxruntime,
}


@dataclass(frozen=True)
class Exported:
    """A choice of bit widths, written for a tool."""

    text: str
    """What to put into a file, in UTF-8; empty where the tool cannot be told any of the layers."""
    suffix: str
    """What the file's name ends with, such as ``.json``."""
    notes: tuple[str, ...] = ()
    """By the names of layers: what is not in the text or differs from what was chosen, and why; then how to use it."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Why the tool cannot be told of layers that have a grid, by their names."""


def export_widths(
    network: Network,
    grids: Mapping[str, WeightGrid],
    format: str = "json",
    *,
    sizes: Mapping[str, int] | None = None,
) -> Exported:
    """Write down for a tool how many bits each layer's weights get. No file is written, and no framework imported.

    Parameters
    ----------
    network
        The model as it was read. For ``onnxruntime`` it needs its graph where layers are to stay in float, whose nodes
        have to be named.
    grids
        The grid of each layer that is rounded, of 2 to 16 bits; layers that are not in it stay in float.
    format
        A key of :data:`FORMATS`.
    sizes
        Bytes of layers, for ``json`` and ``csv``; by default those of packed codes with 16 bits for each scale, and
        four for each weight in float.

    Returns
    -------
    Exported
        The text and, by the names of layers, what could not be told.

    Raises
    ------
    BadArgumentError
        There is no such format, or a grid has bits or a granularity that do not exist.
    UnknownLayerError
        A name is none of the model's layers.
    """
    if format not in FORMATS:
        raise BadArgumentError(f"format: got {format!r}, expected one of {', '.join(FORMATS)}")
    widths = Widths.checked(network, grids, sizes)
    written = _WRITERS[format](widths)
    is_plain = format in ("json", "csv")
    told = [layer for layer, _ in widths.rounded() if layer.name not in written.missing]
    notes = (
        *(f"left out: {note}" for note in by_reason(written.missing)),
        *by_reason(written.changed),
        *([] if is_plain else by_reason(folded(told))),
        *(written.hints if written.text else ()),
    )
    text = written.text
    if written.suffix == ".py" and text:
        text = "".join(f"# {visible(note)}\n" for note in notes) + ("\n" if notes else "") + text
    return Exported(text, written.suffix, notes, written.missing)
