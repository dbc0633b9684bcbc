"""What stands in the cells of a table in plain text: one set of columns for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Any

from qvis.report.document import Document
from qvis.words import count, percent, short, visible

SIGNS = {"ok": "○", "watch": "▲", "problem": "◆", "unusable": "✕"}
"""A shape for each severity, as on the page; always beside the word."""


@dataclass(frozen=True)
class Column:
    """One column of a table of layers."""

    title: str
    cell: Callable[[dict[str, Any]], str]
    """From a layer of the document to the text of its cell."""
    keep: int = 99
    """Where space is short, columns with the lowest number go first."""
    right: bool = False
    """Whether numbers stand here, flush right."""


def columns(document: Document) -> tuple[Column, ...]:
    """The columns that suit the document, without the severity, which each output shows in its own way."""
    if not is_changes(document):
        return LAYERS if document["sensitivity"] is None else SENSITIVITY
    name, *others = CHANGES
    renamed = any(layer["name_before"] != layer["name"] for layer in document["layers"])
    return (name, NAME_BEFORE, *others) if renamed else CHANGES


def is_changes(document: Document) -> bool:
    """Whether the document compares two models."""
    return bool(document["kind"] == "changes_after_optimization")


def ranked(document: Document) -> list[dict[str, Any]]:
    """The layers, worst first."""
    return sorted(document["layers"], key=lambda layer: int(layer["rank"]))


def left_out(document: Document) -> list[tuple[str, list[dict[str, str]]]]:
    """What the report says nothing about, under a heading each; nothing is left out in silence."""
    groups = [("Not compared", "layer", document.get("unmatched", [])), ("Not read", "tensor", document["skipped"])]
    return [(f"{heading}: {count(len(items), noun)}", items) for heading, noun, items in groups if items]


def shorten(text: str, width: int) -> str:
    """At most ``width`` characters, cut in the middle: the end of a layer's name tells most.

    >>> shorten("backbone.stages.3.blocks.11.conv", 20)
    'backbo…locks.11.conv'
    """
    if len(text) <= width:
        return text
    head = max(0, width - 1) // 3
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def severity(layer: dict[str, Any], signs: bool = True) -> str:
    """``◆ problem``, or ``◆ problem → ▲ watch`` where it changed."""
    levels = [layer["severity"]]
    if layer.get("severity_before", levels[0]) != levels[0]:
        levels.insert(0, layer["severity_before"])
    return " → ".join(f"{SIGNS[level]} {level}" if signs else level for level in levels)


def findings(layer: dict[str, Any]) -> str:
    """How many channels each finding is about: ``12 starved, 1 near dead``."""
    words = (
        ("nonfinite", "not finite"),
        ("starved", "starved"),
        ("outliers", "outlier"),
        ("near_dead", "near dead"),
        ("dead", "dead"),
    )
    flags = layer["flags"]
    return ", ".join(
        count(len(flags[kind]), word) if kind == "outliers" else f"{len(flags[kind])} {word}"
        for kind, word in words
        if flags[kind]
    )


def _name(layer: dict[str, Any]) -> str:
    return visible(layer["name"])


def _op(layer: dict[str, Any]) -> str:
    return visible(layer["op"])


def _shape(layer: dict[str, Any]) -> str:
    return "×".join(map(str, layer.get("after", layer)["shape"]))


def _noise(layer: dict[str, Any]) -> str:
    return percent(layer["noise_share"]) if isfinite(layer["noise_share"]) else "n/a"


def _of(layer: dict[str, Any], key: str, missing: Any) -> Any:
    """A figure of what quantization does to the output; a layer that was not run has none."""
    return missing if layer["sensitivity"] is None else layer["sensitivity"][key]


def _damage(layer: dict[str, Any], key: str) -> str:
    value = _of(layer, key, float("nan"))
    return percent(value) if isfinite(value) else "n/a"


def _damage_db(layer: dict[str, Any]) -> str:
    return _decibels(_of(layer, "damage_db", float("nan")))


def _at_first(layer: dict[str, Any], granularity: str) -> str:
    """The damage at the width that is judged."""
    figures = _of(layer, "weights", {}).get(granularity)
    value = figures["value"][0] if figures else float("nan")
    return percent(value) if isfinite(value) else "n/a"


def _relative(layer: dict[str, Any]) -> str:
    return short(layer["largest_relative_range"]) if isfinite(layer["largest_relative_range"]) else "n/a"


def _decibels(value: float) -> str:
    return "n/a" if value != value else "∞" if value > 1e9 else f"{value:.1f}"


def _gain(layer: dict[str, Any]) -> str:
    gain: float = layer["gain_db"]
    # a layer may have become worse, such as by a NaN, with the same noise
    if layer["verdict"] in ("same", "unchanged", "rounded") or not isfinite(gain) or abs(gain) < 0.05:
        return str(layer["verdict"])
    return f"{gain:+.1f} dB".replace("-", "−")


LAYERS = (
    Column("Layer", _name),
    Column("Op", _op, keep=5),
    Column("Shape", _shape, keep=4),
    Column("Rounding noise", _noise, right=True),
    Column("SQNR tensor", lambda layer: _decibels(layer["sqnr_tensor_db"]), keep=6, right=True),
    Column("SQNR channel", lambda layer: _decibels(layer["sqnr_channel_db"]), keep=7, right=True),
    Column("Relative range", _relative, keep=3, right=True),
    Column("Median levels", lambda layer: f"{layer['median_levels']:g}", keep=2, right=True),
    Column("Findings", findings, keep=1),
)
SENSITIVITY = (
    Column("Layer", _name),
    Column("Op", _op, keep=3),
    Column("Shape", _shape, keep=2),
    Column("Damage of weights", lambda layer: _damage(layer, "damage"), right=True),
    Column("Damage dB", lambda layer: _damage_db(layer), keep=8, right=True),
    Column("Per channel", lambda layer: _at_first(layer, "channel"), keep=6, right=True),
    Column("Damage of inputs", lambda layer: _damage(layer, "damage_inputs"), keep=7, right=True),
    Column("Sure", lambda layer: _of(layer, "confidence", "n/a"), keep=4),
    Column("Rounding noise", _noise, keep=1, right=True),
)
"""Where the model was run."""
NAME_BEFORE = Column("Layer before", lambda layer: shorten(visible(layer["name_before"]), 40), keep=5)
"""Only where an exporter renamed a layer."""
CHANGES = (
    Column("Layer", _name),
    Column("Op", _op, keep=4),
    Column("Shape", _shape, keep=3),
    Column("Change", _gain, right=True),
    Column("Noise before", lambda layer: _noise(layer["before"]), keep=6, right=True),
    Column("Noise after", lambda layer: _noise(layer["after"]), keep=7, right=True),
    Column("Range before", lambda layer: _relative(layer["before"]), keep=1, right=True),
    Column("Range after", lambda layer: _relative(layer["after"]), keep=2, right=True),
)
