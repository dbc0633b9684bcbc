"""What a writer hands back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Written(NamedTuple):
    """A text for a tool, and what is not as it was chosen."""

    text: str
    suffix: str
    missing: Mapping[str, str] = {}
    """Why the tool cannot be told of a layer that has a grid."""
    changed: Mapping[str, str] = {}
    """What a layer gets instead of what was chosen."""
    hints: tuple[str, ...] = ()
    """How to use it."""
