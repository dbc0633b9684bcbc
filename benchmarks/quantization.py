"""What each way to quantize really brings and costs, on models that were really trained, and what was predicted.

    python benchmarks/quantization.py
    python benchmarks/quantization.py --data FOLDER --models resnet56 --methods post_training quantization_aware

Trains some models on first use and keeps them. Every method that a framework has is carried out by ``qvis.quantize``
with training data, and what it wrote is run by ``qvis.benchmark`` on held-out data, beside the float model in the same
kind of engine. Then quantizing after training and with training are compared at fewer bits.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import log10, nan
from pathlib import Path
from typing import Any

import numpy as np
from rounding import count, part
from trained import Sources, Subject
from trained.command import Script, make_parser
from trained.pictures import digit_pictures

import qvis
from qvis.adapters.factories import put_weights
from qvis.adapters.torch.integers import load_quantized
from qvis.benchmarking.records import Benchmark, Variant
from qvis.quantization.engines import framework_of
from qvis.quantization.methods import CELLS, METHODS, Cell

MODELS = ("digits", "mobilenet", "transformer", "keras", "mobilenet_onnx", "resnet56", "minilm")
ROUNDED = {
    "weight_only": ("weights",),
    "dynamic": ("weights", "inputs"),
    "dynamic_range": ("weights", "inputs"),
    "post_training": ("weights", "inputs"),
    "int16x8": ("weights",),
}
"""What the prediction counts for each method; for ranges found at run time those of the samples are taken."""
LEARNING_RATE = 3e-4
LOW_BITS = (8, 4, 3, 2)


@dataclass
class Row:
    """One file."""

    model: str
    method: str
    suffix: str
    bits: int
    epochs: int
    refused: str = ""
    """Why there is none; empty where there is one."""
    compression: float = nan
    """Bytes of the numbers relative to floats."""
    integers: float = nan
    """The share of operations that compute with integers."""
    float_right: float = nan
    right: float = nan
    """The shares of right answers."""
    ratio: tuple[float, ...] = ()
    """Time relative to the float model with one sample, and between what it lies; likewise with 32."""
    simulated: str = ""
    sqnr_db: float = nan
    predicted_db: float = nan
    seconds: float = nan
    """What quantizing took."""


@dataclass
class Data:
    """What a model is quantized with, and what it is judged by."""

    train: Any
    train_labels: Any
    test: Any
    test_labels: Any


def data_of(subject: Subject, sources: Sources, train: int, held_out: int) -> Data:
    """The data of a model. Where there is none that it was trained on, the first half of what there is."""
    if subject.name == "minilm":
        half = count(subject.inputs) // 2
        return Data(part(subject.inputs, 0, half), None, part(subject.inputs, half, half + held_out), None)
    if subject.name == "digits":
        pictures, labels = digit_pictures()
        kept = np.arange(len(labels)) % 5 != 0
        pictures, labels = pictures[kept], labels[kept]
    else:
        found = sources.pictures()
        pictures, labels = found.train, found.train_labels
        if subject.name == "keras":
            pictures = np.ascontiguousarray(pictures.transpose(0, 2, 3, 1))
    some = np.random.default_rng(0).permutation(len(labels))[:train]
    return Data(pictures[some], labels[some], part(subject.inputs, 0, held_out), subject.labels[:held_out])


class Bench:
    """Quantizes one model, and measures what comes out."""

    def __init__(self, subject: Subject, data: Data, folder: Path, *, epochs: int, calls: int) -> None:
        self.subject, self.data, self.folder = subject, data, folder
        self.epochs, self.calls = epochs, calls
        found = qvis.sensitivity(subject.model, data.train, bits=8, granularity="channel", samples=64)
        self.layers = {layer.name: layer for layer in found.layers}

    def predict(self, method: str, file: Path) -> float:
        """What the file should keep of the output in dB: the sum of the damages of those layers that are rounded."""
        if method not in ROUNDED:
            return nan
        stored = {layer.name for layer in qvis.adapters.read(file).layers if "int" in layer.dtype.lower()}
        # a converter may have given them other names; then all of them are
        rounded = [self.layers[name] for name in self.layers.keys() & stored] or list(self.layers.values())
        damage = 0.0
        for layer in rounded:
            damage += layer.weights[8, "channel"].predicted
            damage += layer.inputs[8].predicted if "inputs" in ROUNDED[method] and layer.inputs else 0
        return -10 * log10(damage)

    def every(self, methods: Sequence[str]) -> Iterator[Row]:
        """A row for each method that the framework has."""
        framework = framework_of(qvis.adapters.load(self.subject.model))
        cells = [cell for cell in CELLS if cell.framework == framework and cell.method in methods]
        for suffixes in ((".pt2", ".safetensors"), (".onnx",), (".tflite",)):
            group = [cell for cell in cells if cell.suffix in suffixes]
            made = [(cell, *self.quantize(cell, f"{cell.method}{cell.suffix}")) for cell in group]
            yield from self.measure(made)

    def fewer(self, widths: Sequence[int]) -> Iterator[Row]:
        """For each width, a row without training and one with it."""
        framework = framework_of(qvis.adapters.load(self.subject.model))
        suffix = {"torch": ".pt2", "keras": ".tflite"}.get(framework)
        for cell in CELLS:
            if (cell.framework, cell.method, cell.suffix) == (framework, "quantization_aware", suffix):
                settings = [(bits, epochs) for bits in widths for epochs in (0, self.epochs)]
                made = [
                    (cell, *self.quantize(cell, f"{bits}_{epochs}{suffix}", bits=bits, epochs=epochs))
                    for bits, epochs in settings
                ]
                yield from self.measure(made)

    def quantize(self, cell: Cell, name: str, bits: int | None = None, epochs: int | None = None) -> tuple[Row, Any]:
        """The file, and its row as far as it is known by then."""
        trains = cell.needs == "training"
        epochs = (self.epochs if trains else 0) if epochs is None else epochs
        row = Row(self.subject.name, cell.method, cell.suffix, bits or cell.bits[0], epochs)
        began = time.perf_counter()
        labels = self.data.train_labels
        try:
            made = qvis.quantize(
                self.subject.model,
                self.folder / name,
                cell.method,
                calibration_data=self.data.train if cell.needs == "calibration" else None,
                train_data=None if not trains else self.data.train if labels is None else (self.data.train, labels),
                example_inputs=part(self.data.train, 0, 2) if not cell.needs else None,
                bits=bits,
                epochs=epochs,
                learning_rate=LEARNING_RATE,
            )
        except qvis.QvisError as error:
            row.refused = str(error)
            return row, None
        row.seconds = time.perf_counter() - began
        row.compression, row.integers = made.compression, made.contents.integer_operations
        row.predicted_db = self.predict(cell.method, made.path) if row.bits == 8 else nan
        return row, made.path

    def measure(self, made: Sequence[tuple[Cell, Row, Path | None]]) -> Iterator[Row]:
        """The rows with what was measured, of files of one kind of engine."""
        files = [(row, path) for _, row, path in made if path is not None]
        if files:
            found = qvis.benchmark(
                [self._opened(path) for _, path in files],
                self._baseline(files[0][1].suffix),
                data=self.data.test,
                labels=self.data.test_labels,
                names=["float", *(path.name for _, path in files)],
                batch_sizes=(1, 32),
                calls=self.calls,
                samples=count(self.data.test),
                layers=False,
                memory=False,
            )
            for (row, _), variant in zip(files, found.variants[1:], strict=True):
                fill(row, found, variant)
        yield from (row for _, row, _ in made)

    def _opened(self, path: Path) -> Any:
        """The file, or the module with the weights in it."""
        if path.suffix != ".safetensors":
            return path
        model = copy.deepcopy(self.subject.model)
        put_weights(load_quantized(path), model, path.name)
        return model

    def _baseline(self, suffix: str) -> Any:
        """The float model for an engine."""
        if suffix == ".onnx":
            return float_onnx(self.subject, self.data, self.folder)
        return float_tflite(self.subject.model, self.folder) if suffix == ".tflite" else self.subject.model


def fill(row: Row, found: Benchmark, variant: Variant) -> None:
    """Take over what was measured."""
    base = found.variants[0].answers
    if base is not None and base.top1 is not None and variant.answers is not None and variant.answers.top1 is not None:
        row.float_right, row.right = base.top1, variant.answers.top1
    row.sqnr_db = nan if variant.sqnr_db is None else variant.sqnr_db
    row.simulated = variant.simulated
    row.ratio = tuple(figure for one in variant.ratios for figure in (one.value, one.low, one.high))


def float_onnx(subject: Subject, data: Data, folder: Path) -> Path:
    """The model as an ONNX file of floats."""
    if isinstance(subject.model, Path):
        return subject.model
    from trained.training import export

    return export(subject.model, part(data.test, 0, 2), folder / "float.onnx")


def float_tflite(model: Any, folder: Path) -> Path:
    """A Keras model as a .tflite file of floats."""
    import tensorflow as tf

    file = folder / "float.tflite"
    file.write_bytes(tf.lite.TFLiteConverter.from_keras_model(model).convert())
    return file


# ---------------------------------------------------------------------------------------------------------------------
# Telling


HEAD = (
    "                                                 right answers   time, of float's, with            output kept\n"
    "  method             file          bytes  int.   float   quant.  1 sample         32 samples        real predicted"
)


def describe(row: Row) -> str:
    """One line of the table."""
    name = f"  {row.method:18} {row.suffix:12}"
    if row.refused:
        return f"{name} {row.refused}"
    return (
        f"{name} {row.compression:6.1%} {cell(row.integers, '5.0%')} {cell(row.float_right, '7.1%')} "
        f"{cell(row.right, '7.1%')}  {times(row)} {cell(row.sqnr_db, '6.1f')} dB {cell(row.predicted_db, '6.1f')}"
    )


def cell(value: float, form: str) -> str:
    """A number, or as much space."""
    return format(value, form) if value == value else " " * len(format(0.0, form))


def times(row: Row) -> str:
    """Both ratios with their intervals."""
    if row.simulated or not row.ratio:
        return f"{'simulated' if row.simulated else '':33}"
    pieces = [row.ratio[start : start + 3] for start in range(0, len(row.ratio), 3)]
    return " ".join(f"{f'{value:.2f} ({low:.2f}-{high:.2f})':16}" for value, low, high in pieces)


def describe_fewer(rows: Sequence[Row]) -> Iterator[str]:
    """The table of what training brings."""
    yield "  bits   float    after training      with training     epochs  seconds"
    for before, after in zip(rows[::2], rows[1::2], strict=True):
        if before.refused or after.refused:
            yield f"  {before.bits:4}  {before.refused or after.refused}"
            continue
        sides = [f"{cell(one.right, '8.1%')} {cell(one.sqnr_db, '6.1f')} dB" for one in (before, after)]
        float_right = cell(before.float_right, "7.1%")
        yield f"  {before.bits:4} {float_right} {'   '.join(sides)} {after.epochs:8} {after.seconds:8.0f}"


def main() -> None:
    """Print the tables."""
    parser = make_parser(__doc__, models=MODELS, samples=256, figures=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--held-out", type=int, default=1000, help="samples to judge by (default 1000)")
    parser.add_argument("--train", type=int, default=2000, help="samples to train on (default 2000)")
    parser.add_argument("--epochs", type=int, default=3, help="of training with rounding in place (default 3)")
    parser.add_argument(
        "--low-bits", nargs="*", type=int, default=LOW_BITS, help="widths to train at (default 8 4 3 2)"
    )
    parser.add_argument("--calls", type=int, default=50, help="that are timed (default 50)")
    script = Script(parser)
    chosen = script.chosen
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows: list[Row] = []
    for subject in script.subjects():
        data = data_of(subject, Sources(chosen.cache, chosen.data), chosen.train, chosen.held_out)
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(subject, data, Path(folder), epochs=chosen.epochs, calls=chosen.calls)
            script.show(f"{subject.name}: {subject.note}\n{HEAD}")
            for row in bench.every(chosen.methods):
                rows.append(row)
                script.show(describe(row))
            if chosen.low_bits and "quantization_aware" in chosen.methods:
                fewer = list(bench.fewer(chosen.low_bits))
                rows += fewer
                script.show("\n".join(["", *(describe_fewer(fewer) if fewer else [])]))
        script.show("")
    script.write([asdict(row) for row in rows])


if __name__ == "__main__":
    main()
