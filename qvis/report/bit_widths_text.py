"""What is said of a choice of bit widths in words: below the verdict, in Markdown and on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from typing import Any

from qvis.noise import Granularity
from qvis.report.cells import shorten
from qvis.report.markdown import FOLDED_ROWS, NAMED, ROWS, code, prose
from qvis.words import count, is_are, size, visible

Document = Mapping[str, Any]
COMPARED = 8
"""The width that all others are compared with."""
NAME_WIDTH = 34
"""Of a layer's name on the terminal."""
LINES = 20
"""Layers on the terminal, unless all are asked for."""


def tell_details(document: Document, *, uniform: bool = True) -> list[str]:
    """What the verdict rests on, the most important first; with ``uniform`` also one width for all layers."""
    sizes, chosen, found = document["sizes"], document["chosen"], document["verified"]
    layers = len(document["layers"])
    details = [
        f"Asked for: {document['asked']}. The model takes {size(sizes['bytes'])} instead of"
        f" {size(sizes['float_bytes'])} in float: {size(chosen['bytes'])} for {count(layers, 'layer')}, scales"
        f" included, and {size(sizes['rest_bytes'])} for numbers that are not rounded."
    ]
    if found["accuracy"] is not None:
        details.append(_accuracy(found))
    if uniform and document["uniform"]:
        kept = ", ".join(f"{tell_db(mix['measured_db'])} at {tell_uniform(mix)}" for mix in document["uniform"])
        details.append(f"One width for all layers keeps {kept}.")
    predicted = chosen["predicted_db"]
    told = f"; predicted were {tell_db(predicted)}" if isfinite(predicted) else ""
    details.append(
        f"The {tell_db(found['sqnr_db'])} are the mean over draws of the rounding, whose standard deviation is"
        f" {found['spread_db']:.1f} dB{told}."
    )
    return [*details, *document["corrected"], *document["notes"]]


def _accuracy(found: Document) -> str:
    share, error = found["accuracy"]["share"], found["accuracy"]["error"]
    text = (
        f"Of {count(found['answers'], 'answer')} {tell_share(share)} are right, {tell_share(found['float_accuracy'])}"
    )
    text += " in float"
    other = found["uniform_accuracy"]
    if not isfinite(other):
        return f"{text}; the difference is {_points(share - found['float_accuracy'], error)}."
    text += f" and {tell_share(other)} with one width for all layers at equal size"
    return f"{text}; the difference to that is {_points(share - other, error)}."


def _points(difference: float, error: float) -> str:
    text = f"{100 * difference:+.1f}".replace("-", "−")
    return f"{text} ± {100 * error:.1f} points" if isfinite(error) else f"{text} points"


def tell_db(value: float) -> str:
    """``26.3 dB``, ``all`` where nothing is lost, ``n/a`` where it is not known."""
    if value != value:
        return "n/a"
    return f"{value:.1f} dB".replace("-", "−") if isfinite(value) else "all"


def tell_share(value: float) -> str:
    """``99.2 %``."""
    return f"{100 * value:.1f} %"


def tell_granularity(granularity: Granularity) -> str:
    """What shares a step, in words."""
    return f"groups of {granularity}" if isinstance(granularity, int) else f"per {granularity}"


def tell_uniform(mix: Document) -> str:
    """One width for all layers, as it is called: ``int8``."""
    return f"int{round(mix['average_bits'])}"


def by_width(document: Document, granularity: Granularity) -> list[int]:
    """The places of the grids with a granularity, from the widest to the narrowest."""
    places = [place for place, grid in enumerate(document["grids"]) if grid["granularity"] == granularity]
    return sorted(places, key=lambda place: -int(document["grids"][place]["bits"]))


# ---------------------------------------------------------------------------------------------------------- markdown


def render_widths_markdown(document: Document) -> str:
    """The verdict and its evidence, one width for all beside the mix, and the width of each layer."""
    verdict, layers = document["verdict"], document["layers"]
    names = sorted((layer["name"] for layer in layers if len(layer["name"]) > 80), key=len, reverse=True)
    parts = [
        f"<!-- qvis {document['qvis']} -->",
        f"**{prose(verdict['text'], names)}**",
        " ".join(prose(detail, names) for detail in verdict["details"]),
        _sizes(document),
        _layers(document, layers[:ROWS]),
    ]
    folded = layers[ROWS : ROWS + FOLDED_ROWS]
    if folded:
        summary = count(len(folded), "more layer")
        parts.append(f"<details>\n<summary>{summary}</summary>\n\n{_layers(document, folded)}\n\n</details>")
    beyond = len(layers) - ROWS - len(folded)
    if beyond > 0:
        parts.append(f"{count(beyond, 'more layer')} can be read in the JSON report.")
    skipped = document["skipped"]
    if skipped:
        lines = [f"- {code(one['name'])}: {prose(one['reason'])}" for one in skipped[:NAMED]]
        if len(skipped) > NAMED:
            lines.append(f"- and {len(skipped) - NAMED:,} more in the JSON report")
        parts.append(f"Left in float: {count(len(skipped), 'layer')}:\n\n" + "\n".join(lines))
    model = document["model"]
    facts = (
        document["title"],
        code(model["name"]),
        prose(model["framework"]),
        f"{model['parameters']:,} parameters",
        f"evidence: {prose(document['evidence'])}",
        f"qvis {document['qvis']}",
    )
    parts.append(f"<sub>{' · '.join(facts)}</sub>")
    return "\n\n".join(parts) + "\n"


