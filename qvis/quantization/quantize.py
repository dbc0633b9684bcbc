"""Quantizes a model for real: checks what is asked for, has a backend do it, and looks at what the file then holds."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import Any, cast

from qvis import adapters
from qvis.data import load_batches, split
from qvis.data.arrays import arrays, finite_samples
from qvis.data.examples import example_batch
from qvis.equalization.result import Equalization
from qvis.errors import BadArgumentError, OutputError, QvisError, UnsupportedModelError
from qvis.quantization.engines import framework_of, inspect
from qvis.quantization.methods import CELLS, Backend, Cell, Job, Training, Watch, find_cell, unwatched
from qvis.quantization.result import FLOAT_BYTES, QuantizedModel
from qvis.quantization.widths import Widths, choose_widths
from qvis.running import Batch, Track, silently
from qvis.writing import check_target, replacing

SAMPLES = 256
"""Of the calibration data."""
TRAIN_SAMPLES = 100_000


def quantize(
    model: object,
    output: str | PathLike[str],
    method: str = "post_training",
    *,
    calibration_data: object = None,
    train_data: object = None,
    example_inputs: object = None,
    bits: Widths | None = None,
    granularity: str | None = None,
    exclude: str | Iterable[str] = (),
    equalize: bool = False,
    samples: int = SAMPLES,
    train_samples: int = TRAIN_SAMPLES,
    epochs: int = 5,
    learning_rate: float = 1e-4,
    batch_size: int = 32,
    loss: Any = None,
    seed: int = 0,
    name: str | None = None,
    track: Track = silently,
    watch: Watch = unwatched,
) -> QuantizedModel:
    """Quantize a model into a file, with the quantizer of its framework, and look at what the file holds.

    Parameters
    ----------
    model
        A model of PyTorch, Keras or ONNX, or the path of a ``.pt2``, ``.keras``, ``.h5`` or ``.onnx`` file, which must
        be one that you trust. It is not changed.
    output
        The file to write. Keras models become ``.tflite``, PyTorch models ``.pt2``, ``.safetensors`` or ``.onnx``, ONNX
        models ``.onnx``. One that is there is replaced, once the new one is complete.
    method
        ``weight_only``, ``dynamic``, ``post_training`` or ``quantization_aware`` for PyTorch; ``dynamic_range``,
        ``float16``, ``post_training``, ``int16x8`` or ``quantization_aware`` for Keras; ``weight_only``, ``dynamic``
        or ``post_training`` for ONNX. See :data:`qvis.quantization.methods.METHODS`.
    calibration_data
        Where the ranges of activations are found, see :func:`qvis.data.load_batches`: arrays, batches, ``.npz``, a
        folder of images, ``module:function``. ``quantization_aware`` begins with these ranges, and takes some of the
        training data without.
    train_data
        What ``quantization_aware`` trains on, likewise; with labels, or without: then the float model is the teacher.
        Of a tuple of arrays the last one is the labels, as in ``(x, y)``.
    example_inputs
        What the model can be called with, where there are no data: a shape, an array, or a nest of them.
    bits
        The width of weights: a number for all layers, widths by name (32 leaves a layer in float), or the path of such
        widths as ``qvis bits --export json=FILE`` writes them. Default: 8, and 16 for ``float16``.
    granularity
        What shares a step of weights: ``channel`` (the default) or ``tensor``.
    exclude
        Layers to leave in float: names, of modules too, or patterns such as ``head*``.
    equalize
        Whether to equalize the model first, which is kept only where it helps; see :func:`qvis.equalize`.
    samples, train_samples
        Take so many samples of the data at most.
    epochs, learning_rate, batch_size, loss, seed
        Of the training. ``loss`` is ``cross_entropy``, ``mse``, or a function of the framework; default: cross entropy
        for labels that are whole numbers, else the mean squared error. The learning rate falls to zero along a cosine.
    name
        What to call the model.
    track
        Shows how far the work has come.
    watch
        Is called after each step of training.

    Returns
    -------
    QuantizedModel

    Raises
    ------
    BadArgumentError
        The method is not one of the framework's, data are missing or do not suit, a layer is unknown, and so on.
    UnsupportedModelError
        The backend cannot quantize this model; the message says what would work.
    OutputError
        The file cannot be written.
    QvisError
        A package is missing.

    All of these come before anything is written.
    """
    target = _check_output(output, model)
    loaded, framework = _open(model)
    cell = find_cell(framework, method, target.suffix.lower())
    _require(cell)
    _check_needs(cell, calibration_data, train_data)
    _check_numbers(epochs=epochs, learning_rate=learning_rate, batch_size=batch_size)
    if granularity is not None and granularity not in cell.granularities:
        known = " or ".join(map(repr, cell.granularities))
        raise BadArgumentError(f"granularity: got {granularity!r}, and {method} to {cell.suffix} has {known}")
    network = adapters.read(loaded, name=name or _name(model))
    widths = choose_widths(network, cell, bits, exclude)
    notes: list[str] = []
    calibration = _load(calibration_data, "calibration_data", samples, batch_size, notes)
    training = None
    if cell.needs == "training":
        labelled = True if isinstance(train_data, tuple) else None
        taught = _load(train_data, "train_data", train_samples, batch_size, notes, labelled)
        _check_labels(taught)
        training = Training(taught, epochs, learning_rate, batch_size, seed, loss, watch)
    example = _example(calibration or (training.batches if training else ()), example_inputs)
    job = Job(
        model=loaded,
        network=network,
        cell=cell,
        bits=widths,
        granularity=granularity or cell.granularities[0],
        calibration=calibration,
        training=training,
        example=example,
        track=track,
        notes=notes,
    )
    backend = cast(Backend, import_module(f"qvis.quantization.backends.{cell.backend}"))
    backend.check(job)
    equalized = _equalize(job, seed) if equalize else None
    if equalized is not None and equalized.accepted:
        job = replace(job, model=equalized.model, network=adapters.read(equalized.model, name=network.name))
    with replacing(target, "output") as file, _explaining(job):
        history = backend.convert(job, file)
        contents = inspect(file)
    return QuantizedModel(
        path=target,
        name=network.name,
        framework=network.framework,
        method=method,
        bits=widths,
        granularity=job.granularity,
        contents=contents,
        float_bytes=FLOAT_BYTES * network.parameters,
        samples=sum(batch.size for batch in calibration),
        epochs=history,
        equalization=equalized,
        notes=tuple(dict.fromkeys(notes)),
    )


# ---------------------------------------------------------------------------------------------------------------------
# What was asked for


def _check_output(output: str | PathLike[str], model: object) -> Path:
    """The file to write to, if it can be written."""
    target = Path(output)
    check_target(target, "output")
    if isinstance(model, (str, PathLike)) and target.exists() and Path(model).exists() and target.samefile(model):
        raise OutputError(f"output: {str(target)!r} is the model itself, which stays as it is; name another file")
    if not os.access(target.parent, os.W_OK):
        raise OutputError(f"output: {str(target.parent)!r} cannot be written to; choose another folder")
    return target


def _open(model: object) -> tuple[Any, str]:
    """The model as an object, and its framework."""
    loaded = adapters.load(model)
    framework = framework_of(loaded)
    if not framework:
        raise UnsupportedModelError(
            f"model: an object of type {type(loaded).__name__} cannot be quantized; give a model of PyTorch, Keras or "
            "ONNX"
        )
    return loaded, framework


def _name(model: object) -> str | None:
    """What a file is called; None leaves it to the adapter."""
    return Path(model).name if isinstance(model, (str, PathLike)) else None


def _require(cell: Cell) -> None:
    missing = [package for package in cell.packages if find_spec(package) is None]
    if missing:
        extra = "tensorflow" if cell.framework == "keras" else "quantize"
        raise QvisError(
            f"method: {cell.method} to {cell.suffix} needs {' and '.join(missing)}; "
            f'install what is missing with: pip install "qvis[{extra}]"'
        )


def _check_needs(cell: Cell, calibration_data: object, train_data: object) -> None:
    """Whether the data are there that the method cannot do without, and none that it has no use for."""
    if cell.needs == "calibration" and calibration_data is None:
        raise BadArgumentError(
            f"calibration_data: {cell.method} finds the ranges of activations on data, and got none; give some hundred "
            f"typical samples, or choose a method without: {', '.join(_without_data(cell))}"
        )
    if cell.needs == "training" and train_data is None:
        raise BadArgumentError(
            f"train_data: {cell.method} trains, and got none; give the data that the model was trained on, or choose "
            "post_training"
        )
    if cell.needs != "training" and train_data is not None:
        raise BadArgumentError(
            f"train_data: {cell.method} trains nothing; leave it out, give it as calibration_data, or choose "
            "quantization_aware"
        )


def _without_data(cell: Cell) -> list[str]:
    return list(dict.fromkeys(one.method for one in CELLS if one.framework == cell.framework and not one.needs))


def _check_numbers(*, epochs: int, learning_rate: float, batch_size: int) -> None:
    for argument, number, least in (("epochs", epochs, 0), ("batch_size", batch_size, 1)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise BadArgumentError(f"{argument}: got {number!r}, expected a whole number of {least} or more")
    if isinstance(learning_rate, bool) or not isinstance(learning_rate, (int, float)):
        raise BadArgumentError(f"learning_rate: got {learning_rate!r}, expected a number such as 1e-4")
    if not (isfinite(learning_rate) and learning_rate > 0):
        raise BadArgumentError(f"learning_rate: got {learning_rate!r}, expected a number above 0 such as 1e-4")


# ---------------------------------------------------------------------------------------------------------------------
# Data


def _load(
    data: object, argument: str, samples: int, batch_size: int, notes: list[str], labelled: bool | None = None
) -> list[Batch]:
    """Samples in batches; none without data. Errors name the argument."""
    if data is None:
        return []
    try:
        return load_batches(data, labelled=labelled, samples=samples, batch_size=batch_size, notes=notes)
    except BadArgumentError as error:
        raise BadArgumentError(re.sub(r"\binputs\b", argument, str(error))) from error


def _check_labels(batches: Sequence[Batch]) -> None:
    for batch in batches:
        for name, array in arrays(batch.labels, "labels"):
            if not finite_samples(array).all():
                raise BadArgumentError(f"train_data: {name} hold NaN or infinite values; leave such samples out")


def _example(batches: Sequence[Batch], example_inputs: object) -> Batch | None:
    """Some samples to call the model with: two where there are as many, so that no axis of 1 is taken for fixed."""
    if example_inputs is not None:
        return example_batch(example_inputs)
    return split(batches[0], 2)[0] if batches else None


# ---------------------------------------------------------------------------------------------------------------------
# Around the backend


def _equalize(job: Job, seed: int) -> Equalization:
    """The model scaled for the narrowest of the widths."""
    from qvis.equalization.equalize import equalize

    if not job.calibration and job.example is None:
        raise BadArgumentError(
            "equalize: it is verified by running the model, and there are no inputs; give calibration_data or "
            "example_inputs"
        )
    return equalize(
        job.model,
        list(job.calibration) or None,
        example_inputs=None if job.calibration else job.example,
        bits=min(*job.bits.values(), 8),
        granularity=job.granularity,
        # where activations become 8-bit integers, they are judged too
        activations=bool(job.cell.needs) and min(job.bits.values()) == 8,
        seed=seed,
        name=job.network.name,
        track=job.track,
    )


@contextmanager
def _explaining(job: Job) -> Iterator[None]:
    """Whatever a quantizer raises, in one line that keeps it as the cause."""
    try:
        yield
    except (QvisError, OSError):
        raise
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise UnsupportedModelError(
            f"model: {job.network.name} cannot be quantized by {job.cell.method} to {job.cell.suffix} ({text[:300]}); "
            "try another method or output, or leave layers in float with exclude"
        ) from error
