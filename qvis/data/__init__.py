"""Data to run models on: turns all that users call data into batches, and cuts them up.

:func:`load_batches` reads samples, :func:`example_batch` shapes. No framework is imported; a tensor stays one of its
own framework, on its device.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from os import PathLike
from typing import Any

import numpy as np

from qvis.data.arrays import (
    arrays,
    bytes_of,
    check_dense,
    check_numeric,
    convert,
    count,
    finite_samples,
    is_array,
    take,
)
from qvis.data.examples import example_batch, noise_like, parse_shapes
from qvis.data.files import LABELS, read
from qvis.data.images import Images
from qvis.errors import BadArgumentError, QvisError
from qvis.layers import IntArray
from qvis.running import Batch

__all__ = ["ACCEPTED", "Images", "example_batch", "load_batches", "noise_like", "parse_shapes", "split"]

ACCEPTED = (
    "an array or a tensor with the samples first, a tuple of them, a mapping of them by name, an iterable of batches "
    "such as a DataLoader, or the path of a .npz or .npy file or of a folder of images"
)
_GIB = 2**30
_GOLDEN = (5**0.5 - 1) / 2
_END = object()


def load_batches(
    inputs: object,
    *,
    labels: object = None,
    labelled: bool | None = None,
    samples: int = 128,
    batch_size: int = 32,
    images: Images | None = None,
    max_bytes: int = _GIB,
    notes: list[str] | None = None,
) -> list[Batch]:
    """Take samples out of data.

    Values and types stay as they are, except that images of a folder are decoded: bytes are not scaled to [0, 1]. What
    is kept is a copy, so that a loader may use its memory again.

    Parameters
    ----------
    inputs
        What may be called data:

        - *Arrays of all samples*, the samples along the first axis: an array or a tensor (of PyTorch or TensorFlow; all
          else becomes a NumPy array), a tuple of arrays (several positional inputs), or a mapping of inputs by name. A
          name ``labels``, ``label`` or ``y`` means labels.
        - *An iterable of batches*: a DataLoader, a ``tf.data.Dataset``, a generator, a list. Each is an array, a
          mapping as above, or a tuple or list: of one part, the inputs; of two, inputs and labels; of more,
          ``labelled`` must say. The inputs in it may be an array, a mapping, or a tuple or list of positional inputs.
        - *A path*: ``.npy``; ``.npz`` with ``x`` and maybe ``y`` (labels), with ``arr_0``, ``arr_1``, ... (positional
          inputs), or with inputs by name; a folder of images, or of folders of images that are the classes; or
          ``package.module:function`` or ``file.py:function``, code that is run and gives any of the above, or a pair of
          inputs and labels.
    labels
        The labels for arrays of all samples that have none yet.
    labelled
        Whether the last part of a tuple is labels, and whether a mapping holds labels. Default: as said above.
    samples
        Take at most so many: of arrays and images, one out of each of so many equal stretches, so that data sorted by
        class give all classes; of an iterable, the first, and no batch is read after them.
    batch_size
        The samples of a batch at most. Smaller batches of an iterable are not merged.
    images
        How images become numbers.
    max_bytes
        Take fewer samples where they would need more memory, and say so in ``notes``.
    notes
        What a reader must know is added to it.

    Returns
    -------
    list of Batch
        At least one, all with labels or none. The same each time for the same data.

    Raises
    ------
    BadArgumentError
        No samples, NaN or infinite inputs, no numbers, arrays of different lengths, or data of an unknown kind.
    """
    for name, number in (("samples", samples), ("batch_size", batch_size), ("max_bytes", max_bytes)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise BadArgumentError(f"{name}: got {number!r}, expected a whole number of 1 or more")
    notes = [] if notes is None else notes
    with _random_state_kept():
        if isinstance(inputs, (str, PathLike)):
            inputs, own = read(inputs, images or Images(), notes)
            if own is not None and labels is not None:
                raise BadArgumentError("labels: the data hold labels already; leave the argument out")
            labels = own if own is not None else labels
        limits = _Limits(samples, batch_size, max_bytes, notes)
        whole = _whole(inputs, labels, labelled)
        return limits.spread(whole) if whole else limits.stream(_batches(inputs, labels), labelled)


def split(batch: Batch, size: int) -> list[Batch]:
    """The batch in batches of ``size`` samples or, the last, fewer.

    Arrays and tensors whose first axis is as long as the batch are sliced; all else is handed on as it is.
    """
    if size < 1:
        raise BadArgumentError(f"size: got {size!r}, expected 1 or more")

    def part(start: int, end: int) -> Batch:
        def cut(array: Any) -> Any:
            return array[start:end] if count(array) == batch.size else array

        args, kwargs, labels = (convert(nest, cut) for nest in (batch.args, batch.kwargs, batch.labels))
        return Batch(args, kwargs, labels, end - start)

    return [part(start, min(start + size, batch.size)) for start in range(0, batch.size, size)]


# ---------------------------------------------------------------------------------------------------------------------
# How much is taken


class _Limits:
    """Takes samples until there are enough, or until no more fit into memory."""

    def __init__(self, samples: int, batch_size: int, max_bytes: int, notes: list[str]) -> None:
        self.samples, self.batch_size, self.bytes, self.notes = samples, batch_size, max_bytes, notes
        self.taken: list[Batch] = []
        self.number = 0

    def spread(self, whole: Batch) -> list[Batch]:
        """Samples from everywhere in arrays of all samples."""
        number = self._fitting(whole, min(self.samples, whole.size))
        self._take(whole, spread(whole.size, number), 0)
        return self.taken

    def stream(self, batches: Iterator[Any], labelled: bool | None) -> list[Batch]:
        """The first samples of an iterable."""
        read = 0
        for number in itertools.count():
            item = _next(batches, number) if self.number < self.samples else _END
            if item is _END:
                break
            batch = _parted(item, labelled, f"inputs: batch {number}")
            if self.taken and (batch.labels is None) != (self.taken[0].labels is None):
                raise BadArgumentError("inputs: some batches have labels and some have none; expected the same of all")
            wanted = min(batch.size, self.samples - self.number)
            fitting = self._fitting(batch, wanted)
            self._take(batch, np.arange(fitting), read)
            read += batch.size
            if fitting < wanted:
                break
        if not self.taken:
            raise BadArgumentError("inputs: there is not one batch in it; a generator gives its batches only once")
        return self.taken

    def _fitting(self, batch: Batch, wanted: int) -> int:
        """How many of the wanted samples fit into memory."""
        nests = (batch.args, batch.kwargs, batch.labels)
        each = sum(bytes_of(array) for nest in nests for _, array in arrays(nest, "")) / batch.size
        fitting = min(wanted, int(self.bytes / each)) if each else wanted
        if fitting + self.number < 1:
            raise BadArgumentError(
                f"inputs: one sample takes {_spell_bytes(each)}, more than max_bytes={self.bytes}; give smaller samples"
            )
        if fitting < wanted:
            self.notes.append(
                f"inputs: {fitting + self.number} samples were taken instead of {self.number + wanted}, "
                f"since more would need too much memory"
            )
        self.bytes -= int(each * fitting)
        return fitting

    def _take(self, batch: Batch, places: IntArray, first: int) -> None:
        """Copy the samples at these places, in batches; check that they are numbers. ``first`` is the batch's own."""
        for start in range(0, len(places), self.batch_size):
            chosen = places[start : start + self.batch_size]
            nests = (batch.args, batch.kwargs, batch.labels)
            args, kwargs, labels = (convert(nest, partial(take, places=chosen)) for nest in nests)
            for name, array in arrays(labels, "labels"):
                check_numeric(array, name)
            for name, array in _inputs(args, kwargs):
                check_numeric(array, name)
                finite = finite_samples(array)
                if not finite.all():
                    raise BadArgumentError(
                        f"{name}: sample {first + int(chosen[finite.argmin()])} holds NaN or infinite values; "
                        "leave such samples out"
                    )
            self.taken.append(Batch(args, kwargs, labels, len(chosen)))
            self.number += len(chosen)


