"""Measures models in the engines that run them, beside a baseline."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from qvis import adapters
from qvis.analysis.sensitivity import check_whole
from qvis.benchmarking import machine
from qvis.benchmarking.accuracy import Compared, class_names, compare_answers
from qvis.benchmarking.contenders import Contender, as_numpy, fit, gather, open_contenders
from qvis.benchmarking.layers import Layers, compare_layers, open_reference
from qvis.benchmarking.memory import peak_memory
from qvis.benchmarking.records import Benchmark, Variant
from qvis.benchmarking.timing import measure, ratios
from qvis.data import example_batch, load_batches, noise_like
from qvis.errors import BadArgumentError, QvisError
from qvis.quantization import engines
from qvis.quantization.contents import Contents
from qvis.running import Batch, Track, silently
from qvis.words import count

SAMPLES = 512
"""Enough to tell accuracies two points apart."""
MADE_UP = 32


def benchmark(
    model: Any,
    baseline: Any = None,
    *,
    data: Any = None,
    labels: Any = None,
    example_inputs: Any = None,
    batch_sizes: Sequence[int] = (1, 32),
    threads: Sequence[int] = (1,),
    calls: int = 50,
    warmup: int = 5,
    samples: int = SAMPLES,
    names: Sequence[str] | None = None,
    layers: bool = True,
    memory: bool = True,
    seed: int = 0,
    track: Track = silently,
) -> Benchmark:
    """Measure size, speed, memory and accuracy of models in the engines that run them.

    Calls of all models take turns in random order, so that ratios hold where single times do not. An engine that only
    imitates integers is not timed. The models are not changed.

    Parameters
    ----------
    model
        What to measure: the path of a ``.tflite``, ``.onnx``, ``.pt2``, ``.keras`` or ``.h5`` file, a model of PyTorch,
        Keras or ONNX, or a list of such.
    baseline
        What to compare with, usually the float model; the same kinds.
    data
        Samples to run them on, with labels or without; see :func:`qvis.data.load_batches`. One data set serves all
        models: where one has its channels elsewhere, they are moved, and a note says so.
    labels
        The classes of the samples, (samples,); those that come with the data by default. They count right answers.
    example_inputs
        Without data: inputs of which only shapes and types are used, such as ``(1, 3, 224, 224)``. Then only size,
        speed and memory are measured, on noise.
    batch_sizes
        How many samples a timed call has, one series for each. A model that takes a fixed number only is timed with
        that. Memory is measured with the largest.
    threads
        How many threads to compute with, one series for each. All else is run with the first.
    calls, warmup
        How many calls of each model are timed in a series, and made before; fewer of slow models, which is told.
    samples
        Take so many of the data at most.
    names
        What to call the models, the baseline first; their files or classes by default.
    layers
        Whether to compare each layer with the baseline's, where the engine shows what layers put out.
    memory
        Whether to run each file in a process of its own to find how much memory it takes.
    seed
        Of the order of calls, and of what is resampled.
    track
        Shows how far the work has come.

    Returns
    -------
    Benchmark
        Its ``variants``, the baseline first. ``write("folder")`` makes a page of it.

    Raises
    ------
    BadArgumentError
        An argument is out of bounds, a model cannot be run on the data, or outputs or labels do not go together.
    UnsupportedModelError, NotRunnableError
        Nothing here runs one of the models, or its engine is not installed.
    """
    sizes, numbers = _several("batch_sizes", batch_sizes), _several("threads", threads)
    for name, number, least in (("calls", calls, 1), ("warmup", warmup, 0), ("samples", samples, 1), ("seed", seed, 0)):
        check_whole(name, number, least)
    models = list(model) if isinstance(model, (list, tuple)) else [model]
    if not models:
        raise BadArgumentError("model: got none, expected at least one file or model")
    has_baseline = baseline is not None
    notes: list[str] = []
    batches = _load(data, labels, example_inputs, samples, seed, notes)
    contenders = open_contenders([baseline, *models] if has_baseline else models, names, numbers[0])
    contenders = [fit(one, batches[0]) for one in contenders]
    compared: Compared | None = None
    if data is not None:
        compared = compare_answers(
            contenders,
            batches,
            has_baseline=has_baseline,
            strict=labels is not None,
            names=class_names(data),
            track=track,
        )
        notes += compared.notes
    latencies = measure(
        contenders,
        batches,
        batch_sizes=sizes,
        threads=numbers,
        calls=calls,
        warmup=warmup,
        seed=seed,
        notes=notes,
        track=track,
    )
    lost = _lost_in_layers(contenders, batches, layers, has_baseline, data is not None, track)
    variants = []
    for place, one in enumerate(track(contenders, "Measuring memory" if memory else "Measuring size")):
        own = latencies.get(place, ())
        peak, no_memory = _peak(one, batches, max(sizes)) if memory else (None, "it was not asked for")
        contents = _contents(one)
        variants.append(
            Variant(
                name=one.name,
                path="" if one.file is None else str(one.file),
                engine=one.engine.name,
                simulated=one.engine.simulated,
                file_bytes=_file_bytes(one, contents),
                parameter_bytes=parameter_bytes(one.model) if contents is None else contents.parameter_bytes,
                contents=contents,
                latencies=own,
                ratios=ratios(own, latencies.get(0, ()), seed) if has_baseline and place else (),
                peak_bytes=peak,
                no_memory=no_memory,
                answers=None if compared is None else compared.answers[place],
                sqnr_db=None if compared is None else compared.sqnr_db[place],
                per_class=() if compared is None else compared.per_class[place],
                layers=lost[place].errors,
                no_layers=lost[place].no_layers,
                notes=(*one.notes, *lost[place].notes),
            )
        )
    total = sum(batch.size for batch in batches)
    return Benchmark(
        variants=tuple(variants),
        has_baseline=has_baseline,
        samples=0 if data is None else total,
        source="made-up inputs" if data is None else count(total, "sample"),
        labelled=compared is not None and compared.labelled,
        classes=() if compared is None else compared.classes,
        changed=() if compared is None else compared.changed,
        changed_counts=(0,) * len(variants) if compared is None else compared.changed_counts,
        machine=machine.describe(),
        warmup=warmup,
        notes=tuple(notes),
    )


def _several(name: str, given: Any) -> tuple[int, ...]:
    """Whole numbers of 1 or more, each once; one alone will do."""
    found = [given] if isinstance(given, int) else list(given)
    for one in found or (None,):
        if isinstance(one, bool) or not isinstance(one, int) or one < 1:
            raise BadArgumentError(f"{name}: got {given!r}, expected whole numbers of 1 or more, such as (1, 32)")
    return tuple(dict.fromkeys(found))


def _load(data: Any, labels: Any, example_inputs: Any, samples: int, seed: int, notes: list[str]) -> list[Batch]:
    """The data as arrays of NumPy, or noise like the example."""
    if data is not None:
        return [as_numpy(batch) for batch in load_batches(data, labels=labels, samples=samples, notes=notes)]
    if labels is not None:
        raise BadArgumentError("labels: there are no data that they belong to; give data as well")
    if example_inputs is None:
        raise BadArgumentError(
            "data: got none; give samples, or instead example_inputs, of which only shapes and types are used, such as "
            "(1, 3, 224, 224)"
        )
    notes.append("No data: the models ran on noise, so that nothing is known of their accuracy.")
    return [as_numpy(batch) for batch in noise_like(as_numpy(example_batch(example_inputs)), MADE_UP, seed, MADE_UP)]


def _lost_in_layers(
    contenders: Sequence[Contender],
    batches: Sequence[Batch],
    wanted: bool,
    has_baseline: bool,
    has_data: bool,
    track: Track,
) -> list[Layers]:
    """What the layers of each contender lose; nothing of the baseline's."""
    why = "" if wanted else "it was not asked for"
    why = why or ("" if has_baseline else "there is no baseline to compare them with")
    why = why or ("" if has_data else "there are no data to run them on")
    if why:
        return [Layers(no_layers=why)] * len(contenders)
    looking = [one for one in contenders[1:] if hasattr(one.engine, "look")]
    reference = open_reference(contenders[0], batches) if looking else ""
    found = [compare_layers(reference, one, batches) for one in track(contenders[1:], "Comparing layers")]
    return [Layers(no_layers="it is the baseline"), *found]


