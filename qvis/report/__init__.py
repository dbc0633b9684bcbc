"""The three reports on weights, and what they return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from qvis.analysis import Progress, analyze
from qvis.analysis.comparison import compare
from qvis.layers import Analysis, Thresholds
from qvis.report.document import summarize, summarize_changes
from qvis.report.report import Report
from qvis.running import Track, silently

__all__ = [
    "Report",
    "visualize_changes_after_optimization",
    "visualize_relative_weight_ranges",
    "visualize_weight_ranges",
]

Path = str | PathLike[str]


def visualize_weight_ranges(
    model: Any,
    out_dir: Path,
    *,
    selected_layers: str | Sequence[str] | None = None,
    bits: int = 8,
    thresholds: Thresholds | None = None,
    name: str | None = None,
    formats: Sequence[str] = ("html",),
    channel_axis: int | Mapping[str, int] | None = None,
    inputs: Any = None,
    example_inputs: Any = None,
    fold: bool = True,
    progress: Progress = iter,
    track: Track = silently,
) -> Report:
    """Write ``weight_ranges.html``: minimum, quartiles, mean and maximum of every channel of every layer.

    Parameters
    ----------
    model
        A ``torch.nn.Module``, a Keras, ONNX or exported model, or the path of a file or folder. It is not changed. Or
        what :func:`qvis.analyze` made of one: then the other arguments of the analysis are of no account.
    out_dir
        The folder to write to; made when missing.
    selected_layers
        Names or glob patterns (``"features.*"``); all layers by default.
    bits
        The width of the integer grid that the layers are judged for, 2 to 16.
    thresholds
        Where findings begin.
    name
        What the report calls the model; its class or file name by default.
    formats
        Any of ``"html"``, ``"json"`` and ``"md"``.
    channel_axis
        For a bare checkpoint, the axis of the output channels: of all tensors, or by name or pattern.
    inputs, example_inputs
        Data to run the model on, or else the shapes of its inputs: then layers are judged by what quantization does to
        the output of the model; see :func:`qvis.sensitivity`. By default the model is not run.
    fold
        Show and judge weights with normalizations folded in, where the model's graph is known: those are quantized.
        The page can show the stored weights as well.
    progress, track
        Wrap the layers, and the steps of running the model, to show how far the work has come.

    Raises
    ------
    UnsupportedModelError
        The model, or a tensor in it, cannot be read.
    UnknownLayerError
        An entry of ``selected_layers`` matches nothing.
    BadArgumentError
        An argument is out of bounds.
    OutputError
        The folder cannot be written, or holds a file of that name that qvis did not write.
    """
    analysis = (
        model
        if isinstance(model, Analysis)
        else analyze(
            model,
            selected_layers=selected_layers,
            bits=bits,
            thresholds=thresholds,
            name=name,
            channel_axis=channel_axis,
            inputs=inputs,
            example_inputs=example_inputs,
            fold=fold,
            progress=progress,
            track=track,
        )
    )
    return Report(summarize(analysis, "weight_ranges"), analysis.layers).write(out_dir, formats)


def visualize_relative_weight_ranges(
    model: Any,
    out_dir: Path,
    *,
    selected_layers: str | Sequence[str] | None = None,
    bits: int = 8,
    thresholds: Thresholds | None = None,
    name: str | None = None,
    formats: Sequence[str] = ("html",),
    channel_axis: int | Mapping[str, int] | None = None,
    inputs: Any = None,
    example_inputs: Any = None,
    fold: bool = True,
    progress: Progress = iter,
    track: Track = silently,
) -> Report:
    """Write ``relative_weight_ranges.html``: which layers rounding would hurt, by the ranges of their channels.

    The arguments, and what is raised, are those of :func:`visualize_weight_ranges`; so is what is found. The figures of
    relative ranges come first.
    """
    analysis = (
        model
        if isinstance(model, Analysis)
        else analyze(
            model,
            selected_layers=selected_layers,
            bits=bits,
            thresholds=thresholds,
            name=name,
            channel_axis=channel_axis,
            inputs=inputs,
            example_inputs=example_inputs,
            fold=fold,
            progress=progress,
            track=track,
        )
    )
    return Report(summarize(analysis, "relative_weight_ranges"), analysis.layers).write(out_dir, formats)


def visualize_changes_after_optimization(
    old_model: Any,
    new_model: Any,
    out_dir: Path,
    *,
    selected_layers: str | Sequence[str] | None = None,
    bits: int = 8,
    thresholds: Thresholds | None = None,
    names: tuple[str | None, str | None] = (None, None),
    formats: Sequence[str] = ("html",),
    channel_axis: int | Mapping[str, int] | None = None,
    inputs: Any = None,
    example_inputs: Any = None,
    fold: bool = True,
    progress: Progress = iter,
    track: Track = silently,
) -> Report:
    """Write ``changes_after_optimization.html``: two versions of a model, layer by layer, on common axes.

    Layers are matched by name, and across formats by their weights. Those that only one of the models has, or that
    differ in shape, are named on the page. ``names`` are what the report calls the two; the other arguments, and what
    is raised, are those of :func:`visualize_weight_ranges`. ``selected_layers`` must match in both models.
    """
    before, after = (
        model
        if isinstance(model, Analysis)
        else analyze(
            model,
            selected_layers=selected_layers,
            bits=bits,
            thresholds=thresholds,
            name=name,
            channel_axis=channel_axis,
            inputs=inputs,
            example_inputs=example_inputs,
            fold=fold,
            progress=progress,
            track=track,
        )
        for model, name in zip((old_model, new_model), names, strict=True)
    )
    comparison = compare(before, after)
    return Report(summarize_changes(comparison), comparison.layers).write(out_dir, formats)