def spread(available: int, number: int) -> IntArray:
    """Which of the ``available`` samples to take: one from each of ``number`` equal stretches, (number,), ascending.

    Where in its stretch moves by the golden ratio, which fills the stretch evenly (Knuth, The Art of Computer
    Programming 3, 6.4, theorem S), so that labels that come in turns, 0 1 2 0 1 2, do not give one class either.
    """
    ends = np.arange(number + 1) * available // number
    place = (np.arange(number) * _GOLDEN) % 1
    chosen: IntArray = ends[:-1] + (place * np.diff(ends)).astype(np.int64)
    return chosen


# ---------------------------------------------------------------------------------------------------------------------
# What is inputs and what is labels


def _whole(inputs: Any, labels: Any, labelled: bool | None) -> Batch | None:
    """Arrays of all samples as one big batch; None for an iterable of batches."""
    inputs, labels = _plain(inputs), _plain(labels)
    if not (is_array(inputs) or isinstance(inputs, (Batch, Mapping, tuple))):
        return None
    if labels is not None:
        holds = bool(labelled) and not is_array(inputs)  # a file of inputs may bring labels of its own
        batch = _parted(inputs, labelled if isinstance(inputs, Mapping) else holds, "inputs")
        if batch.labels is not None:
            raise BadArgumentError("labels: the data hold labels already; leave the argument out")
        labels = np.asarray(labels) if isinstance(labels, list) else labels
        return _checked(batch.args, batch.kwargs, labels, "inputs")
    return _parted(inputs, bool(labelled) if isinstance(inputs, tuple) else labelled, "inputs")


