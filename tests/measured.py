"""Benchmarks that are made up, for tests of what shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qvis.benchmarking.records import (
    Answers,
    Benchmark,
    ChangedSample,
    Latency,
    LayerError,
    Ratio,
    Variant,
)
from qvis.quantization.contents import Arithmetic, Contents, Operation

SAMPLES = 360
POINTS = ((1, 1), (16, 1), (16, 2))
NAMES = ("digits.float.tflite", "digits.int8.tflite", "digits.int8.pt2")


def make_contents(places: int, *, quantized: bool, prefix: str = "") -> Contents:
    """A file with so many layers, of which a quantized one computes all but the last in integers."""
    kind = Arithmetic.INTEGER if quantized else Arithmetic.FLOAT
    operations = [Operation(f"op{i}", "CONV_2D", kind, f"{prefix}layer{i}") for i in range(places)]
    operations.append(Operation("probabilities", "SOFTMAX", Arithmetic.FLOAT))
    operations.append(Operation("last", "QUANTIZE", Arithmetic.NONE))
    sizes = {"int8": 900 * places, "float32": 100 * places} if quantized else {"float32": 3600 * places}
    return Contents(tuple(operations), sizes, sum(sizes.values()) + 1000)


def make_variant(
    place: int = 1,
    *,
    name: str | None = None,
    timed: bool = True,
    layers: int = 4,
    classes: Sequence[str] = (),
    labelled: bool = True,
    data: bool = True,
    prefix: str = "",
    seed: int = 0,
    **changes: Any,
) -> Variant:
    """A model; the first, at place 0, is the baseline in float. ``changes`` replace fields."""
    random = np.random.default_rng((seed, place))
    first = place == 0
    contents = make_contents(layers, quantized=not first, prefix=prefix)
    speed = 1.0 if first else 0.3 + 0.14 * place
    latencies = tuple(
        Latency(batch, threads, 1.2e-4 * batch**0.8 / threads**0.5 * speed * random.uniform(0.95, 1.1, 40))
        for batch, threads in POINTS
    )
    per_class = ()
    if labelled and data and not first:
        each = SAMPLES // max(1, len(classes))
        per_class = tuple((one, each, each - 1, each - 1 + int(random.integers(-3, 2))) for one in classes)
    fields: dict[str, Any] = {
        "name": name if name is not None else (NAMES[place] if place < len(NAMES) else f"digits.{place}.onnx"),
        "path": "",
        "engine": "LiteRT 2.3.0",
        "simulated": "" if timed else "it imitates integers with floats",
        "file_bytes": contents.file_bytes,
        "parameter_bytes": contents.parameter_bytes,
        "contents": contents,
        "latencies": latencies if timed else (),
        "ratios": ()
        if first or not timed
        else tuple(Ratio(batch, threads, speed, speed - 0.03, speed + 0.03) for batch, threads in POINTS),
        "peak_bytes": 40_000_000 - 9_000_000 * (not first),
        "answers": Answers(
            top1=0.9833 - 0.003 * place if labelled else None,
            top5=1.0 if labelled else None,
            agreement=None if first else (SAMPLES - 2 * place) / SAMPLES,
        )
        if data
        else None,
        "sqnr_db": None if first or not data else 33.3 - place,
        "per_class": per_class,
        "layers": ()
        if first or not data
        else tuple(
            LayerError(
                f"{prefix}layer{i}",
                f"found{i}",
                "Conv2d" if i % 3 else "Linear",
                40.0 - 12 * i / layers + random.normal(),
                random.normal(35 - 12 * i / layers, 4, 8),
            )
            for i in range(layers)
        ),
    }
    return Variant(**{**fields, **changes})


def make_picture(index: int, side: int = 8) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A small picture."""
    random = np.random.default_rng(index)
    grey = random.integers(0, 256, (side, side, 1), dtype=np.uint8)
    return np.repeat(grey, 3, axis=2)


def make_benchmark(
    variants: Sequence[Variant] | None = None,
    *,
    number: int = 2,
    classes: int = 10,
    labelled: bool = True,
    data: bool = True,
    pictures: bool = True,
    has_baseline: bool = True,
    side: int = 8,
    **options: Any,
) -> Benchmark:
    """A benchmark of so many models; ``options`` are those of :func:`make_variant`."""
    names = tuple(str(i) for i in range(classes)) if labelled and data else ()
    if variants is None:
        variants = [make_variant(i, classes=names, labelled=labelled, data=data, **options) for i in range(number)]
    random = np.random.default_rng(5)
    changed = []
    counts = [0] * len(variants)
    if data and has_baseline:
        for place in range(1, len(variants)):
            counts[place] = 2 * place
            for i in range(2 * place):
                index = 17 * i + 3 * (place % 2)
                changed.append(
                    ChangedSample(
                        variant=place,
                        index=index,
                        label=index % classes if labelled else None,
                        baseline=index % classes,
                        answer=(index + place) % classes,
                        confidence=float(random.uniform(0, 3)),
                        picture=make_picture(index, side) if pictures else None,
                    )
                )
    return Benchmark(
        variants=tuple(variants),
        has_baseline=has_baseline,
        samples=SAMPLES if data else 0,
        source=f"{SAMPLES} samples" if data else "made-up inputs",
        labelled=labelled and data,
        classes=names,
        changed=tuple(sorted(changed, key=lambda one: -one.confidence)),
        changed_counts=tuple(counts),
        machine="A processor with 8 cores, Linux",
        warmup=5,
    )
