"""From the document of a benchmark to Markdown and to the lines of a terminal, and what stands in all its tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, nan
from typing import Any

from qvis.report.benchmark_verdict import (
    judge,
    known,
    name,
    share,
    tell_db,
    tell_interval,
    tell_operations,
    tell_point,
    tell_points,
    tell_ratio,
    tell_share,
    tell_time,
)
from qvis.report.cells import shorten
from qvis.report.markdown import NAMED, ROWS, code, prose
from qvis.words import count, listed_names, percent, short, size, visible

Document = Mapping[str, Any]
NAME_WIDTH = 34
"""Of a name on the terminal."""
ON_TERMINAL = ("file", "operations", "time", "ratio", "top1", "agreement", "kept")
"""Columns there, unless all are asked for."""
OF_OTHERS = ("ratio", "agreement", "kept")
"""Columns that the baseline has nothing in."""
LINES = 5
"""Classes and layers of a model on the terminal, unless all are asked for."""


@dataclass(frozen=True)
class Column:
    """A column of the table of models."""

    key: str
    title: str
    value: Callable[[Document], float]
    """What it sorts by; NaN where it is not known."""
    tell: Callable[[Document], str]
    """The text of a known value."""
    about: str
    """What it means."""

    def cell(self, variant: Document) -> str:
        """The text of a cell."""
        value = self.value(variant)
        if value == value:
            return self.tell(variant)
        return "—" if variant["is_baseline"] and self.key in OF_OTHERS else "n/a"


def model_columns(document: Document) -> list[Column]:
    """The columns that some model has a value for, without its name."""
    columns = [
        Column("file", "File", _number("file_bytes"), _size("file_bytes"), "Bytes of the file"),
        Column(
            "parameters", "Parameters", _number("parameter_bytes"), _size("parameter_bytes"), "Bytes of the numbers"
        ),
        Column(
            "integers", "Integer bytes", _content("integer_bytes"), _percent("integer_bytes"), "Share of these bytes"
        ),
        Column(
            "operations",
            "Integer ops",
            _content("integer_operations"),
            _percent("integer_operations"),
            "Share of the operations that compute",
        ),
        Column("time", "Time", lambda one: _first(one, "median_s"), _time, "Median of a call"),
        Column("ratio", "Relative time", _ratio, _tell_ratio, "Relative to the baseline; below 1 is faster"),
        Column("memory", "Memory", _number("peak_bytes"), _size("peak_bytes"), "Peak of opening and running it"),
        Column("top1", "Top-1", _share("top1"), _tell_share("top1"), "Right answers"),
        Column("top5", "Top-5", _share("top5"), _tell_share("top5"), "The label is among the five largest scores"),
        Column("agreement", "Agreement", _share("agreement"), _tell_share("agreement"), "Answers as the baseline does"),
        Column("kept", "Output keeps", _kept, tell_db, "Power of the output relative to what changed in it"),
    ]
    return [one for one in columns if any(one.value(variant) == one.value(variant) for variant in document["variants"])]


def _number(key: str) -> Callable[[Document], float]:
    return lambda one: nan if one[key] is None else float(one[key])


def _size(key: str) -> Callable[[Document], str]:
    return lambda one: size(one[key])


def _content(key: str) -> Callable[[Document], float]:
    return lambda one: nan if one["contents"] is None else float(one["contents"][key])


def _percent(key: str) -> Callable[[Document], str]:
    return lambda one: percent(one["contents"][key])


def _share(key: str) -> Callable[[Document], float]:
    return lambda one: nan if share(one, key) is None else float(one["answers"][key])


def _tell_share(key: str) -> Callable[[Document], str]:
    return lambda one: tell_share(one["answers"][key])


def _first(variant: Document, key: str) -> float:
    return float(variant["latencies"][0][key]) if variant["latencies"] else nan


def _time(variant: Document) -> str:
    return tell_time(_first(variant, "median_s"))


def _ratio(variant: Document) -> float:
    found = variant["latencies"][0]["ratio"] if variant["latencies"] else None
    return nan if found is None else float(found["value"])


def _tell_ratio(variant: Document) -> str:
    return tell_relative(variant["latencies"][0]["ratio"])


def _kept(variant: Document) -> float:
    return inf if variant["identical"] else float(variant["sqnr_db"])


def tell_relative(ratio: Document | None) -> str:
    """``0.44 (0.41 to 0.47)``, and whether it is no faster; empty without a baseline."""
    if ratio is None or not known(ratio["value"]):
        return ""
    judged = judge(ratio)
    if judged == "unsure":
        return tell_ratio(ratio["value"])
    return f"{tell_ratio(ratio['value'])} ({tell_interval(ratio)}{', no faster' if judged == 'same' else ''})"


def tell_first(document: Document) -> str:
    """At which batch size and number of threads the first times are."""
    return tell_point(document["points"][0]) if document["points"] else ""


def name_class(document: Document, answer: int | None) -> str:
    """The name of a class, or its number where it has none."""
    classes: Sequence[str] = document["classes"]
    if answer is None:
        return ""
    return classes[answer] if 0 <= answer < len(classes) else str(answer)


def first_of_each(document: Document, most: int) -> Iterator[Document]:
    """Samples that are answered differently: of each variant its share of so many."""
    variants = document["variants"]
    left = [most // max(1, sum(bool(one["changed"]) for one in variants))] * len(variants)
    for sample in document["changed"]:
        if any(left[one["variant"]] > 0 for one in sample["after"]):
            yield sample
        for one in sample["after"]:
            left[one["variant"]] -= 1


def changed_classes(variant: Document) -> list[Document]:
    """Classes of which more or fewer are right, those that lost the most first."""
    changed = [one for one in variant["per_class"] if one["right"] != one["right_before"]]
    return sorted(changed, key=lambda one: (class_change(one), -one["samples"]))


def class_change(one: Document) -> float:
    """By how much the share of right answers rose."""
    change: float = (one["right"] - one["right_before"]) / max(1, one["samples"])
    return change


def worst_layers(variant: Document) -> list[Document]:
    """The layers, the one that lost the most first."""

    def key(layer: Document) -> float:
        value = layer["sqnr_db"]
        return value if known(value) else inf if layer["identical"] else -inf

    return sorted(variant["layers"], key=key)


def tell_worst(layer: Document) -> str:
    """The channel that lost the most: ``12.3 dB (channel 7)``."""
    if layer["worst_channel"] is None:
        return "n/a"
    told = tell_db({"sqnr_db": layer["worst_db"], "identical": layer["worst_db"] == inf})
    return told if told == "identical" else f"{told} (channel {layer['worst_channel']})"


def tell_leftover(leftover: Document) -> str:
    """``2 × SOFTMAX (float): a, b``."""
    names = listed_names([visible(one) for one in leftover["names"]])
    number = len(leftover["names"])
    return f"{number} × {visible(leftover['operation'])} ({leftover['arithmetic']}): {names}"


# ---------------------------------------------------------------------------------------------------------- markdown


def render_benchmark_markdown(document: Document) -> str:
    """The verdict and its evidence, all models, the times of calls, and what changed for the model it tells of."""
    verdict, variants = document["verdict"], document["variants"]
    parts = [
        f"<!-- qvis {document['qvis']} -->",
        f"**{prose(verdict['text'])}**",
        " ".join(prose(detail) for detail in verdict["details"]),
        _models(document),
    ]
    if any(one["latencies"] for one in variants):
        parts.append(_fold("Time of a call", _times(document)))
    chosen = variants[verdict["variant"]] if variants else None
    if chosen is not None:
        parts += [_fold(f"{title} of {code(chosen['name'])}", text) for title, text in _tables_of(chosen)]
    facts = [document["title"], prose(document["machine"]), f"evidence: {prose(document['evidence'])}"]
    parts.append(f"<sub>{' · '.join([*facts, 'qvis ' + document['qvis']])}</sub>")
    return "\n\n".join(part for part in parts if part) + "\n"


def _models(document: Document) -> str:
    columns = model_columns(document)
    rows = [
        [code(one["name"]), prose(one["engine"]), *(prose(column.cell(one)) for column in columns)]
        for one in document["variants"]
    ]
    first = tell_first(document)
    titles = [f"{one.title} ({first})" if one.key == "time" else one.title for one in columns]
    return _table(["Model", "Engine", *titles], 2, rows)


def _times(document: Document) -> str:
    rows = [
        [
            code(variant["name"]),
            tell_point(one),
            tell_time(one["median_s"]),
            tell_time(one["p90_s"]),
            tell_relative(one["ratio"]),
            short(one["per_second"]),
        ]
        for variant in document["variants"]
        for one in variant["latencies"]
    ]
    return _table(["Model", "Call", "Median", "90 %", "Relative", "Samples a second"], 2, rows)


def _tables_of(variant: Document) -> Iterator[tuple[str, str]]:
    """What is known of one model, each with its title."""
    classes = changed_classes(variant)
    if classes:
        rows = [
            [code(one["class"]), f"{one['samples']:,}", str(one["right_before"]), str(one["right"]), _points(one)]
            for one in classes[:NAMED]
        ]
        titles = ["Class", "Samples", "Right before", "Right now", "Change"]
        yield "Classes", _more(_table(titles, 1, rows), len(classes) - len(rows))
    layers = worst_layers(variant)
    if layers:
        rows = [[code(one["name"]), prose(one["op"]), tell_db(one), tell_worst(one)] for one in layers[: 2 * ROWS]]
        yield "Layers", _more(_table(["Layer", "Op", "Keeps", "Worst channel"], 2, rows), len(layers) - len(rows))
    leftovers = variant["contents"]["leftovers"] if variant["contents"] is not None else []
    if leftovers:
        lines = "\n".join(f"- {prose(tell_leftover(one))}" for one in leftovers[:NAMED])
        yield "What is left in float", _more(lines, len(leftovers) - NAMED)


def _points(one: Document) -> str:
    return f"{tell_points(class_change(one))} points"


def _table(titles: Sequence[str], words: int, rows: Iterable[Sequence[str]]) -> str:
    """A table whose first columns hold words, the others numbers."""
    rules = ["---" if i < words else "--:" for i in range(len(titles))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (titles, rules, *rows))


def _more(text: str, number: int) -> str:
    return f"{text}\n\nand {number:,} more in the JSON report" if number > 0 else text


def _fold(summary: str, content: str) -> str:
    # without the empty lines, what is inside would not be read as Markdown
    return f"<details>\n<summary>{summary}</summary>\n\n{content}\n\n</details>"


# ---------------------------------------------------------------------------------------------------------- terminal


def terminal_lines(document: Document, *, all_rows: bool = False) -> Iterator[str]:
    """The verdict, all models, the times of calls, and what changed for each of them."""
    verdict, variants = document["verdict"], document["variants"]
    yield visible(verdict["text"])
    yield from (visible(detail) for detail in verdict["details"])
    if not variants:
        return
    yield ""
    columns = [one for one in model_columns(document) if all_rows or one.key in ON_TERMINAL]
    yield from _aligned(
        ["Model", *(one.title for one in columns)],
        [[_short(one["name"]), *(column.cell(one) for column in columns)] for one in variants],
    )
    if any(one["latencies"] for one in variants):
        yield f"Time: median of a call at {tell_first(document)}; relative: below 1 is faster than the baseline"
    yield from _time_lines(document)
    shown = range(len(variants)) if all_rows else [verdict["variant"]]
    for place in shown:
        yield from _variant_lines(document, place, all_rows)
    if len(shown) < len(variants) - document["has_baseline"]:
        yield "--all tells of each model what changed"


def _time_lines(document: Document) -> Iterator[str]:
    if len(document["points"]) < 2:
        return
    yield ""
    rows = [
        [
            _short(variant["name"]),
            tell_point(one),
            tell_time(one["median_s"]),
            tell_time(one["p90_s"]),
            short(one["per_second"]),
            tell_relative(one["ratio"]),
        ]
        for variant in document["variants"]
        for one in variant["latencies"]
    ]
    yield from _aligned(["Model", "Call", "Median", "90 %", "Samples/s", "Relative"], rows)


def _variant_lines(document: Document, place: int, all_rows: bool) -> Iterator[str]:
    variant = document["variants"][place]
    most = None if all_rows else LINES
    classes, layers = changed_classes(variant), worst_layers(variant)
    leftovers = variant["contents"]["leftovers"] if variant["contents"] is not None else []
    if classes:
        yield ""
        yield f"{name(variant)}: right answers by class, the worst change first"
        rows = [
            [_short(one["class"]), f"{one['right_before']} of {one['samples']}", str(one["right"]), _points(one)]
            for one in classes[:most]
        ]
        yield from _aligned(["Class", "Before", "Now", "Change"], rows)
        yield from _rest(len(classes), most, "classes")
    if layers:
        yield ""
        yield f"{name(variant)}: what the outputs of its layers keep, the worst first"
        rows = [[_short(one["name"]), one["op"], tell_db(one), tell_worst(one)] for one in layers[:most]]
        yield from _aligned(["Layer", "Op", "Keeps", "Worst channel"], rows)
        yield from _rest(len(layers), most, "layers")
    elif variant["no_layers"]:
        yield ""
        yield f"{name(variant)}: layers were not looked at: {visible(variant['no_layers'])}"
    if leftovers:
        yield ""
        yield f"{name(variant)}: {tell_operations(variant['contents'])}"
        yield from (f"  {tell_leftover(one)}" for one in leftovers[:most])
        yield from _rest(len(leftovers), most, "kinds")
    if variant["changed"]:
        yield ""
        yield f"{name(variant)}: {count(variant['changed'], 'answer')} changed, the surest before first"
        of_it = [one for one in document["changed"] if any(after["variant"] == place for after in one["after"])]
        for one in of_it[:most]:
            (answer,) = (after["answer"] for after in one["after"] if after["variant"] == place)
            label = "" if one["label"] is None else f", labelled {visible(name_class(document, one['label']))}"
            before, now = (visible(name_class(document, which)) for which in (one["before"], answer))
            yield f"  sample {one['index']:,}{label}: {before} -> {now}, it was {one['confidence']:.2g} ahead"
        yield from _rest(len(of_it), most, "samples")
    yield from (f"{name(variant)}: {visible(note)}" for note in variant["notes"])


def _rest(total: int, most: int | None, what: str) -> Iterator[str]:
    if most is not None and total > most:
        yield f"  and more {what}, {total:,} in all; --all shows them"


def _short(text: str) -> str:
    return shorten(visible(text), NAME_WIDTH)


def _aligned(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a table: the first column flush left, all else flush right."""
    table = [titles, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(titles))]
    for row in table:
        first, *others = row
        cells = [f"{first:{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()
