"""From a network's weights to findings about each layer, in NumPy alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from qvis.analysis.blocks import Pool, pool
from qvis.analysis.damage import Sensitivity
from qvis.analysis.problems import find_flags, find_reasons, noise_share
from qvis.analysis.rounding import checked_bits, rounding_noise
from qvis.analysis.statistics import channel_statistics
from qvis.analysis.verdicts import judge
from qvis.layers import Analysis, FloatArray, Layer, LayerAnalysis, Network, Severity, Thresholds
from qvis.running import Track, silently
from qvis.words import encodable

if TYPE_CHECKING:
    from qvis.analysis.grids import LayerGrids

WIDTHS = (8, 6, 4, 3, 2)
"""Widths that are looked at beside the one that is judged."""

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
    inputs: Any = None,
    example_inputs: Any = None,
    labels: Any = None,
    loss: Any = None,
    measure: str = "none",
    samples: int = 64,
    fold: bool = True,
    sensitivity: Sensitivity | None = None,
    progress: Progress = iter,
    track: Track = silently,
) -> Analysis:
    """Find out what quantization would do to a model; nothing is written, and the model is not changed.

    Layers are judged by the best evidence at hand: measured, predicted from data, predicted from made-up inputs, or
    from the weights alone.

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
    inputs, example_inputs, labels, loss, measure, samples
        Data to run the model on, and what to do with them; see :func:`qvis.sensitivity`. Without ``inputs`` and
        ``example_inputs`` the model is not run.
    fold
        Judge weights with normalizations folded in, where the model's graph is known: those are quantized.
    sensitivity
        What :func:`qvis.sensitivity` found for this model before, instead of running it now.
    progress
        Wraps the layers, to show how far the work has come.
    track
        The same for running the model.

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
    from qvis.analysis.preparing import prepare
    from qvis.analysis.sensitivity import sensitivity as find_sensitivity

    bits = checked_bits(bits)
    if sensitivity is None and (inputs is not None or example_inputs is not None):
        sensitivity = find_sensitivity(
            model,
            inputs,
            example_inputs=example_inputs,
            labels=labels,
            loss=loss,
            bits=tuple(dict.fromkeys((bits, *WIDTHS))),
            measure=measure,
            samples=samples,
            fold=fold,
            selected_layers=selected_layers,
            name=name,
            track=track,
        )
        assert sensitivity.network is not None
        network, refused = sensitivity.network, sensitivity.refused
    else:
        ready = prepare(model, fold=fold, name=name, channel_axis=channel_axis)
        if selected_layers is not None:
            ready = replace(ready, network=adapters.select(ready.network, selected_layers))
        network, refused = ready.network, ready.refused
    analysis = analyze_network(network, bits=bits, thresholds=thresholds, progress=progress)
    return judge(replace(analysis, refused=refused), sensitivity)


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
        fingerprint=fingerprint(layers),
        graph=network.graph,
        no_graph=network.no_graph,
    )


def analyze_layer(layer: Layer, bits: int, thresholds: Thresholds, workers: Pool | None = None) -> LayerAnalysis:
    """Read the weight once, describe its channels, round it, and judge."""
    workers = workers or Pool()
    weight = np.ascontiguousarray(layer.weight)
    digest = workers.submit(lambda: digest_weight(weight))
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
        norms=layer.norms,
        stored=None if layer.stored is None else analyze_layer(layer.stored, bits, thresholds, workers),
    )


def digest_weight(weight: FloatArray) -> str:
    """sha256 of the matrix as little-endian numbers, row by row."""
    little = weight.astype(weight.dtype.newbyteorder("<"), copy=False)
    return hashlib.sha256(little.data.cast("B")).hexdigest()


def fingerprint(layers: Iterable[LayerAnalysis | LayerGrids]) -> str:
    """sha256 of the names, shapes and weights of layers, as hexadecimal digits."""
    whole = hashlib.sha256()
    for layer in layers:
        whole.update(f"{layer.name}\0{layer.shape}\0{layer.digest}\n".encode())
    return whole.hexdigest()
