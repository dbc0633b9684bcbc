"""From a document to Markdown for a pull request.

Names come from the model, and nothing in a model may act on the page they are shown on: neither as Markdown or HTML,
nor by notifying a person or linking an issue. Names stand in code, where none of this works; other text is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from qvis.report.cells import columns, is_changes, left_out, ranked, severity, shorten
from qvis.report.document import Document
from qvis.words import count, visible

ROWS = 10
"""Rows shown at once."""
FOLDED_ROWS = 200
"""Rows folded away behind them; what is more stands in the JSON report. A comment on GitHub holds 65,536 characters."""
NAMED = 20
"""Left-out layers named."""
LONGEST_NAME = 80

_BREAK = "&#8203;"  # a space of no width, as an entity so that whoever reads the source sees it
_UNDERSCORE = r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"  # within a word it is only itself
_ACTIVE = re.compile(rf"[&<>\\`*~|\[\]$]|{_UNDERSCORE}")
_ACTIVE_IN_HTML = re.compile(rf"[^\w ./-]|{_UNDERSCORE}")
_ACTS_LATER = re.compile(r"@(?=\w)|#(?=\d)|:(?=//|\w+:)|\bwww(?=\.)|\bGH(?=-\d)", re.IGNORECASE)
"""Mentions of people, links to issues, addresses, and names of emoji."""
_HARMLESS = re.compile(r"[\w./\- ()+,;:%=\[\]]+")


def render_markdown(document: Document) -> str:
    """The verdict and its evidence, the ten worst layers, the others folded away, and what was left out."""
    layers = ranked(document)
    verdict = document["verdict"]
    long_names = _long_names(document)
    parts = [
        f"<!-- qvis {document['qvis']} -->",
        f"**{prose(verdict['text'], long_names)}**",
        " ".join(prose(detail, long_names) for detail in verdict["details"]),
    ]
    if layers:
        parts.append(_table(document, layers[:ROWS]))
    folded = layers[ROWS : ROWS + FOLDED_ROWS]
    if folded:
        parts.append(_fold(f"{count(len(folded), 'more layer')}", _table(document, folded)))
    beyond = len(layers) - ROWS - len(folded)
    if beyond > 0:
        parts.append(f"{count(beyond, 'more layer')}, ranked after these, can be read in the JSON report.")
    for heading, items in left_out(document):
        parts.append(_left_out(heading, items))
    parts.append(_footer(document))
    return "\n\n".join(parts) + "\n"


def code(text: str, longest: int = LONGEST_NAME) -> str:
    """``text`` as code, long ones cut in the middle.

    >>> code("conv1"), code("a|b")
    ('`conv1`', '<code>a&#124;b</code>')
    """
    text = shorten(visible(text), longest)
    if _HARMLESS.fullmatch(text) and text.strip() == text:
        return f"`{text}`"
    return f"<code>{_entities(text, _ACTIVE_IN_HTML)}</code>"


def prose(text: str, long_names: Iterable[str] = ()) -> str:
    """``text`` so that it means only itself; ``long_names`` in it are cut in the middle."""
    for name in long_names:
        text = text.replace(name, shorten(name, LONGEST_NAME))
    # Some act on the finished page, so that no escape of the character itself helps: a break within the word does.
    # What visible returns holds no such space of its own.
    text = _ACTS_LATER.sub("\\g<0>\u200b", visible(text))
    return _entities(text, _ACTIVE).replace("\u200b", _BREAK)


def _entities(text: str, special: re.Pattern[str]) -> str:
    return special.sub(lambda match: "".join(f"&#{ord(char)};" for char in match.group()), text)


def _long_names(document: Document) -> list[str]:
    names = {layer["name"] for layer in document["layers"] if len(layer["name"]) > LONGEST_NAME}
    return sorted(names, key=len, reverse=True)


def _table(document: Document, layers: Sequence[dict[str, Any]]) -> str:
    name, *others = columns(document)
    titles = ["Severity", name.title, *(column.title for column in others)]
    rules = ["---", "---", *("--:" if column.right else "---" for column in others)]
    rows = [
        [severity(layer), code(layer["name"]), *(prose(column.cell(layer)) for column in others)] for layer in layers
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in (titles, rules, *rows))


def _fold(summary: str, content: str) -> str:
    # without the empty lines, what is inside would not be read as Markdown
    return f"<details>\n<summary>{summary}</summary>\n\n{content}\n\n</details>"


def _left_out(heading: str, items: Sequence[dict[str, str]]) -> str:
    lines = [f"- {code(item['name'])}: {prose(item['reason'])}" for item in items[:NAMED]]
    if len(items) > NAMED:
        lines.append(f"- and {len(items) - NAMED:,} more in the JSON report")
    return f"{heading}:\n\n" + "\n".join(lines)


def _footer(document: Document) -> str:
    model = document["model"]
    if is_changes(document):
        before, after = model["before"], model["after"]
        which = f"{code(before['name'])} (sha256 `{before['fingerprint'][:12]}`) → {code(after['name'])}"
        model = after
    else:
        which = code(model["name"])
    facts = (
        document["title"],
        which,
        prose(model["framework"]),
        f"{model['parameters']:,} parameters",
        f"sha256 `{model['fingerprint'][:12]}`",
        f"evidence: {prose(document['evidence'])}",
        f"qvis {document['qvis']}",
    )
    return f"<sub>{' · '.join(facts)}</sub>"
