"""What a benchmark finds out, in plain records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qvis.layers import FloatArray
from qvis.quantization.contents import Contents

if TYPE_CHECKING:
    from os import PathLike

    from qvis.report.benchmark import BenchmarkReport


@dataclass(frozen=True)
class Latency:
    """How long one call takes with so many samples and threads. Variants take turns, so that all share the noise."""

    batch: int
    """Samples in a call."""
    threads: int
    seconds: FloatArray
    """The time of each call, (calls,), in the order in which they were made; warm-up left out."""

    @property
    def median(self) -> float:
        """Seconds."""
        return float(np.median(self.seconds))

    @property
    def p90(self) -> float:
        """Seconds; nine in ten calls take no longer."""
        return float(np.quantile(self.seconds, 0.9))

    @property
    def throughput(self) -> float:
        """Samples in a second, at the median."""
        return self.batch / self.median


@dataclass(frozen=True)
class Ratio:
    """The latency of a variant relative to the baseline's at the same batch and threads, from calls that took turns."""

    batch: int
    threads: int
    value: float
    """The ratio of the medians; below 1 is faster than the baseline."""
    low: float
    high: float
    """Between these the ratio lies in nine of ten resamples of the pairs of calls (bootstrap, Efron 1979)."""


@dataclass(frozen=True)
class Answers:
    """What a classifier answered, beside the labels or, without them, beside the baseline alone."""

    top1: float | None
    """The share of right answers; None without labels."""
    top5: float | None
    """The share of samples whose label is among the five largest scores; None without labels, or below 6 classes."""
    agreement: float | None
    """The share of samples for which it answers as the baseline does; None for the baseline, and without scores."""
    chosen: NDArray[np.int64] | None = field(default=None, repr=False)
    """The class with the largest score of each sample, (samples,); None where the first output is no scores."""
    confidence: FloatArray | None = field(default=None, repr=False)
    """How far that score is above the next one, (samples,)."""


@dataclass(frozen=True)
class LayerError:
    """What one layer of the quantized file lost, while the file ran in its engine."""

    name: str
    """Of the layer in the baseline."""
    found: str
    """Of the layer in the file."""
    op: str
    sqnr_db: float
    """Power of the baseline's output of this layer relative to the difference. All before it is quantized too."""
    channels: FloatArray = field(repr=False)
    """The same for each channel, (channels,)."""


@dataclass(frozen=True)
class Variant:
    """One model that was measured."""

    name: str
    path: str
    """The file; empty for a model in memory."""
    engine: str
    """``LiteRT 2.3.0``, ``onnxruntime 1.31.1``, ``PyTorch 2.13.0, eager``."""
    simulated: str
    """Why it was not timed: it imitates integers with floats. Empty where it was timed."""
    file_bytes: int | None
    """None for a model in memory."""
    parameter_bytes: int
    """Of the stored numbers, without the state of an optimizer."""
    contents: Contents | None = field(default=None, repr=False)
    """What the file holds; None where that cannot be told."""
    latencies: tuple[Latency, ...] = ()
    ratios: tuple[Ratio, ...] = ()
    """Relative to the baseline; empty for the baseline itself, and where one of both was not timed."""
    peak_bytes: int | None = None
    """By how much the memory of a fresh process rose from before the model was opened to the peak of running it."""
    no_memory: str = ""
    """Why there is no :attr:`peak_bytes`."""
    answers: Answers | None = None
    """None where there are no data."""
    sqnr_db: float | None = None
    """Power of the baseline's outputs relative to the difference; None for the baseline, and without data."""
    per_class: tuple[tuple[str, int, int, int], ...] = ()
    """For each class with labels: its name, its samples, right answers of the baseline, and of this one."""
    layers: tuple[LayerError, ...] = ()
    no_layers: str = ""
    """Why no layer could be looked at."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChangedSample:
    """A sample that a variant answers differently than the baseline."""

    variant: int
    """Its place in :attr:`Benchmark.variants`."""
    index: int
    """The place of the sample among those that were taken of the data."""
    label: int | None
    baseline: int
    """What the baseline answered."""
    answer: int
    """What the variant answered."""
    confidence: float
    """How far the baseline's score was above its next one; small means that it was close anyway."""
    picture: NDArray[np.uint8] | None = field(default=None, repr=False)
    """(height, width, 3) where a sample is a picture, stretched to 0..255; None for all else."""


@dataclass(frozen=True)
class Benchmark:
    """The result of :func:`qvis.benchmark`."""

    variants: tuple[Variant, ...]
    """In the order in which they were given; the baseline first where there is one."""
    has_baseline: bool
    samples: int
    """Of the data; 0 where the inputs were made up."""
    source: str
    """``360 samples``, or ``made-up inputs``."""
    labelled: bool
    classes: tuple[str, ...]
    """Names of the classes; empty without labels."""
    changed: tuple[ChangedSample, ...]
    """Of the samples that a variant answers differently, those that were the surest before, first."""
    changed_counts: tuple[int, ...]
    """How many there are of each variant, (variants,); 0 for the baseline."""
    machine: str
    """Processor, cores and system."""
    warmup: int
    """Calls that were not timed, before each series."""
    notes: tuple[str, ...] = ()

    @property
    def baseline(self) -> Variant | None:
        """What all others are compared with."""
        return self.variants[0] if self.has_baseline else None

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain dicts, lists, strings and numbers."""
        return self._report().to_dict()

    def to_json(self) -> str:
        """The same as JSON text."""
        return self._report().to_json()

    def write(self, out_dir: str | PathLike[str], formats: Sequence[str] = ("html",)) -> BenchmarkReport:
        """Write the page into ``out_dir`` as ``benchmark.html``; see :meth:`qvis.Report.write`."""
        return self._report().write(out_dir, formats)

    @property
    def verdict(self) -> str:
        """What quantizing brought and cost, in one sentence."""
        return self._report().verdict

    def _report(self) -> BenchmarkReport:
        from qvis.report.benchmark import BenchmarkReport

        return BenchmarkReport(self)

    def __repr__(self) -> str:
        return f"<benchmark of {len(self.variants)} models on {self.source}: {self.verdict}>"
