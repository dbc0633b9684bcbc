"""Numbers and names in words, the same in every report."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np

from qvis.layers import IntArray


def count(number: int, noun: str) -> str:
    """``1 channel``, ``2 channels``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def is_are(number: int) -> str:
    """The verb that goes with ``number``."""
    return "is" if number == 1 else "are"


def listed(channels: IntArray, most: int = 4) -> str:
    """``channel 3``, ``channels 3, 5``, ``channels 3, 5, 8, 9 and 12 more``."""
    names = ", ".join(str(int(i)) for i in channels[:most])
    more = f" and {channels.size - most} more" if channels.size > most else ""
    return f"channel{'' if channels.size == 1 else 's'} {names}{more}"


def listed_names(names: Sequence[str], most: int = 4) -> str:
    """``conv``, ``conv, relu``, ``a, b, c, d and 12 more``; each once."""
    once = list(dict.fromkeys(names))
    more = f" and {len(once) - most} more" if len(once) > most else ""
    return f"{', '.join(once[:most])}{more}"


def percent(share: float) -> str:
    """A share as a percentage of two significant digits: ``1.2 %``, ``0.0034 %``, ``more than 10,000 %``."""
    if share > 100:
        return "more than 10,000 %"
    value = float(f"{100 * share:.2g}")
    if value == 0:
        return "0 %"
    if value < 1e-4:
        return "less than 0.0001 %"
    digits = max(0, 1 - int(np.floor(np.log10(value))))
    return f"{value:.{digits}f} %"


def short(value: float) -> str:
    """A ratio in three digits: ``8.12``, ``56.1k``."""
    value = float(f"{value:.3g}")
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{suffix}" if value < 1e12 else f"{value:.0e}"
    return f"{value:.3g}"


def encodable(text: str) -> str:
    r"""``text`` with halves of surrogate pairs spelled out, which no file can hold.

    >>> encodable("conv\udc80")
    'conv\\udc80'
    """
    return text.encode(errors="backslashreplace").decode()


def visible(text: str) -> str:
    r"""``text`` on one line, with all that is invisible or steers a terminal spelled out.

    >>> visible("conv\n\x1b[2J")
    'conv\\n\\x1b[2J'
    """
    if text.isascii() and text.isprintable():
        return text
    # categories C* and Z*: control characters, changes of the writing direction, lone surrogates, line separators
    return "".join(
        char if char == " " or unicodedata.category(char)[0] not in "CZ" else char.encode("unicode_escape").decode()
        for char in text
    )


def size(bytes: float) -> str:
    """Bytes in three digits, in units of a thousand.

    >>> size(812), size(24002), size(1.25e6)
    ('812 bytes', '24 kB', '1.25 MB')
    """
    value = float(f"{bytes:.3g}")
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{value / limit:,.10g} {unit}"
    whole = f"{bytes:,.0f}"
    return f"{whole} byte{'' if whole == '1' else 's'}"
