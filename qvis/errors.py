"""What qvis raises. Every message names the argument, the value received, what was expected, and the way out."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class QvisError(Exception):
    """Something qvis was asked to do cannot be done; the message is one line meant for the user."""


class UnsupportedModelError(QvisError, TypeError):
    """The model, or a tensor in it, is of a kind that qvis cannot read."""


class UnknownLayerError(QvisError, ValueError):
    """A name or pattern in ``selected_layers`` matches no layer."""


class OutputError(QvisError, OSError):
    """A report cannot be written where it was asked for."""


class NoGraphError(QvisError, ValueError):
    """How data flows through the model cannot be found; the message says why, after the words "no graph: "."""


class NotRunnableError(QvisError, TypeError):
    """The model can be read, but not run: the message says why, and what to give instead."""


class BadArgumentError(QvisError, ValueError):
    """An argument has a value outside what it may have."""


def suggest(wanted: str, names: Iterable[str]) -> str:
    """Say which names are near ``wanted``, for the end of an error message.

    >>> suggest("con1", ["conv1", "linear"])
    "; did you mean 'conv1'?"
    """
    names = list(names)
    lowered = {name.lower(): name for name in names}
    near = [lowered[match] for match in get_close_matches(wanted.lower(), lowered, n=3, cutoff=0.6)]
    near = near or [name for name in names if wanted.strip("*?").lower() in name.lower()][:3]
    if near:
        return "; did you mean " + " or ".join(repr(name) for name in near) + "?"
    shown = ", ".join(repr(name) for name in names[:5])
    return f"; the model has {len(names)} layers: {shown}{', ...' if len(names) > 5 else ''}"
