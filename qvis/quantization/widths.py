"""The width of each layer's weight: one for all, by name, or out of a file that ``qvis bits`` wrote."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from qvis import adapters
from qvis.errors import BadArgumentError, UnknownLayerError
from qvis.layers import Network
from qvis.quantization.methods import CELLS, FLOAT, Cell

Widths = int | str | PathLike[str] | Mapping[str, int]


def choose_widths(network: Network, cell: Cell, bits: Widths | None, exclude: str | Iterable[str]) -> dict[str, int]:
    """The width of each layer of the network, by name.

    Parameters
    ----------
    network
        The layers.
    cell
        Says which widths can be held; the first is the default.
    bits
        One for all layers, widths by names or patterns of layers, or the path of a JSON file with such. The rest has
        the default.
    exclude
        Names of layers or modules, or patterns; these stay in float.

    Raises
    ------
    BadArgumentError
        A width that cannot be held, or a file that is none of widths.
    UnknownLayerError
        A name that no layer has.
    """
    default = cell.bits[0]
    widths = {layer.name: default for layer in network.layers}
    if isinstance(bits, (str, PathLike)):
        bits = read_widths(Path(bits))
    if isinstance(bits, Mapping):
        for name, width in bits.items():
            _check(name, width, cell)
            widths.update(dict.fromkeys(_meant(network, name, "bits"), width))
    elif bits is not None:
        _check("", bits, cell)
        widths = dict.fromkeys(widths, bits)
    for name in [exclude] if isinstance(exclude, str) else list(exclude):
        widths.update(dict.fromkeys(_meant(network, name, "exclude"), FLOAT))
    if all(width == FLOAT for width in widths.values()):
        raise BadArgumentError("bits: every layer would stay in float; leave some to be quantized")
    return widths


def read_widths(path: Path) -> dict[str, int]:
    """Widths by name out of a JSON file: what ``qvis bits --export json=FILE`` writes, or plain ``{"name": width}``.

    A layer without a width stays in float.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadArgumentError(
            f"bits: {str(path)!r} cannot be read: {error.strerror}; give a number or a file"
        ) from error
    except ValueError as error:
        raise BadArgumentError(
            f"bits: {str(path)!r} is no JSON ({error}); write it with qvis bits --export json=FILE"
        ) from error
    try:
        layers = found["layers"] if found.get("format") == "qvis bit widths" else None
        if layers is None:
            return {str(name): FLOAT if width is None else width for name, width in found.items()}
        return {one["name"]: FLOAT if one["bits"] is None else one["bits"] for one in layers}
    except (AttributeError, KeyError, TypeError) as error:
        raise BadArgumentError(
            f'bits: {str(path)!r} holds no widths; expected what qvis bits --export json=FILE writes, or {{"layer": 4}}'
        ) from error


def _meant(network: Network, name: str, argument: str) -> list[str]:
    try:
        return [layer.name for layer in adapters.select(network, name).layers]
    except UnknownLayerError as error:
        raise UnknownLayerError(str(error).replace("selected_layers", argument, 1)) from error
    except BadArgumentError as error:
        raise BadArgumentError(f"{argument}: expected names of layers or patterns, not {name!r}") from error


def _check(name: str, width: object, cell: Cell) -> None:
    if type(width) is int and (width in cell.bits or (width == FLOAT and name)):
        return
    where = f"{name!r} has {width!r}" if name else f"got {width!r}"
    known = " or ".join(map(str, sorted(cell.bits)))
    others = [
        f"{other.method} to {other.suffix}"
        for other in CELLS
        if other.framework == cell.framework and width in other.bits
    ]
    way_out = f"; {others[0]} holds {width}" if others and type(width) is int else ""
    raise BadArgumentError(
        f"bits: {where}, and {cell.method} to {cell.suffix} holds {known}{', or 32 for float' if name else ''}{way_out}"
    )
