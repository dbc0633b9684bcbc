"""The models that take part in a benchmark: opened in their engines, and given the data as they take them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from qvis.data import split
from qvis.data.arrays import arrays, convert, count
from qvis.errors import BadArgumentError, QvisError, UnsupportedModelError
from qvis.layers import FloatArray
from qvis.quantization import engines
from qvis.quantization.engines import Engine
from qvis.running import Batch

TRIED = 2
"""Samples that the layout is found with."""


class Layout(str, Enum):
    """Where the channels of inputs must go, before an engine takes them."""

    GIVEN = "as given"
    LAST = "channels last"
    FIRST = "channels first"


@dataclass(frozen=True)
class Contender:
    """One model, opened."""

    name: str
    model: Any
    """A :class:`~pathlib.Path`, or a model object."""
    engine: Engine
    threads: int
    layout: Layout = Layout.GIVEN
    notes: list[str] = field(default_factory=list)
    """What a reader must know about what was measured of it."""

    @property
    def file(self) -> Path | None:
        """Where it lies; None in memory."""
        return self.model if isinstance(self.model, Path) else None

    def on_threads(self, threads: int) -> Contender:
        """The same, computing with so many threads."""
        if threads == self.threads:
            return self
        return replace(self, engine=engines.open_engine(self.model, threads=threads), threads=threads)

    def arrange(self, batch: Batch) -> Batch:
        """The batch in the layout that it takes."""
        return arrange(batch, self.layout)

    def run(self, batch: Batch) -> list[FloatArray]:
        """The outputs, for any number of samples."""
        return run(self.engine, self.arrange(batch))


def open_contenders(models: Sequence[Any], names: Sequence[str] | None, threads: int) -> list[Contender]:
    """Open each model in its engine.

    Raises
    ------
    BadArgumentError
        A file that does not exist, or names that are not as many as the models.
    UnsupportedModelError, NotRunnableError
        One of them cannot be run; the message names it.
    """
    located = [_locate(model) for model in models]
    given = _own_names(located) if names is None else _checked_names(names, len(located))
    found = []
    for name, model in zip(given, located, strict=True):
        try:
            engine = engines.open_engine(model, threads=threads)
        except QvisError as error:
            raise type(error)(f"model {name!r}: {str(error).removeprefix('model: ')}") from error
        found.append(Contender(name, model, engine, threads))
    return found


def _locate(model: Any) -> Any:
    """The model; a path as a :class:`~pathlib.Path`."""
    if not isinstance(model, (str, PathLike)):
        return model
    path = Path(model)
    if not path.exists():
        raise BadArgumentError(f"model: there is no file {str(model)!r}; give a file or a model object")
    if path.suffix.lower() in (".safetensors", ".pt", ".pth"):
        raise UnsupportedModelError(
            f"model: {str(model)!r} holds weights without the model that they belong to; load them into the module and "
            "give that, on the command line as 'file.py:factory' with --weights"
        )
    return path


def _own_names(models: Sequence[Any]) -> list[str]:
    """A name for each, of its file or its class; those that come twice are told apart."""
    paths = [model if isinstance(model, Path) else None for model in models]
    plain = [type(model).__name__ if path is None else path.name for model, path in zip(models, paths, strict=True)]
    longer = [
        name if path is None or plain.count(name) == 1 else str(path) for name, path in zip(plain, paths, strict=True)
    ]
    return [
        name if longer.count(name) == 1 else f"{name} ({longer[: place + 1].count(name)})"
        for place, name in enumerate(longer)
    ]


def _checked_names(names: Sequence[str], number: int) -> list[str]:
    given = [names] if isinstance(names, str) else list(names)
    if len(given) != number or not all(isinstance(one, str) and one for one in given) or len(set(given)) < number:
        raise BadArgumentError(
            f"names: got {given!r}, expected {number} different names, of the baseline first where there is one"
        )
    return given


# ---------------------------------------------------------------------------------------------------------------------
# Data


def as_numpy(batch: Batch) -> Batch:
    """The batch as arrays of NumPy, which all engines take."""

    def change(array: Any) -> Any:
        if hasattr(array, "detach"):
            array = array.detach().cpu()
            array = array.float() if "bfloat16" in str(array.dtype) else array
        return np.asarray(array)

    args, kwargs, labels = (convert(nest, change) for nest in (batch.args, dict(batch.kwargs), batch.labels))
    return Batch(args, kwargs, labels, batch.size)


def resize(batch: Batch, size: int) -> Batch:
    """So many samples: some of the batch, or all of them again and again."""
    return _change_samples(batch, size, lambda array: array[np.arange(size) % batch.size])


def _change_samples(batch: Batch, size: int, change: Callable[[Any], Any]) -> Batch:
    def each(array: Any) -> Any:
        return change(array) if count(array) == batch.size else array

    args, kwargs, labels = (convert(nest, each) for nest in (batch.args, dict(batch.kwargs), batch.labels))
    return Batch(args, kwargs, labels, size)


def gather(batches: Sequence[Batch], size: int) -> Batch:
    """One batch of so many samples, out of the first batches whose samples have the same shapes."""
    taken = [batches[0]]
    while sum(one.size for one in taken) < size and len(taken) < len(batches):
        if _shapes(batches[len(taken)]) != _shapes(taken[0]):
            break
        taken.append(batches[len(taken)])
    return resize(_merge(taken), size)


def _shapes(batch: Batch) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, array.shape[1:]) for name, array in arrays([batch.args, dict(batch.kwargs)], "")]


def _merge(batches: Sequence[Batch]) -> Batch:
    """Batches of equal structure as one."""

    def together(parts: Sequence[Any], sizes: Sequence[int]) -> Any:
        first = parts[0]
        if isinstance(first, Mapping):
            return {key: together([part[key] for part in parts], sizes) for key in first}
        if isinstance(first, (list, tuple)):
            return type(first)([together(column, sizes) for column in zip(*parts, strict=True)])
        whole = [getattr(part, "ndim", 0) and len(part) == size for part, size in zip(parts, sizes, strict=True)]
        return np.concatenate(parts) if all(whole) else first

    if len(batches) == 1:
        return batches[0]
    sizes = [batch.size for batch in batches]
    args, kwargs, labels = (
        together([getattr(batch, what) for batch in batches], sizes) for what in ("args", "kwargs", "labels")
    )
    return Batch(args, kwargs, labels, sum(sizes))


def run(engine: Engine, batch: Batch) -> list[FloatArray]:
    """The outputs of an engine for any number of samples, also where it takes so many at once only."""
    fixed = engine.fixed_batch
    if fixed is None or fixed == batch.size:
        return engine.run(batch)
    parts = [engine.run(resize(piece, fixed)) for piece in split(batch, fixed)]
    return [np.concatenate(pieces)[: batch.size] for pieces in zip(*parts, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Layout


def arrange(batch: Batch, layout: Layout) -> Batch:
    """The batch with the channels of pictures, or else of sequences, where the layout has them."""
    if layout is Layout.GIVEN:
        return batch
    source, target = (1, -1) if layout is Layout.LAST else (-1, 1)
    axes = [array.ndim for _, array in arrays([batch.args, dict(batch.kwargs)], "")]
    least = 4 if max(axes) >= 4 else 3

    def change(array: Any) -> Any:
        return np.ascontiguousarray(np.moveaxis(array, source, target)) if array.ndim >= least else array

    return Batch(convert(batch.args, change), convert(dict(batch.kwargs), change), batch.labels, batch.size)


def fit(contender: Contender, batch: Batch) -> Contender:
    """The contender with the layout in which it takes the data: as they are, else with the channels moved.

    Raises
    ------
    BadArgumentError
        It takes them in neither, or both with the channels moved to the end and to the front.
    """
    some = resize(batch, contender.engine.fixed_batch or min(batch.size, TRIED))
    try:
        contender.engine.run(some)
        return contender
    except Exception as error:  # each engine has its own kinds
        first = error
    moved = []
    for layout in (Layout.LAST, Layout.FIRST):
        other = arrange(some, layout)
        if _shapes(other) == _shapes(some):
            continue
        try:
            contender.engine.run(other)
        except Exception:
            continue
        moved.append(layout)
    if len(moved) == 1:
        shapes = " and ".join(str(("N", *shape)).replace("'", "") for _, shape in _shapes(arrange(some, moved[0])))
        note = f"Its inputs were given with the {moved[0].value}, {shapes}: the data are laid out otherwise."
        return replace(contender, layout=moved[0], notes=[*contender.notes, note])
    what = first_line(first)
    if moved:
        what += "; with the channels moved it takes them in two ways, so that nothing tells which is right"
    raise BadArgumentError(
        f"data: the model {contender.name!r} cannot be run on them: {what.removeprefix('data: ')}"
    ) from first


def first_line(error: BaseException) -> str:
    """What went wrong, on one line of bearable length."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, QvisError) else f"{type(error).__name__}: {text}".rstrip(": ")
