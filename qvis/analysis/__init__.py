"""From a network's weights to findings about each layer, in NumPy alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qvis.analysis.blocks import Pool, pool
from qvis.analysis.problems import find_flags, find_reasons, noise_share
from qvis.analysis.rounding import checked_bits, rounding_noise
from qvis.analysis.statistics import channel_statistics
from qvis.layers import Analysis, FloatArray, Layer, LayerAnalysis, Network, Severity, Thresholds
from qvis.words import encodable

Progress = Callable[[Sequence[Layer]], Iterator[Layer]]
"""Yields the layers it is given, and shows how far their consumer has come."""


def analyze(
    model: Any,
    *,
    selected_layers: str | Sequence[str] | None = None,
    bits: int = 8,
    thresholds: Thresholds | None = None,
    name: str | None = None,
    channel_axis: int | Mapping[str, int] | None = None,
    progress: Progress = iter,
) -> Analysis:
    """Find out what rounding its weights would do to a model; nothing is written, and the model is not changed.

    Parameters
    ----------
    model
        A ``torch.nn.Module``, a Keras, ONNX or exported model, or the path of a file or folder.
    selected_layers
        Names or glob patterns (``"features.*"``); all layers by default.
    bits
        The width of the grid that is judged, 2 to 16.
    thresholds
        Where findings begin.
    name
        What the report calls the model; its class or file name by default.
    channel_axis
        For a bare checkpoint, the axis of the output channels: of all tensors, or by name or pattern.
    progress
        Wraps the layers, to show how far the work has come.

    Raises
    ------
    UnsupportedModelError
        The model, or a tensor in it, cannot be read.
    UnknownLayerError
        An entry of ``selected_layers`` matches nothing.
    BadArgumentError
        ``bits`` is out of bounds.
    """
    from qvis import adapters

    network = adapters.read(model, selected_layers, name=name, channel_axis=channel_axis)
    return analyze_network(network, bits=bits, thresholds=thresholds, progress=progress)


def analyze_network(
    network: Network, *, bits: int = 8, thresholds: Thresholds | None = None, progress: Progress = iter
) -> Analysis:
    """The same for a network that an adapter has read."""
    bits = checked_bits(bits)
    thresholds = thresholds or Thresholds()
    with pool() as workers:
        layers = tuple(analyze_layer(layer, bits, thresholds, workers) for layer in progress(network.layers))
    return Analysis(
        name=encodable(network.name),
        framework=network.framework,
        parameters=network.parameters,
        layers=layers,
        skipped=tuple(replace(skipped, name=encodable(skipped.name)) for skipped in network.skipped),
        thresholds=thresholds,
        bits=bits,
        fingerprint=_fingerprint(layers),
    )


def analyze_layer(layer: Layer, bits: int, thresholds: Thresholds, workers: Pool | None = None) -> LayerAnalysis:
    """Read the weight once, describe its channels, round it, and judge."""
    workers = workers or Pool()
    weight = np.ascontiguousarray(layer.weight)
    digest = workers.submit(lambda: _digest(weight))
    statistics = channel_statistics(weight, dead=thresholds.dead, pool=workers)
    rounding = rounding_noise(weight, statistics, bits=bits, pool=workers)
    flags = find_flags(statistics, rounding, thresholds)
    share = noise_share(statistics, rounding, flags)
    share_channel = noise_share(statistics, rounding, flags, per_channel=True)
    reasons = find_reasons(statistics, rounding, flags, thresholds, (share, share_channel))
    return LayerAnalysis(
        name=encodable(layer.name),
        op=layer.op,
        shape=layer.shape,
        dtype=layer.dtype,
        channels=layer.channels,
        aliases=tuple(encodable(alias) for alias in layer.aliases),
        notes=layer.notes,
        statistics=statistics,
        rounding=rounding,
        noise_share=share,
        noise_share_channel=share_channel,
        severity=max((reason.severity for reason in reasons), key=lambda severity: severity.rank, default=Severity.OK),
        reasons=reasons,
        flags=flags,
        digest=digest(),
    )


def _digest(weight: FloatArray) -> str:
    """sha256 of the matrix as little-endian numbers, row by row."""
    little = weight.astype(weight.dtype.newbyteorder("<"), copy=False)
    return hashlib.sha256(little.data.cast("B")).hexdigest()


def _fingerprint(layers: Sequence[LayerAnalysis]) -> str:
    whole = hashlib.sha256()
    for layer in layers:
        whole.update(f"{layer.name}\0{layer.shape}\0{layer.digest}\n".encode())
    return whole.hexdigest()