def _peak(contender: Contender, batches: Sequence[Batch], size: int) -> tuple[int | None, str]:
    size = contender.engine.fixed_batch or size
    return peak_memory(contender, gather(batches, size))


# ---------------------------------------------------------------------------------------------------------------------
# Size


def _contents(contender: Contender) -> Contents | None:
    """What a file holds; None in memory, and where it cannot be told."""
    if contender.file is None:
        return None
    try:
        return engines.inspect(contender.file)
    except QvisError as error:
        contender.notes.append(f"What the file holds cannot be told: {error}")
        return None


def _file_bytes(contender: Contender, contents: Contents | None) -> int | None:
    if contents is not None:
        return contents.file_bytes
    return None if contender.file is None else contender.file.stat().st_size


def parameter_bytes(model: Any) -> int:
    """What the trainable numbers of a model take in memory, in bytes.

    Weights count as they are stored, all else (biases, factors of normalizations) as the first weight in float is.
    """
    try:
        network = adapters.read(model)
    except QvisError:
        return 0
    sizes = {layer.name: prod(layer.shape) for layer in network.layers}
    stored = sum(sizes[layer.name] * bits_of(layer.dtype) for layer in network.layers)
    width = next((bits_of(layer.dtype) for layer in network.layers if "float" in layer.dtype), 32)
    rest = max(0, network.parameters - sum(sizes.values())) * width
    return -(-(stored + rest) // 8)


def bits_of(dtype: str) -> int:
    """The width of a type by its name.

    >>> bits_of("bfloat16"), bits_of("int4"), bits_of("float8_e4m3fn"), bits_of("bool")
    (16, 4, 8, 8)
    """
    found = re.search(r"(?:int|float)(\d+)", dtype.lower())
    if found:
        return int(found.group(1))
    try:
        return np.dtype(dtype).itemsize * 8
    except TypeError:
        return 32
