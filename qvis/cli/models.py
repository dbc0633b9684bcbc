"""From what was typed to a model."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path

from qvis.errors import BadArgumentError

FORMS = "a model's file or folder, 'package.module:factory' or 'path/to/file.py:factory'"


def open_model(spec: str, weights: Path | None = None, *, argument: str = "MODEL", option: str = "--weights") -> object:
    """The model, or the path of its file; ``argument`` and ``option`` are what an error calls the two.

    What the code of a factory prints goes to stderr: stdout is for results.
    """
    path = Path(spec)
    if path.exists():
        if path.suffix == ".py":
            raise BadArgumentError(f"{argument}: {spec!r} is code; name what makes the model, as in '{spec}:make'")
        if weights is not None:
            raise BadArgumentError(f"{option}: {spec!r} holds its own weights; leave the option out, or give a factory")
        return path
    if ":" not in spec:
        raise BadArgumentError(f"{argument}: there is no file {spec!r}; give {FORMS}")
    from qvis.adapters.factories import load

    with redirect_stdout(sys.stderr):
        return load(spec, weights)


def labels(old: tuple[str, Path | None], new: tuple[str, Path | None]) -> tuple[str, str]:
    """What tells two models apart in a report: the file or the factory, as typed.

    >>> labels(("net.py:make", None), ("net.py:make", Path("tuned.safetensors")))
    ('make', 'tuned.safetensors')
    """
    typed_old, typed_new = (spec if weights is None else str(weights) for spec, weights in (old, new))
    short_old, short_new = (Path(typed.rpartition(":")[2]).name for typed in (typed_old, typed_new))
    return (short_old, short_new) if short_old != short_new else (typed_old, typed_new)
