"""What is said of a benchmark: the document, its verdict, Markdown, and the terminal."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from math import inf, log10, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qvis.analysis import analyze_network
from qvis.benchmarking.records import Answers, Benchmark, Latency, LayerError, Ratio
from qvis.errors import OutputError
from qvis.layers import Layer, Network
from qvis.report.benchmark import PICTURES, THUMBNAIL, BenchmarkReport, summarize_benchmark
from qvis.report.benchmark_text import terminal_lines
from qvis.report.benchmark_verdict import tell_time
from qvis.report.document import summarize
from qvis.report.index import render_index
from tests.browser import AWKWARD_NAMES, EVIL, LONG
from tests.measured import SAMPLES, make_benchmark, make_picture, make_variant


def verdict(benchmark: Benchmark) -> str:
    text = benchmark.verdict
    assert benchmark.to_dict()["verdict"]["text"] == text
    return text


def pair(**changes: Any) -> Benchmark:
    """A baseline, and a model with these changes."""
    return make_benchmark([make_variant(0), replace(make_variant(1), **changes)])


# ---------------------------------------------------------------------------------------------- document


def test_the_document_has_the_figures_of_the_records() -> None:
    found = make_benchmark(number=3)
    document = json.loads(found.to_json())
    assert (document["kind"], document["samples"], document["labelled"]) == ("benchmark", SAMPLES, True)
    assert document["points"] == [
        {"batch": 1, "threads": 1},
        {"batch": 16, "threads": 1},
        {"batch": 16, "threads": 2},
    ]
    for told, variant in zip(document["variants"], found.variants, strict=True):
        assert told["name"] == variant.name
        assert (told["file_bytes"], told["parameter_bytes"]) == (variant.file_bytes, variant.parameter_bytes)
        for one, latency in zip(told["latencies"], variant.latencies, strict=True):
            assert one["calls"] == len(latency.seconds)
            assert one["median_s"] == pytest.approx(np.median(latency.seconds), rel=1e-3)
            assert one["p90_s"] == pytest.approx(np.quantile(latency.seconds, 0.9), rel=1e-3)
            assert one["per_second"] == pytest.approx(latency.batch / np.median(latency.seconds), rel=1e-3)
        for one, ratio in zip(told["latencies"], variant.ratios, strict=False):
            assert one["ratio"] == pytest.approx({"value": ratio.value, "low": ratio.low, "high": ratio.high})
        for one, layer in zip(told["layers"], variant.layers, strict=True):
            assert (one["name"], one["found"]) == (layer.name, layer.found)
            assert one["sqnr_db"] == pytest.approx(layer.sqnr_db, rel=1e-3)
            assert one["worst_channel"] == int(np.argmin(layer.channels))
            assert one["worst_db"] == pytest.approx(layer.channels.min(), rel=1e-3)
    baseline, quantized, _ = document["variants"]
    assert baseline["is_baseline"]
    assert baseline["latencies"][0]["ratio"] is None
    assert quantized["share_of_bytes"] == pytest.approx(5000 / 15400, rel=1e-3)
    assert quantized["contents"]["operations"] == {"integer": 4, "hybrid": 0, "float": 1, "none": 1}
    assert quantized["contents"]["integer_operations"] == pytest.approx(4 / 5)
    assert quantized["contents"]["integer_bytes"] == pytest.approx(0.9)
    assert quantized["contents"]["leftovers"] == [
        {"operation": "SOFTMAX", "arithmetic": "float", "names": ["probabilities"]}
    ]
    assert quantized["answers"]["same"] == SAMPLES - 2
    assert [(one["class"], one["samples"], one["right"]) for one in quantized["per_class"]] == [
        (name, samples, right) for name, samples, _, right in found.variants[1].per_class
    ]


def test_bytes_of_parameters_are_compared_where_one_of_both_is_no_file() -> None:
    in_memory = make_variant(0, file_bytes=None, contents=None, parameter_bytes=20_000)
    found = make_benchmark([in_memory, make_variant(1)])
    told = found.to_dict()["variants"][1]
    assert (told["share_of_bytes"], told["bytes_compared"]) == (pytest.approx(4000 / 20_000), "parameters")
    assert "takes 20 % of the bytes for its parameters" in verdict(found)
    assert "as the baseline;" in verdict(found)  # nothing is known of what it computes with


def test_files_of_two_formats_are_compared_by_their_parameters_and_engines_that_differ_are_told() -> None:
    saved = replace(make_variant(0), path="a/net.keras", file_bytes=90_000, engine="Keras 3.15.0")
    found = make_benchmark([saved, replace(make_variant(1), path="a/net.tflite")])
    assert found.to_dict()["variants"][1]["bytes_compared"] == "parameters"
    assert "28 % of the bytes for its parameters" in verdict(found)
    assert "0.44 times the time (batch 1, 1 thread, another engine; 0.41 to 0.47)" in verdict(found)
    details = found.to_dict()["verdict"]["details"]
    assert "LiteRT 2.3.0 runs it, Keras 3.15.0 the baseline: times tell of the engines as well." in details
    assert "another engine" not in verdict(make_benchmark())
    eager, lowered = (
        replace(make_variant(i), engine=f"PyTorch 2.13.0, {how}") for i, how in enumerate(("eager", "int8"))
    )
    assert "another engine" not in verdict(make_benchmark([eager, lowered]))


def test_a_sample_is_listed_once_with_what_each_model_answers() -> None:
    found = make_benchmark(number=4)
    document = found.to_dict()
    indices = [one["index"] for one in document["changed"]]
    assert len(indices) == len(set(indices))
    told = {(one["index"], after["variant"]): after["answer"] for one in document["changed"] for after in one["after"]}
    assert told == {(one.index, one.variant): one.answer for one in found.changed}
    assert [one["changed"] for one in document["variants"]] == [0, 2, 4, 6]


def test_pictures_are_small_pngs_and_only_so_many() -> None:
    pil = pytest.importorskip("PIL.Image")
    found = make_benchmark(number=2)
    picture = make_picture(0, 200)
    one = replace(found.changed[0], picture=picture)
    many = [replace(one, index=i) for i in range(PICTURES + 5)]
    changed = replace(found, changed=tuple(many), changed_counts=(0, len(many))).to_dict()["changed"]
    pictures = [sample["picture"] for sample in changed]
    assert [bool(text) for text in pictures] == [True] * PICTURES + [False] * 5
    content = base64.b64decode(pictures[0].removeprefix("data:image/png;base64,"))
    assert pil.open(io.BytesIO(content)).size == (THUMBNAIL, THUMBNAIL)
    small = base64.b64decode(found.to_dict()["changed"][0]["picture"].removeprefix("data:image/png;base64,"))
    index = found.to_dict()["changed"][0]["index"]
    assert np.array_equal(np.asarray(pil.open(io.BytesIO(small)).convert("RGB")), make_picture(index))


def test_infinite_ratios_are_identical_and_unknown_ones_are_null() -> None:
    channels = np.array([nan, inf, 20.0])
    layers = (
        LayerError("same", "same", "Linear", inf, np.full(3, inf)),
        LayerError("none", "none", "Linear", nan, np.full(3, nan)),
        LayerError("some", "some", "Linear", 12.0, channels),
    )
    found = pair(sqnr_db=inf, layers=layers)
    (same, none, some) = json.loads(found.to_json())["variants"][1]["layers"]
    assert (same["sqnr_db"], same["identical"], same["worst_db"]) == (None, True, None)
    assert (none["sqnr_db"], none["identical"], none["worst_channel"]) == (None, False, None)
    assert (some["worst_channel"], some["worst_db"], some["channels"]) == (2, 20.0, [None, None, 20.0])
    assert "The outputs are identical." in found.to_dict()["verdict"]["details"]
    lines = list(terminal_lines(BenchmarkReport(found).document))
    assert [line.split() for line in lines if line.startswith(("same", "none", "some"))] == [
        ["none", "Linear", "n/a", "n/a"],
        ["some", "Linear", "12.0", "dB", "20.0", "dB", "(channel", "2)"],
        ["same", "Linear", "identical", "identical"],
    ]


# ---------------------------------------------------------------------------------------------- verdict


def test_the_verdict_tells_bytes_time_and_answers() -> None:
    assert verdict(make_benchmark()) == (
        "Measured on 360 samples: digits.int8.tflite takes 32 % of the bytes, 0.44 times the time (batch 1, 1 thread;"
        " 0.41 to 0.47) and answers 358 of 360 as float; top-1 98.0 % instead of 98.3 %."
    )


@pytest.mark.parametrize(
    ("value", "low", "high", "words"),
    [
        (0.9, 0.8, 0.99, "0.90 times the time (batch 1, 1 thread; 0.80 to 0.99)"),
        (0.97, 0.9, 1.04, "is no faster (0.97 times the time, 0.90 to 1.04; batch 1, 1 thread)"),
        (1.3, 1.2, 1.41, "1.30 times the time (batch 1, 1 thread; 1.20 to 1.41)"),
        (0.7, nan, nan, "0.70 times the time (batch 1, 1 thread; too few calls to be sure)"),
        (0.0123, 0.0111, 0.0136, "0.012 times the time (batch 1, 1 thread; 0.011 to 0.014)"),
    ],
)
def test_only_an_interval_without_1_is_called_faster_or_slower(
    value: float, low: float, high: float, words: str
) -> None:
    found = pair(ratios=(Ratio(1, 1, value, low, high),))
    assert words in verdict(found)
    assert ("no faster" in found._report().to_markdown()) == (low <= 1 <= high)


def test_a_model_that_only_simulates_integers_has_no_time_anywhere() -> None:
    found = make_benchmark([make_variant(0, name="first"), make_variant(1, name="imitated", timed=False)])
    assert "was not timed since it only simulates integers" in verdict(found)
    assert "imitated was not timed: it imitates integers with floats." in found.to_dict()["verdict"]["details"]
    for text in ("\n".join(terminal_lines(found._report().document)), found._report().to_markdown()):
        rows = [line for line in text.splitlines() if "imitated" in line]
        assert not any(re.search(r"\d [mµ]?s\b", line) for line in rows)


def test_without_a_baseline_the_figures_stand_alone() -> None:
    alone = make_benchmark([make_variant(0, data=False)], data=False, has_baseline=False)
    time = tell_time(float(np.median(alone.variants[0].latencies[0].seconds)))
    assert verdict(alone) == (
        f"Measured on made-up inputs: digits.float.tflite takes 15.4 kB and {time} a call (batch 1, 1 thread)."
    )
    counted = make_benchmark([make_variant(0)], has_baseline=False)
    assert verdict(counted).endswith("a call (batch 1, 1 thread); top-1 98.3 %.")
    two = make_benchmark([make_variant(i, data=False, ratios=()) for i in (1, 0)], data=False, has_baseline=False)
    assert verdict(two).startswith("Measured on made-up inputs: of 2 models the smallest, digits.int8.tflite, takes")


def test_a_baseline_that_is_alone_is_told_of() -> None:
    assert verdict(make_benchmark(number=1)).startswith("Measured on 360 samples: digits.float.tflite takes 15.4 kB")


def test_without_labels_the_answers_of_the_baseline_count() -> None:
    text = verdict(make_benchmark(labelled=False))
    assert text.endswith("and answers 358 of 360 as float.")
    no_scores = make_benchmark([make_variant(0, answers=None), make_variant(1, answers=None)])
    assert verdict(no_scores).endswith("and keeps 32.3 dB of the output.")


def test_of_several_models_the_smallest_that_is_good_enough_is_told_of() -> None:
    def model(place: int, bytes_: int, top1: float | None, agreement: float) -> Any:
        return make_variant(place, name=f"m{place}", file_bytes=bytes_, answers=Answers(top1, None, agreement))

    first = make_variant(0, answers=Answers(0.98, None, None))
    good, smaller, spoiled = model(1, 5000, 0.98, 0.999), model(2, 4000, 0.97, 0.98), model(3, 900, 0.6, 0.62)
    some = make_benchmark([first, good, smaller, spoiled])
    assert "of 3 models the smallest within one point of the baseline’s top-1, m2, takes" in verdict(some)
    assert some.to_dict()["verdict"]["variant"] == 2
    none = make_benchmark([first, spoiled, model(4, 800, 0.5, 0.5)])
    assert "of 2 models none is within one point of the baseline’s top-1; the closest, m3, takes" in verdict(none)
    unlabelled = [replace(one, answers=replace(one.answers, top1=None)) for one in (first, good, smaller)]
    assert "of 2 models the smallest with 99 % of the baseline’s answers, m1, takes" in verdict(
        make_benchmark(unlabelled)
    )


def test_long_names_are_cut_in_sentences() -> None:
    text = verdict(pair(name=LONG))
    assert "that_ends_here takes" in text
    assert len(text) < 300


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(5.3614e-5, "53.6 µs"), (9.996e-4, "1 ms"), (0.0123456, "12.3 ms"), (1.234, "1.23 s"), (nan, "n/a")],
)
def test_times_have_three_digits(seconds: float, words: str) -> None:
    assert tell_time(seconds) == words


# ---------------------------------------------------------------------------------------------- words and files


def test_markdown_has_each_model_and_nothing_that_acts() -> None:
    names = (*AWKWARD_NAMES, "plain")
    variants = [make_variant(i, name=one, prefix=one, layers=3) for i, one in enumerate(names)]
    text = make_benchmark(variants)._report().to_markdown()
    assert text.startswith("<!-- qvis ")
    assert "</script" not in text
    assert "<img" not in text
    assert "\u202e" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert sum("LiteRT" in row for row in rows) == len(names)
    titles = next(row for row in rows if "Top-1" in row).split("|")
    for row in rows[2 : 2 + len(names)]:
        assert len(row.split("|")) == len(titles)
    (plain,) = (row.split("|") for row in rows if row.startswith("| `plain` |") and "LiteRT" in row)
    told = dict(zip((title.strip() for title in titles), (cell.strip() for cell in plain), strict=True))
    assert told["Top-1"] == f"{100 * (0.9833 - 0.003 * 6):.1f} %"
    assert told["Agreement"] == f"{100 * (SAMPLES - 12) / SAMPLES:.1f} %"
    assert told["Output keeps"] == f"{33.3 - 6:.1f} dB"
    assert told["Integer ops"] == "75 %"


def test_the_terminal_names_the_worst_and_with_all_everything() -> None:
    found = make_benchmark(number=3, layers=40)
    document = summarize_benchmark(found)
    lines = list(terminal_lines(document))
    worst = sorted(found.variants[1].layers, key=lambda layer: layer.sqnr_db)[:5]
    shown = [line.split()[0] for line in lines if re.match(r"layer\d+ ", line)]
    assert shown == [layer.name for layer in worst]
    assert "  and more layers, 40 in all; --all shows them" in lines
    everything = list(terminal_lines(document, all_rows=True))
    assert sum(bool(re.match(r"layer\d+ ", line)) for line in everything) == 80
    assert any("batch 16, 2 threads" in line for line in lines)
    assert all(line.isprintable() for line in everything)
    for at, sample in enumerate(one for one in document["changed"] if one["after"][0]["variant"] == 1):
        label, answer = sample["label"], sample["after"][0]["answer"]
        assert f"  sample {sample['index']}, labelled {label}: {sample['before']} -> {answer}" in "\n".join(lines), at


def test_classes_that_lost_the_most_come_first() -> None:
    classes = (("a", 10, 9, 9), ("b", 10, 9, 5), ("c", 20, 19, 20), ("d", 100, 90, 70))
    document = summarize_benchmark(pair(per_class=classes))
    lines = list(terminal_lines(document))
    start = next(i for i, line in enumerate(lines) if line.startswith("Class"))
    shown = [line.split() for line in lines[start + 1 : start + 4]]
    assert [(row[0], row[-2]) for row in shown] == [("b", "−40.0"), ("d", "−20.0"), ("c", "+5.0")]


def test_reports_are_written_all_or_none_and_never_over_foreign_files(tmp_path: Path) -> None:
    found = make_benchmark()
    report = found.write(tmp_path / "new", ("html", "json", "md"))
    assert report.path == tmp_path / "new" / "benchmark.html"
    assert json.loads(report.paths["json"].read_text(encoding="utf-8")) == found.to_dict()
    assert report.paths["md"].read_text(encoding="utf-8") == report.to_markdown()
    assert report.to_html() == found._report().to_html()
    (tmp_path / "benchmark.html").write_text("mine")
    with pytest.raises(OutputError, match="was not written by qvis and is left alone"):
        found.write(tmp_path, ("json", "html"))
    assert not (tmp_path / "benchmark.json").exists()


def test_the_index_of_a_folder_tells_of_it() -> None:
    layer = Layer("only", "Linear", (3, 3), "float64", lambda: np.eye(3))
    weights = summarize(analyze_network(Network("net", "NumPy", (layer,))), "weight_ranges")
    documents = [weights, summarize_benchmark(make_benchmark())]
    page = render_index(documents, title="Reports", lead="")
    assert 'href="benchmark.html"' in page
    assert "0.44 times the time" in page
    assert "What quantizing brought: bytes, time, memory and answers of files" in page


def test_no_models_are_said_to_be_none() -> None:
    found = make_benchmark([], has_baseline=False)
    assert verdict(found) == "No model was measured."
    assert "No model was measured." in found._report().to_markdown()
    assert list(terminal_lines(found._report().document)) == ["No model was measured."]
    assert EVIL not in found._report().to_html()


def test_decibels_are_of_powers() -> None:
    kept = 10 * log10(1 / 0.001)
    assert "The output keeps 30.0 dB." in pair(sqnr_db=kept).to_dict()["verdict"]["details"]


def test_times_at_other_points_are_told() -> None:
    latencies = tuple(Latency(batch, 1, np.full(9, 1e-3)) for batch in (1, 2, 4, 8, 16))
    ratios = tuple(Ratio(batch, 1, 0.5 + batch / 100, 0.4, 0.9) for batch in (1, 2, 4, 8, 16))
    details = pair(latencies=latencies, ratios=ratios).to_dict()["verdict"]["details"]
    (told,) = (one for one in details if one.startswith("Times the baseline"))
    assert told.endswith(
        "threads: 0.52 (batch 2, 1 thread), 0.54 (batch 4, 1 thread), 0.58 (batch 8, 1 thread), 1 more below."
    )
