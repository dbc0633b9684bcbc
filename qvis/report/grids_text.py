"""From the document of a comparison of grids to a table in a terminal and to Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qvis.report.document import Document
from qvis.report.markdown import code, prose
from qvis.words import count, percent, size, visible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

ROWS = 15
LAYERS = 20


def ranked_schemes(document: Document) -> list[dict[str, Any]]:
    """The schemes, best first, each that differs from the others once."""
    schemes = sorted(document["schemes"], key=lambda one: one["rank"])
    return [one for one in schemes if one["same_as"] is None]


def tell_damage(one: dict[str, Any]) -> str:
    """A damage in percent, and how it is known."""
    if one["damage"] != one["damage"]:
        return "n/a"
    sign = {"measured": "", "low": "?"}.get(one["confidence"], "±")
    return f"{percent(one['damage'])}{sign}"


def tell_decibels(value: float, one: dict[str, Any]) -> str:
    """``21.3``, or that there is no noise."""
    return (
        f"{value:.1f}"
        if abs(value) < float("inf")
        else "∞"
        if one["bits_per_weight"] == one["bits_per_weight"]
        else "n/a"
    )


def tell_beaten(one: dict[str, Any]) -> str:
    """By whom, or that nothing is better."""
    return f"by {one['beaten_by']}" if one["beaten_by"] else "frontier"


def tell_best(layer: dict[str, Any]) -> str:
    """The smallest grid of a layer that keeps enough."""
    return layer["best"] or ("any" if layer["answers"][0]["short"] == "any" else "none")


def _columns(document: Document) -> list[tuple[str, bool, Any]]:
    ran = document["judged_by"] == "damage"
    found: list[tuple[str, bool, Any]] = [
        ("grid", False, lambda one: one["label"]),
        ("bits a\nweight", True, lambda one: f"{one['bits_per_weight']:.2f}"),
        ("size", True, lambda one: size(one["bytes"])),
        ("SQNR\ndB", True, lambda one: tell_decibels(one["sqnr_db"], one)),
    ]
    if ran:
        found.append(("damage", True, tell_damage))
    return [*found, ("runs on", False, lambda one: one["runs_on"]), ("beaten", False, tell_beaten)]


def print_grids(document: Document, console: Console, *, all_rows: bool = False) -> None:
    """Print the verdict, the answers, the best schemes for all layers, and the best for each layer."""
    from rich.table import Table
    from rich.text import Text

    def show(text: str, style: str = "") -> None:
        for line in Text(_fit(visible(text), console), style=style).wrap(console, console.width):
            line.rstrip()
            console.print(line, soft_wrap=True)

    def table(columns: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]]) -> None:
        made = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
        for title, right in columns:
            made.add_column(title, no_wrap=True, justify="right" if right else "left", overflow="crop")
        for row in rows:
            made.add_row(*(Text(_fit(visible(cell), console)) for cell in row))
        console.print()
        console.print(made)

    show(f"{document['model']['name']}: grids", "bold")
    show(document["verdict"]["text"])
    console.print()
    for answer in document["answers"]:
        show(f"{answer['question']} {_capital(answer['short'])}: {answer['text']}")
    schemes = ranked_schemes(document)
    shown = schemes if all_rows else schemes[:ROWS]
    columns = _columns(document)[: None if console.width > 150 else -1 if console.width > 90 else -2]
    table([column[:2] for column in columns], [[cell(one) for _, _, cell in columns] for one in shown])
    if len(shown) < len(schemes):
        show(f"  and {len(schemes) - len(shown)} more (--all)")
    layers = document["layers"] if all_rows else document["layers"][:LAYERS]
    table(
        [("layer", False), (f"smallest grid that keeps {document['keep_db']:g} dB", False), ("bits a\nweight", True)],
        [[_cut(layer["name"]), tell_best(layer), _bits(layer)] for layer in layers],
    )
    if len(layers) < len(document["layers"]):
        show(f"  and {len(document['layers']) - len(layers):,} more (--all)")
    for detail in document["verdict"]["details"]:
        if all_rows or detail not in document["left_out"]:
            show(detail)
    for one in document["skipped"]:
        show(f"not read: {one['name']}: {one['reason']}")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _cut(name: str, longest: int = 40) -> str:
    return name if len(name) <= longest else f"…{name[1 - longest :]}"


def _bits(layer: dict[str, Any]) -> str:
    ranks = layer["grids"]["rank"]
    return f"{layer['grids']['bits_per_weight'][ranks.index(1)]:.2f}" if layer["best"] else ""


def _fit(text: str, console: Console) -> str:
    """The text in characters that the console can show."""
    try:
        text.encode(console.encoding)
    except UnicodeEncodeError:
        text = text.replace("∞", "inf").replace("…", "~").replace("±", "~")
        text = text.encode(console.encoding, "backslashreplace").decode(console.encoding)
    return text


def render_grids_markdown(document: Document) -> str:
    """The verdict, the answers, the best schemes, and the best of each layer folded away."""
    columns = _columns(document)
    rows = [[prose(cell(one)) for _, _, cell in columns] for one in ranked_schemes(document)[:ROWS]]
    head = [
        [title.replace("\n", " ") for title, _, _ in columns],
        ["--:" if right else "---" for _, right, _ in columns],
    ]
    layers = [
        [code(layer["name"]), prose(tell_best(layer)), _bits(layer)] for layer in document["layers"][: 10 * LAYERS]
    ]
    best = [["layer", f"smallest grid that keeps {document['keep_db']:g} dB", "bits a weight"], ["---", "---", "--:"]]
    model = document["model"]
    parts = [
        f"<!-- qvis {document['qvis']} -->",
        f"**{prose(document['verdict']['text'])}**",
        "\n".join(
            f"- **{prose(one['question'])}** {prose(_capital(one['short']))}: {prose(one['text'])}"
            for one in document["answers"]
        ),
        _joined([*head, *rows]),
        f"<details>\n<summary>{count(len(layers), 'layer')}</summary>\n\n{_joined([*best, *layers])}\n\n</details>",
        " ".join(prose(detail) for detail in document["verdict"]["details"]),
        f"<sub>Grids · {code(model['name'])} · {prose(model['framework'])} · sha256 `{model['fingerprint'][:12]}` · "
        f"evidence: {prose(document['evidence'])} · qvis {document['qvis']}</sub>",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _joined(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
