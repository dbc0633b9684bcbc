"""What all pages are made with: the templates, and one self-contained file of words, data, styles and scripts."""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qvis.errors import QvisError
from qvis.words import count, visible

STYLES = ("page", "tools", "verdict", "glossary", "help")
"""Style sheets of every page, in ``templates/widgets``."""


def render_page(
    template: str,
    document: Mapping[str, Any],
    *,
    styles: Sequence[str] = (),
    scripts: Sequence[str] = (),
    data: Mapping[str, bytes] | None = None,
    code: Mapping[str, str] | None = None,
    policy: Mapping[str, str] | None = None,
    **words: Any,
) -> str:
    """A page that fills ``frame.html.jinja``; the same bytes for the same arguments.

    Parameters
    ----------
    template
        A file in ``templates`` that extends the frame.
    document
        What the page tells; it has at least ``qvis``, ``kind``, ``title`` and ``verdict``.
    styles, scripts
        Names of files in ``templates/widgets``, in the order in which they are joined; the page's own styles come after
        :data:`STYLES`, the scripts after ``page`` and ``frame``.
    data
        What scripts read with ``unpack(id)``, by the id; it is deflated.
    code
        The same, of scripts that the page runs by itself.
    policy
        More of the content security policy, such as ``{"worker-src": "blob:"}``.
    words
        More for the template.
    """
    theme, script = read_widget("theme.js"), join_scripts(scripts)
    code = code or {}
    hashes = " ".join(_hash(text) for text in (theme, script, *code.values()))
    rules = {
        "default-src": "'none'",
        "script-src": hashes,
        "style-src": "'unsafe-inline'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    page = {
        "css": Markup("\n".join(read_widget(f"{name}.css") for name in (*STYLES, *styles))),
        "theme": Markup(theme),
        "script": Markup(script),
        "policy": Markup("; ".join(f"{name} {value}" for name, value in (rules | dict(policy or {})).items())),
        "data": {
            **{name: _pack(content) for name, content in (data or {}).items()},
            **{name: _packed(text) for name, text in code.items()},
        },
    }
    return environment().get_template(template).render(document=document, page=page, **words)


@cache
def environment() -> Environment:
    """Where all pages' templates are found, with the filters that they use."""
    made = Environment(
        loader=PackageLoader("qvis.templates", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    made.filters["thousands"] = "{:,}".format
    made.filters["counted"] = count
    made.filters["visible"] = visible
    made.filters["unbroken"] = lambda text: text.replace(" %", "\N{NO-BREAK SPACE}%")
    return made


@cache
def read_widget(name: str) -> str:
    """A style sheet or script of ``templates/widgets``."""
    text = (files("qvis.templates") / "widgets" / name).read_text(encoding="utf-8")
    if "</script" in text.lower():
        raise QvisError(f"{name}: a script inside a page cannot contain '</script'")
    return text


def join_scripts(names: Sequence[str]) -> str:
    """Files in ``templates/widgets`` as one script, which has its names for itself."""
    parts = "\n".join(read_widget(f"{name}.js") for name in ("page", "frame", *names))
    return f'"use strict";\n(async () => {{\n{parts}\n}})();\n'


def _pack(content: bytes) -> str:
    """Deflated (zlib, RFC 1950) and in base64: what the page's ``unpack`` reads."""
    return base64.b64encode(zlib.compress(content, 6)).decode("ascii")


@cache
def _packed(text: str) -> str:
    return _pack(text.encode())


def _hash(script: str) -> str:
    """The source expression that lets a page's security policy run this script and no other."""
    # a browser hashes what its parser saw, in which every line end is a line feed
    digest = hashlib.sha256(script.replace("\r\n", "\n").encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