def _batches(inputs: Any, labels: object) -> Iterator[Any]:
    """The batches of an iterable."""
    if labels is not None:
        raise BadArgumentError("labels: an iterable brings its labels itself; let each batch be (inputs, labels)")
    kinds = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(inputs).__mro__}
    if "torch.utils.data.dataset.Dataset" in kinds:
        raise BadArgumentError(
            "inputs: a Dataset of PyTorch gives single samples; wrap it in torch.utils.data.DataLoader(dataset, "
            "batch_size=32), with batch_size=None if it gives batches"
        )
    if hasattr(inputs, "__getitem__") and hasattr(inputs, "__len__") and not hasattr(inputs, "__iter__"):
        return (inputs[place] for place in range(len(inputs)))
    if isinstance(inputs, (bytes, set, frozenset)) or not isinstance(inputs, Iterable):
        raise BadArgumentError(f"inputs: got an object of type {type(inputs).__name__}; give {ACCEPTED}")
    return iter(inputs)


def _next(batches: Iterator[Any], number: int) -> Any:
    try:
        return next(batches, _END)
    except QvisError:
        raise
    except Exception as error:  # whatever the user's loader raises, in one line that keeps it as the cause
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadArgumentError(f"inputs: reading batch {number} failed with {text[:300]}") from error


def _parted(item: Any, labelled: bool | None, what: str) -> Batch:
    """One batch, its labels taken out by the rules that :func:`load_batches` states."""
    item = _plain(item)
    labels = None
    if isinstance(item, Batch):
        return _checked(item.args, item.kwargs, item.labels, what)
    if isinstance(item, Mapping):
        names = [name for name in LABELS if name in item and labelled is not False]
        if len(names) > 1:
            raise BadArgumentError(f"{what}: labels are among {' and '.join(map(repr, names))}; expected one of them")
        labels = item[names[0]] if names else None
        item = {name: value for name, value in item.items() if name not in names}
    elif isinstance(item, (tuple, list)):
        if len(item) > 2 and labelled is None:
            raise BadArgumentError(
                f"{what} has {len(item)} parts; say labelled=True if the last is the labels and all others are inputs, "
                "labelled=False if all are inputs, or give (inputs, labels)"
            )
        if labelled or (labelled is None and len(item) == 2):
            item, labels = item[:-1], item[-1]
        item = item[0] if len(item) == 1 else item
    if labelled and labels is None:
        raise BadArgumentError(f"{what}: labelled=True, and there are no labels; give (inputs, labels)")
    item = _plain(item)
    kwargs = dict(item) if isinstance(item, Mapping) else {}
    args = tuple(item) if isinstance(item, (tuple, list)) else () if isinstance(item, Mapping) else (item,)
    return _checked(args, kwargs, labels, what)


def _checked(args: tuple[Any, ...], kwargs: Mapping[str, Any], labels: Any, what: str) -> Batch:
    """The batch with its size, if all its arrays have as many samples."""
    args, kwargs, labels = _plain(args), _plain(kwargs), _plain(labels)
    if not all(isinstance(name, str) for name in kwargs):
        raise BadArgumentError(f"{what}: inputs by name need texts as names, not {list(kwargs)[:3]!r}")
    found = [*_inputs(args, kwargs), *arrays(labels, "labels")]
    where = what.removeprefix("inputs")  # ": batch 3"
    for name, array in found:
        check_dense(array, name + where)
        shape = tuple(int(length) for length in array.shape)
        if count(array) == 0:
            problem = "no samples" if shape else "no axis of samples"
            raise BadArgumentError(f"{name}{where}: its shape is {shape}, which has {problem}; give batches of samples")
    sizes = [count(array) for _, array in found]
    if not any(_inputs(args, kwargs)):
        raise BadArgumentError(f"{what}: there are no inputs in it; give {ACCEPTED}")
    for (name, _), size in zip(found, sizes, strict=True):
        if size != sizes[0]:
            raise BadArgumentError(
                f"{name}{where}: it has {size} samples and {found[0][0]} has {sizes[0]}; expected the same number"
            )
    return Batch(args, kwargs, labels, sizes[0])


def _inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from arrays(args[0] if len(args) == 1 else args, "inputs")
    yield from arrays(kwargs, "inputs")


def _plain(nest: Any) -> Any:
    """The nest with tables of pandas and its like, whose rows are no places, as arrays."""
    if hasattr(nest, "to_numpy"):
        return nest.to_numpy()
    if isinstance(nest, Mapping):
        return {name: _plain(value) for name, value in nest.items()}
    if isinstance(nest, (tuple, list)) and not hasattr(nest, "_fields"):
        return type(nest)([_plain(value) for value in nest])
    return nest


def _spell_bytes(number: float) -> str:
    return f"{number / _GIB:.2g} GiB" if number >= _GIB / 100 else f"{number:.0f} bytes"


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Leave random numbers as they were: a DataLoader draws a seed even where it does not shuffle."""
    torch = sys.modules.get("torch")
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state() if torch else None
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        if torch and kept[2] is not None:
            torch.set_rng_state(kept[2])
