"""From the document of a benchmark to its page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from math import inf
from typing import Any

from qvis.report.benchmark_text import (
    changed_classes,
    class_change,
    first_of_each,
    model_columns,
    name_class,
    tell_relative,
    tell_worst,
    worst_layers,
)
from qvis.report.benchmark_verdict import (
    judge,
    known,
    name,
    sentence,
    share,
    tell_db,
    tell_operations,
    tell_point,
    tell_points,
    tell_share,
    tell_time,
    untimed,
)
from qvis.report.document import Document, jsonable
from qvis.report.frame import render_page
from qvis.words import count, percent, short, size

STYLES = ("table", "chart", "benchmark", "print")
SCRIPTS = ("chart", "sorting", "benchmark", "benchmark_tools")
FEW = 20
"""So many classes are all shown; of more, those that changed."""
ROWS = 2400
"""Rows of classes, and as many of layers, of all models together."""
SAMPLES = 200
"""Samples in a table, where there are no pictures."""


def render_benchmark(document: Document) -> str:
    """The page; the same bytes for the same document."""
    light = {key: value for key, value in document.items() if key != "changed"}
    light["variants"] = [
        {key: value for key, value in one.items() if key not in ("layers", "per_class")}
        | {"layers": [{key: value for key, value in layer.items() if key != "channels"} for layer in one["layers"]]}
        for one in document["variants"]
    ]
    sections = list(_sections(document))
    columns = model_columns(document)
    verdict = document["verdict"]
    return render_page(
        "benchmark.html.jinja",
        {
            **document,
            "verdict": {**verdict, "sentence": [(_unbroken(text), style) for text, style in verdict["sentence"]]},
        },
        styles=STYLES,
        scripts=SCRIPTS,
        data={"payload": json.dumps(jsonable(light), ensure_ascii=False, separators=(",", ":")).encode()},
        columns=columns,
        models=[
            _model(document, place, columns, {one["place"] for one in sections[1:] and sections})
            for place in _places(document)
        ],
        times=list(_times(document)),
        axes=list(_axes(document)),
        sections=sections,
        chosen=document["verdict"].get("variant", 0),
        samples=list(_samples(document)),
        pictured=any(one["picture"] for one in document["changed"]),
        methods=list(_methods(document)),
        untimed=[{"name": one["name"], "why": sentence(one["simulated"])} for one in untimed(document)],
        tell_point=tell_point,
    )


def _unbroken(text: str) -> str:
    """``text`` whose numbers stay on the line of what they are of."""
    return re.sub(
        r"\b(batch|thread|of) (?=\d)|(?<=\d) (?=threads?\b)", lambda found: found[0].replace(" ", "\u00a0"), text
    ).replace("top-1", "top\u20111")


def _places(document: Document) -> range:
    return range(len(document["variants"]))


def _model(document: Document, place: int, columns: list[Any], told: set[int]) -> dict[str, Any]:
    """A row of the table of models."""
    variant = document["variants"][place]
    cells = [(column.key, sort_key(column.value(variant)), column.cell(variant)) for column in columns]
    if variant["simulated"]:
        cells = [(key, value, "not timed" if key == "time" else text) for key, value, text in cells]
    return {
        "name": variant["name"],
        "engine": variant["engine"],
        "baseline": variant["is_baseline"],
        "told": place in told,
        "cells": cells,
    }


def sort_key(value: float) -> str:
    """What a cell sorts by; empty where nothing is known."""
    return "" if value != value else "1e308" if value == inf else f"{value:.6g}"


def _times(document: Document) -> Iterator[dict[str, Any]]:
    """All series of calls, those of the same batch and threads together."""
    for point in document["points"]:
        for variant in document["variants"]:
            for one in variant["latencies"]:
                if (one["batch"], one["threads"]) != (point["batch"], point["threads"]):
                    continue
                ratio = one["ratio"]
                yield {
                    "name": variant["name"],
                    "point": tell_point(one),
                    "order": one["batch"] * 10_000 + one["threads"],
                    "numbers": [
                        (sort_key(one["median_s"]), tell_time(one["median_s"])),
                        (sort_key(one["p90_s"]), tell_time(one["p90_s"])),
                        (sort_key(one["per_second"]), short(one["per_second"])),
                    ],
                    "ratio": "" if ratio is None else sort_key(ratio["value"]),
                    "relative": tell_relative(ratio) or ("—" if variant["is_baseline"] else "n/a"),
                    "judged": "" if ratio is None else judge(ratio),
                }


def _axes(document: Document) -> Iterator[tuple[str, str]]:
    """What the chart can show over the size: its name in scripts, and in words."""
    variants = document["variants"]
    if len(variants) < 2:
        return
    if document["points"]:
        yield "time", "Time of a call"
    for key, title in (("top1", "Top-1"), ("top5", "Top-5"), ("agreement", "Agreement")):
        if any(share(one, key) is not None for one in variants):
            yield key, title
    if any(known(one["sqnr_db"]) for one in variants):
        yield "kept", "Output kept"


# ---------------------------------------------------------------------------------------------------------- one model


def _sections(document: Document) -> Iterator[dict[str, Any]]:
    """What is told of each model alone; of the baseline only where there is no other."""
    variants = document["variants"]
    rows = ROWS // max(1, len(variants) - 1)
    for place, variant in enumerate(variants):
        if variant["is_baseline"] and len(variants) > 1:
            continue
        classes, told = _classes(variant, rows)
        layers = worst_layers(variant)
        contents = variant["contents"]
        yield {
            "place": place,
            "name": variant["name"],
            "classes": classes,
            "classes_note": told,
            "layers": [_layer(one) for one in layers[: max(FEW, rows)]],
            "layers_left": max(0, len(layers) - max(FEW, rows)),
            "no_layers": sentence(variant["no_layers"]) if variant["no_layers"] else "",
            "operations": tell_operations(contents)
            if contents is not None and known(contents["integer_operations"])
            else "",
            "leftovers": [] if contents is None else contents["leftovers"],
            "types": "" if contents is None else _types(contents["bytes_by_type"]),
            "notes": [sentence(one) for one in (*variant["notes"], *([] if contents is None else contents["notes"]))],
        }


def _types(sizes: Mapping[str, int]) -> str:
    """``int8: 20 kB (90 %), float32: 2 kB (10 %)``."""
    whole = sum(sizes.values()) or 1
    told = sorted(sizes.items(), key=lambda item: -item[1])
    return ", ".join(f"{kind}: {size(number)} ({percent(number / whole)})" for kind, number in told)


def _classes(variant: Mapping[str, Any], most: int) -> tuple[list[dict[str, Any]], str]:
    """The rows of the classes, and what is to be said of those without one."""
    every, changed = variant["per_class"], changed_classes(variant)
    if every and not changed:
        return [], f"Of each of {len(every):,} classes as many answers are right as before."
    chosen = sorted(every, key=class_change) if len(every) <= FEW else changed[:most]
    largest = max((abs(class_change(one)) for one in chosen), default=0) or 1
    same, left = len(every) - len(changed), len(changed) - len(changed[:most])
    note = ""
    if len(every) > FEW and same:
        note = (
            f"{count(same, 'class').replace('classs', 'classes')} with as many right answers as before are left out. "
        )
    if left:
        note += f"{left:,} more that changed can be read in the JSON report."
    rows = [
        {
            "name": one["class"],
            "samples": one["samples"],
            "before": tell_share(one["right_before"] / max(1, one["samples"])),
            "before_value": sort_key(one["right_before"] / max(1, one["samples"])),
            "now": tell_share(one["right"] / max(1, one["samples"])),
            "now_value": sort_key(one["right"] / max(1, one["samples"])),
            "change": tell_points(class_change(one)),
            "change_value": sort_key(class_change(one)),
            "share": f"{50 * abs(class_change(one)) / largest:.4g}",
            "sign": "less" if class_change(one) < 0 else "more" if class_change(one) > 0 else "",
        }
        for one in chosen
    ]
    return rows, note.strip()


def _layer(layer: Mapping[str, Any]) -> dict[str, Any]:
    value = inf if layer["identical"] else layer["sqnr_db"]
    return {
        "name": layer["name"],
        "found": layer["found"] if layer["found"] != layer["name"] else "",
        "op": layer["op"],
        "kept": tell_db(layer),
        "value": sort_key(value),
        "worst": tell_worst(layer),
        "worst_value": sort_key(layer["worst_db"]),
    }


# ------------------------------------------------------------------------------------------------------------ samples


def _samples(document: Document) -> Iterator[dict[str, Any]]:
    """Samples that are answered differently: those with a picture, or where none has one the first of each model."""
    pictured = [one for one in document["changed"] if one["picture"]]
    for one in pictured or first_of_each(document, SAMPLES):
        yield {
            **{key: one[key] for key in ("index", "picture", "confidence")},
            "confidence_text": f"{one['confidence']:.2g}" if known(one["confidence"]) else "n/a",
            "label": name_class(document, one["label"]),
            "before": name_class(document, one["before"]),
            "right": one["label"] is not None and one["label"] == one["before"],
            "after": [
                {
                    "variant": after["variant"],
                    "name": document["variants"][after["variant"]]["name"],
                    "answer": name_class(document, after["answer"]),
                    "right": one["label"] is not None and one["label"] == after["answer"],
                }
                for after in one["after"]
            ],
        }


# ------------------------------------------------------------------------------------------------------------ methods


def _methods(document: Document) -> Iterator[tuple[str, str]]:
    """How it was measured, in terms and sentences."""
    variants = document["variants"]
    if document["machine"]:
        yield "Machine", document["machine"]
    engines: dict[str, list[str]] = {}
    for one in variants:
        engines.setdefault(one["engine"], []).append(name(one))
    if len(engines) == 1:
        yield "Engine", f"{next(iter(engines))}, for all models"
    else:
        yield "Engines", "; ".join(f"{engine}: {', '.join(names)}" for engine, names in engines.items())
    evidence = document["evidence"]
    yield "Inputs", f"{evidence[:1].upper()}{evidence[1:]}, the same for all models."
    calls = sorted({one["calls"] for variant in variants for one in variant["latencies"]})
    if calls:
        number = f"{calls[0]:,}" if calls[0] == calls[-1] else f"{calls[0]:,} to {calls[-1]:,}"
        text = f"{number} timed calls of each model after {count(document['warmup'], 'call')} that are not timed."
        if len(variants) > 1:
            text += " The models take turns in random order, so that what else the machine does hits all of them."
        yield "Times", text
    for one in untimed(document):
        yield "Not timed", f"{name(one)}: {sentence(one['simulated'])}"
    reasons: dict[str, list[str]] = {}
    for one in variants:
        if one["no_memory"]:
            reasons.setdefault(one["no_memory"], []).append(name(one))
    for reason, names in reasons.items():
        yield "No memory", f"{', '.join(names)}: {sentence(reason)}"
    for note in document["notes"]:
        yield "Note", sentence(note)
