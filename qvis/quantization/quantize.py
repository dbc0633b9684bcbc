"""Quantizes a model for real: checks what was asked for, has a backend do it, and opens the file to see what is in it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from math import isfinite
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from qvis import adapters
from qvis.data import load_batches, split
from qvis.data.examples import example_batch
from qvis.equalization.result import Equalization
from qvis.errors import BadArgumentError, OutputError, QvisError, UnsupportedModelError
from qvis.layers import Network
from qvis.quantization.engines import framework_of, inspect
from qvis.quantization.methods import (
    FLOAT,
    NAMES,
    Backend,
    Cell,
    Job,
    Training,
    Watch,
    find_cell,
    unwatched,
)
from qvis.quantization.result import FLOAT_BYTES, QuantizedModel
from qvis.running import Batch, Track, silently

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
    bits: int | str | PathLike[str] | Mapping[str, int] | None = None,
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
    framework, loaded = _open(model)
    cell = find_cell(framework, method, target.suffix.lower())
    _require(cell)
    settings = _check_numbers(epochs, learning_rate, batch_size)
    granularity = _check_granularity(granularity, cell)
    _check_data(cell, calibration_data, train_data, equalize)
    notes: list[str] = []
    calibration = _load(calibration_data, "calibration_data", samples, batch_size, notes)
    trained_on = _load(train_data, "train_data", train_samples, batch_size, notes)
    example = _example(calibration, trained_on, example_inputs)
    network = adapters.read(loaded, name=name or _name(model))
    widths = _widths(network, bits, exclude, cell)
    training = Training(trained_on, seed=seed, loss=loss, watch=watch, **settings) if trained_on else None

    job = Job(loaded, network, cell, widths, granularity, calibration, training, example, track, notes)
    backend = cast(Backend, import_module(f"qvis.quantization.backends.{cell.backend}"))
    backend.check(job)
    equalized = _equalize(job, min(width for width in widths.values()), batch_size) if equalize else None
    if equalized is not None:
        new = adapters.read(equalized.model, name=network.name)
        names = {layer.name for layer in new.layers}
        job = replace(job, model=equalized.model, network=new, bits={n: b for n, b in widths.items() if n in names})
        backend.check(job)
    with _replacing(target) as new_file:
        history = backend.convert(job, new_file)
        contents = inspect(new_file)
    return QuantizedModel(
        path=target,
        name=network.name,
        framework=network.framework,
        method=method,
        bits=dict(widths),
        granularity=granularity,
        contents=contents,
        float_bytes=FLOAT_BYTES * network.parameters,
        samples=sum(batch.size for batch in calibration),
        epochs=history,
        equalization=equalized,
        notes=tuple(dict.fromkeys(notes)),
    )
