"""The summary behind everything that shows a benchmark: plain dicts, lists, numbers and words."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from math import nan
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qvis.benchmarking.records import Answers, Benchmark, ChangedSample, LayerError, Variant
from qvis.images.png import encode_png
from qvis.images.shrinking import shrink
from qvis.quantization.contents import Arithmetic, Contents
from qvis.report.benchmark_text import render_benchmark_markdown
from qvis.report.benchmark_verdict import find_verdict
from qvis.report.document import SCHEMA_VERSION, Document
from qvis.report.report import DocumentReport
from qvis.report.sensitivity import significant
from qvis.version import __version__

KIND = "benchmark"
THUMBNAIL = 64
"""Pixels of the longer side of a picture."""
PICTURES = 60
"""So many samples have their picture, shared among the variants that answer differently."""


class BenchmarkReport(DocumentReport):
    """The page, the JSON and the Markdown of a benchmark; made by :meth:`qvis.Benchmark.write`."""

    def __init__(self, benchmark: Benchmark) -> None:
        super().__init__(summarize_benchmark(benchmark))

    def to_html(self) -> str:
        """The page."""
        from qvis.report.benchmark_page import render_benchmark

        return render_benchmark(self.document)

    def to_markdown(self) -> str:
        """The verdict, and what each model takes and answers, for a pull request."""
        return render_benchmark_markdown(self.document)


def summarize_benchmark(benchmark: Benchmark) -> Document:
    """Summarize a benchmark."""
    variants = benchmark.variants
    points = dict.fromkeys((one.batch, one.threads) for variant in variants for one in variant.latencies)
    document: Document = {
        "schema_version": SCHEMA_VERSION,
        "qvis": __version__,
        "kind": KIND,
        "title": "Benchmark",
        "evidence": f"measured on {benchmark.source}",
        "has_baseline": benchmark.has_baseline,
        "samples": benchmark.samples,
        "labelled": benchmark.labelled,
        "classes": list(benchmark.classes),
        "machine": benchmark.machine,
        "warmup": benchmark.warmup,
        "points": [{"batch": batch, "threads": threads} for batch, threads in points],
        "variants": [
            _variant(variant, benchmark, changed)
            for variant, changed in zip(variants, benchmark.changed_counts, strict=True)
        ],
        "changed": _changed(benchmark),
        "notes": list(benchmark.notes),
    }
    return {**document, "verdict": find_verdict(document)}


def _variant(variant: Variant, benchmark: Benchmark, changed: int) -> Document:
    share, compared = _share_of_bytes(variant, benchmark.baseline)
    return {
        "name": variant.name,
        "is_baseline": variant is benchmark.baseline,
        "engine": variant.engine,
        "simulated": variant.simulated,
        "file_bytes": variant.file_bytes,
        "parameter_bytes": variant.parameter_bytes,
        "share_of_bytes": significant(share),
        "bytes_compared": compared,
        "contents": None if variant.contents is None else _contents(variant.contents),
        "latencies": _latencies(variant),
        "peak_bytes": variant.peak_bytes,
        "no_memory": variant.no_memory,
        "answers": None if variant.answers is None else _answers(variant.answers, benchmark.samples),
        **_kept(nan if variant.sqnr_db is None else variant.sqnr_db),
        "changed": changed,
        "per_class": [
            {"class": name, "samples": samples, "right_before": before, "right": right}
            for name, samples, before, right in variant.per_class
        ],
        "layers": [_layer(layer) for layer in variant.layers],
        "no_layers": variant.no_layers,
        "notes": list(variant.notes),
    }


def _share_of_bytes(variant: Variant, baseline: Variant | None) -> tuple[float, str]:
    """What a variant takes of the baseline's bytes, and of which: those of files where both are of the same format.

    What else a file holds differs with the format, up to the state of an optimizer.
    """
    if baseline is None or variant is baseline:
        return nan, ""
    same = Path(variant.path).suffix.lower() == Path(baseline.path).suffix.lower()
    if same and variant.file_bytes and baseline.file_bytes:
        return variant.file_bytes / baseline.file_bytes, "file"
    return variant.parameter_bytes / baseline.parameter_bytes if baseline.parameter_bytes else nan, "parameters"


def _kept(sqnr_db: float) -> Document:
    """A signal-to-noise ratio; JSON has no infinity, and so it is said where nothing differs."""
    return {"sqnr_db": significant(sqnr_db), "identical": sqnr_db == np.inf}


def _contents(contents: Contents) -> Document:
    kinds = [one.arithmetic for one in contents.operations]
    leftovers: dict[tuple[str, str], list[str]] = {}
    for one in contents.leftovers:
        leftovers.setdefault((one.kind, one.arithmetic.value), []).append(one.layer or one.name)
    return {
        "operations": {kind.value: kinds.count(kind) for kind in Arithmetic},
        "integer_operations": significant(contents.integer_operations),
        "integer_bytes": significant(contents.integer_bytes),
        "bytes_by_type": dict(contents.bytes_by_type),
        "leftovers": [
            {"operation": kind, "arithmetic": arithmetic, "names": names}
            for (kind, arithmetic), names in leftovers.items()
        ],
        "notes": list(contents.notes),
    }


def _latencies(variant: Variant) -> list[Document]:
    ratios = {(one.batch, one.threads): one for one in variant.ratios}
    found: list[Document] = []
    for one in variant.latencies:
        ratio = ratios.get((one.batch, one.threads))
        found.append(
            {
                "batch": one.batch,
                "threads": one.threads,
                "calls": int(one.seconds.size),
                "median_s": significant(one.median, 6),
                "p90_s": significant(one.p90, 6),
                "per_second": significant(one.throughput, 6),
                "ratio": None
                if ratio is None
                else {name: significant(getattr(ratio, name)) for name in ("value", "low", "high")},
            }
        )
    return found


def _answers(answers: Answers, samples: int) -> Document:
    shares = {"top1": answers.top1, "top5": answers.top5, "agreement": answers.agreement}
    return {
        **{name: None if share is None else significant(share, 6) for name, share in shares.items()},
        "same": None if answers.agreement is None else round(answers.agreement * samples),
    }


def _layer(layer: LayerError) -> Document:
    channels = np.asarray(layer.channels, dtype=np.float64)
    known = np.flatnonzero(~np.isnan(channels))
    worst = int(known[np.argmin(channels[known])]) if known.size else None
    return {
        "name": layer.name,
        "found": layer.found,
        "op": layer.op,
        **_kept(layer.sqnr_db),
        "worst_channel": worst,
        "worst_db": nan if worst is None else significant(float(channels[worst])),
        "channels": [significant(value) for value in channels.tolist()],
    }


def _changed(benchmark: Benchmark) -> list[Document]:
    """Samples that some variant answers differently, each once."""
    by_index: dict[int, list[ChangedSample]] = {}
    for one in benchmark.changed:
        by_index.setdefault(one.index, []).append(one)
    pictured = _pictured(benchmark.changed)
    found: list[Document] = []
    for index, samples in by_index.items():
        first = samples[0]
        picture = next((one.picture for one in samples if one.picture is not None), None)
        found.append(
            {
                "index": index,
                "label": first.label,
                "before": first.baseline,
                "confidence": significant(first.confidence, 3),
                "picture": "" if picture is None or index not in pictured else _thumbnail(picture),
                "after": [{"variant": one.variant, "answer": one.answer} for one in samples],
            }
        )
    return found


def _pictured(changed: Sequence[ChangedSample]) -> set[int]:
    """Which samples have their pictures shown: of each variant the first ones."""
    by_variant: dict[int, list[int]] = {}
    for one in changed:
        if one.picture is not None:
            by_variant.setdefault(one.variant, []).append(one.index)
    each = PICTURES // max(1, len(by_variant))
    return {index for indices in by_variant.values() for index in indices[:each]}


def _thumbnail(picture: NDArray[np.uint8]) -> str:
    content = encode_png(shrink(picture, THUMBNAIL))
    return f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"