def _sizes(document: Document) -> str:
    chosen, rest = document["chosen"], document["sizes"]["rest_bytes"]
    mixes = [("**the mix**", chosen), *((tell_uniform(mix), mix) for mix in document["uniform"])]
    rows = [
        f"| {name} | {mix['average_bits']:.2f} | {size(mix['bytes'] + rest)} | {tell_db(mix['measured_db'])} |"
        for name, mix in sorted(mixes, key=lambda pair: int(pair[1]["bytes"]))
    ]
    return "\n".join(["| Widths | Average bits | Model | Output keeps |", "| --- | --: | --: | --: |", *rows])


def _layers(document: Document, layers: Sequence[Document]) -> str:
    several = len(document["granularities"]) > 1
    titles = ["Layer", "Op", "Weights", "Bits", *["Grid"] * several, "Bytes", "Alone it leaves"]
    rules = ["---", "---", "--:", "--:", *["---"] * several, "--:", "--:"]
    rows = [
        [
            code(layer["name"]),
            prose(layer["op"]),
            f"{layer['weights']:,}",
            str(layer["bits"]),
            *[tell_granularity(layer["granularity"])] * several,
            f"{layer['bytes']:,}",
            tell_db(layer["damage_db"]),
        ]
        for layer in layers
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in (titles, rules, *rows))


# ---------------------------------------------------------------------------------------------------------- terminal


def terminal_lines(document: Document, *, all_rows: bool = False) -> Iterator[str]:
    """The verdict, the layers, one width for all layers beside the mix, and what else is to be known."""
    yield f"{visible(document['model']['name'])}: bit widths"
    yield visible(document["verdict"]["text"])
    details = tell_details(document, uniform=False)
    yield visible(details[0])
    yield ""
    yield from _layer_lines(document, all_rows)
    yield ""
    chosen, rest = document["chosen"], document["sizes"]["rest_bytes"]
    mixes = [("mix", chosen), *((tell_uniform(mix), mix) for mix in document["uniform"])]
    for name, mix in sorted(mixes, key=lambda pair: int(pair[1]["bytes"])):
        yield (
            f"{'>' if mix is chosen else ' '} {name:6}{mix['average_bits']:6.2f} bits {size(mix['bytes'] + rest):>10}"
            f"   the output keeps {tell_db(mix['measured_db'])}"
        )
    if details[1:]:
        yield ""
        yield from (visible(detail) for detail in details[1:])
    skipped = document["skipped"]
    if skipped:
        yield f"{count(len(skipped), 'layer')} {is_are(len(skipped))} left in float:"
        shown = skipped if all_rows else skipped[:5]
        yield from (f"  {visible(one['name'])}: {visible(one['reason'])}" for one in shown)
        if len(skipped) > len(shown):
            yield f"  and {len(skipped) - len(shown):,} more; --all names them"


def _layer_lines(document: Document, all_rows: bool) -> Iterator[str]:
    """What the layers get; of many those that do the most damage."""
    layers = document["layers"]
    shown = layers
    if len(layers) > LINES and not all_rows:
        worst = sorted(range(len(layers)), key=lambda i: _known(layers[i]["damage_db"]))[:LINES]
        shown = [layers[i] for i in sorted(worst)]
    first = document["granularities"][0]
    places = [place for place in by_width(document, first) if document["grids"][place]["bits"] == COMPARED]
    several = len(document["granularities"]) > 1
    room = NAME_WIDTH - (14 if several else 0)
    head = f"{'Layer':{room}} {'Weights':>11} {'Bits':>4}{'  Grid         ' if several else ''}"
    yield f"{head} {f'int{COMPARED}' if places else '':>8} {'Chosen':>9}"
    for layer in shown:
        name = shorten(visible(layer["name"]), room)
        grid = f"  {tell_granularity(layer['granularity']):13}" if several else ""
        wide = tell_db(layer["options"]["damage_db"][places[0]]) if places else ""
        yield (
            f"{name:{room}} {layer['weights']:11,} {layer['bits']:4}{grid} {wide:>8} {tell_db(layer['damage_db']):>9}"
        )
    if len(layers) > len(shown):
        yield f"and {len(layers) - len(shown):,} layers that do less damage; --all shows them"
    yield "dB: what the output keeps when this layer alone is rounded, predicted"


def _known(value: float) -> float:
    return value if value == value else float("inf")
