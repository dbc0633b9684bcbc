"""Models are measured in their engines: how long, how right, and what each layer lost."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qvis
from qvis.analysis.answers import why_no_answers
from qvis.benchmarking import timing
from qvis.benchmarking.benchmark import bits_of, parameter_bytes
from qvis.benchmarking.contenders import Contender, gather
from qvis.benchmarking.memory import peak_memory
from qvis.benchmarking.outputs import match_outputs
from qvis.benchmarking.peak import read_inputs, write_inputs
from qvis.benchmarking.pictures import picture_of
from qvis.benchmarking.records import Benchmark
from qvis.benchmarking.timing import compare, measure, take_turns
from qvis.errors import BadArgumentError, NotRunnableError, UnsupportedModelError
from qvis.quantization import engines
from qvis.quantization.contents import Contents
from qvis.quantization.engines import Looked
from qvis.running import Batch

QUICK: dict[str, Any] = {"calls": 3, "warmup": 1, "batch_sizes": (2,), "memory": False}


class Clock:
    """Time that only passes when someone works."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


class Fake:
    """An engine that computes a function of NumPy."""

    name = "fake 1.0"

    def __init__(self, function: Callable[..., Any], **attributes: Any) -> None:
        self.function = function
        self.simulated = ""
        self.fixed_batch: int | None = None
        self.prepared: list[int] = []
        self.__dict__.update(attributes)

    def run(self, batch: Batch) -> list[Any]:
        if self.fixed_batch is not None:
            assert batch.size == self.fixed_batch
        found = self.function(*batch.args, **batch.kwargs)
        return found if isinstance(found, list) else [found]

    def prepare(self, batch: Batch) -> Callable[[], object]:
        self.prepared.append(batch.size)
        return lambda: self.run(batch)


class Model:
    """Stands for a model; which one, its engine knows."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine


files: dict[str, Fake] = {}
"""What runs files, by their names."""


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models run in the engines that they name."""

    def open_engine(model: Any, *, threads: int = 1) -> Any:
        if isinstance(model, Path) and model.suffix == ".tflite":
            raise NotRunnableError(f"model: {model.name} is refused")
        engine = files[model.name] if isinstance(model, Path) else getattr(model, "engine", None)
        if engine is None:
            raise UnsupportedModelError("model: nothing runs it")
        if hasattr(engine, "opened"):
            engine.opened.append(threads)
        return engine

    monkeypatch.setattr(engines, "open_engine", open_engine)


def scores_of(answers: Any, classes: int = 10, margin: float = 1.0) -> np.ndarray[Any, Any]:
    return np.eye(classes, dtype=np.float32)[np.asarray(answers)] * margin


def numbers(size: int = 12) -> Any:
    """Samples that carry their own number."""
    return np.arange(size, dtype=np.float32)[:, None]


def table(values: Any) -> Model:
    """A model that looks up what it puts out by the number of the sample."""
    found = np.asarray(values)
    return Model(Fake(lambda x: found[x[:, 0].astype(int)]))


# ---------------------------------------------------------------------------------------------------------------------
# Time


def test_each_call_is_timed_in_every_round_and_the_order_changes() -> None:
    clock, made = Clock(), []

    def call(name: str, nanoseconds: int) -> Callable[[], None]:
        def work() -> None:
            assert not gc.isenabled()
            made.append(name)
            clock.now += nanoseconds

        return work

    calls = [call("a", 1000), call("b", 3000)]
    taken = take_turns(calls, rounds=8, warmup=2, clock=clock)
    assert gc.isenabled()
    np.testing.assert_allclose(taken, [[1e-6] * 8, [3e-6] * 8])
    assert made[:4] == ["a", "b"] * 2
    rounds = ["".join(made[start : start + 2]) for start in range(4, 20, 2)]
    assert set(rounds) == {"ab", "ba"}


def test_slow_calls_are_made_less_often_but_five_times_at_least() -> None:
    clock = Clock()

    def slow(seconds: float) -> Callable[[], None]:
        def work() -> None:
            clock.now += int(seconds * 1e9)

        return work

    assert take_turns([slow(1.0), slow(0.5)], rounds=50, warmup=5, seconds=12, clock=clock).shape == (2, 8)
    assert take_turns([slow(60.0)], rounds=50, warmup=5, clock=clock).shape == (1, timing.LEAST)
    assert take_turns([slow(60.0)], rounds=3, warmup=0, clock=clock).shape == (1, 3)


def test_collecting_garbage_is_resumed_after_a_failure_and_only_if_it_was_on() -> None:
    def fail() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        take_turns([fail], rounds=1, warmup=0)
    assert gc.isenabled()
    gc.disable()
    try:
        take_turns([lambda: None], rounds=1, warmup=0)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_ratio_lies_within_its_interval_which_is_narrow_for_steady_calls() -> None:
    generator = np.random.default_rng(0)
    baseline = 1e-3 * (1 + 0.02 * generator.random(50))
    steady = compare(baseline * 0.5, baseline, batch=1, threads=2)
    assert (steady.batch, steady.threads) == (1, 2)
    assert steady.value == pytest.approx(0.5)
    assert steady.low == pytest.approx(0.5)
    assert steady.high == pytest.approx(0.5)
    # noise of both that is not shared: the interval is that of resampling the rounds, computed one by one
    other = 1e-3 * (1 + generator.random(50))
    found = compare(other, baseline, batch=1, threads=1)
    assert found.low < found.value < found.high
    assert found.value == pytest.approx(np.median(other) / np.median(baseline))
    draws = np.random.default_rng(1)
    resampled = []
    for _ in range(4000):
        rounds = draws.integers(50, size=50)
        resampled.append(np.median(other[rounds]) / np.median(baseline[rounds]))
    np.testing.assert_allclose([found.low, found.high], np.quantile(resampled, [0.05, 0.95]), rtol=0.03)


def test_all_that_can_be_timed_together_is_and_the_rest_says_why_not() -> None:
    clock = Clock()

    def working(each: int) -> Callable[..., Any]:
        def work(x: Any) -> Any:
            clock.now += each * len(x) * 1_000_000
            return x

        return work

    def picky(x: Any) -> Any:
        if len(x) > 4:
            raise RuntimeError("out of memory")
        return work(x)

    work = working(3)
    fakes = {
        "any": Fake(working(2), opened=[]),
        "fixed": Fake(working(1), fixed_batch=2),
        "simulated": Fake(working(9), simulated="it imitates integers"),
        "picky": Fake(picky),
    }
    contenders = [Contender(name, Model(fake), fake, threads=1) for name, fake in fakes.items()]
    notes: list[str] = []
    found = measure(
        contenders,
        [Batch((numbers(3),), size=3)],
        batch_sizes=(1, 8),
        threads=(1, 4),
        calls=6,
        warmup=1,
        notes=notes,
        clock=clock,
    )
    seen = {
        contenders[place].name: [(one.batch, one.threads, round(one.median * 1e3)) for one in own]
        for place, own in found.items()
    }
    assert seen == {
        "any": [(1, 1, 2), (2, 1, 4), (8, 1, 16), (1, 4, 2), (2, 4, 4), (8, 4, 16)],
        "fixed": [(2, 1, 2), (2, 4, 2)],
        "picky": [(1, 1, 3), (2, 1, 6), (1, 4, 3), (2, 4, 6)],
    }
    assert fakes["any"].opened == [4]
    assert fakes["simulated"].prepared == []
    assert contenders[1].notes == ["It takes 2 samples at once only, and was timed with that."]
    assert contenders[3].notes == [
        f"It could not be timed with 8 samples on {threads}: RuntimeError: out of memory"
        for threads in ("1 thread", "4 threads")
    ]
    assert notes == []


def test_fewer_calls_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()

    def work(x: Any) -> Any:
        clock.now += 1_000_000_000
        return x

    fake = Fake(work)
    notes: list[str] = []
    monkeypatch.setattr(timing, "SECONDS", 10.0)
    found = measure(
        [Contender("slow", None, fake, 1)],
        [Batch((numbers(3),), size=3)],
        batch_sizes=(1,),
        threads=(1,),
        calls=40,
        warmup=3,
        notes=notes,
        clock=clock,
    )
    assert found[0][0].seconds.shape == (10,)
    assert notes == ["1 sample on 1 thread: 10 calls of each model were timed instead of 40, since they are slow."]


def test_ratios_are_to_the_baseline_where_both_were_timed() -> None:
    x = numbers(4)
    fakes = [Model(Fake(lambda x: x)) for _ in range(3)]
    fakes[2].engine.simulated = "it imitates integers with floats"
    found = qvis.benchmark(fakes[1:], fakes[0], data=x, **{**QUICK, "batch_sizes": (1, 2)})
    assert [len(one.latencies) for one in found.variants] == [2, 2, 0]
    assert [[(r.batch, r.threads) for r in one.ratios] for one in found.variants] == [[], [(1, 1), (2, 1)], []]
    assert found.variants[2].simulated == "it imitates integers with floats"
    assert all(one.seconds.shape == (3,) for one in found.variants[0].latencies)
    fakes[0].engine.simulated = "the baseline does too"
    found = qvis.benchmark(fakes[1], fakes[0], data=x, **QUICK)
    assert [one.ratios for one in found.variants] == [(), ()]


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def test_answers_are_counted_against_labels_and_the_baseline() -> None:
    labels = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1])
    exact = labels.copy()
    exact[3] = 9
    margins = np.linspace(1, 2, 12)[:, None].astype(np.float32)
    before = scores_of(exact) * margins
    answers = exact.copy()
    answers[[0, 5]] = 7
    after = scores_of(answers) * margins
    found = qvis.benchmark(table(after), table(before), data=numbers(), labels=labels, names=["float", "int"], **QUICK)
    baseline, variant = found.variants
    assert (baseline.name, variant.name) == ("float", "int")
    assert baseline.answers is not None
    assert variant.answers is not None
    assert (baseline.answers.top1, baseline.answers.agreement) == (11 / 12, None)
    assert (variant.answers.top1, variant.answers.agreement) == (9 / 12, 10 / 12)
    np.testing.assert_array_equal(variant.answers.chosen, answers)
    np.testing.assert_allclose(variant.answers.confidence, margins[:, 0])
    # of zeros alone the classes with the smaller numbers come first
    assert baseline.answers.top5 == 12 / 12
    assert variant.answers.top5 == pytest.approx(11 / 12)
    noise, power = 2 * (margins[0] ** 2 + margins[5] ** 2), np.square(before).sum()
    assert variant.sqnr_db == pytest.approx(float(10 * np.log10(power / noise)[0]))
    assert baseline.sqnr_db is None
    assert baseline.per_class == ()
    assert variant.per_class[0] == ("0", 2, 2, 1)
    assert variant.per_class[3] == ("3", 1, 0, 0)
    assert variant.per_class[5] == ("5", 1, 1, 0)
    assert found.classes == tuple(map(str, range(10)))
    assert (found.labelled, found.samples, found.source) == (True, 12, "12 samples")
    assert found.changed_counts == (0, 2)
    assert [(one.index, one.label, one.baseline, one.answer) for one in found.changed] == [(5, 5, 5, 7), (0, 0, 0, 7)]
    assert [one.confidence for one in found.changed] == pytest.approx([float(margins[5, 0]), 1.0])
    assert found.changed[0].picture is None
    assert "12 samples" in found.source


def test_top_five_is_what_sorting_says() -> None:
    generator = np.random.default_rng(0)
    scores = generator.integers(4, size=(200, 8)).astype(np.float32)
    labels = generator.integers(8, size=200)
    found = qvis.benchmark(table(scores), data=numbers(200), labels=labels, **QUICK)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    assert found.variants[0].answers is not None
    assert found.variants[0].answers.top5 == np.mean([label in row for label, row in zip(labels, best, strict=True)])
    assert found.variants[0].answers.top1 == np.mean(best[:, 0] == labels)
    assert not found.has_baseline
    assert found.variants[0].per_class == ()
    few = qvis.benchmark(table(scores[:, :5]), data=numbers(200), labels=labels % 5, **QUICK)
    assert few.variants[0].answers is not None
    assert few.variants[0].answers.top5 is None


def test_one_score_for_two_classes_has_two_sides() -> None:
    labels = np.array([0, 1, 1, 0])
    shares = np.array([[0.1], [0.7], [0.4], [0.6]], np.float32)
    logits = np.array([[-2.0], [1.0], [3.0], [-0.5]], np.float32)
    found = qvis.benchmark([table(shares), table(logits)], data=numbers(4), labels=labels, **QUICK)
    first, second = (one.answers for one in found.variants)
    assert first is not None
    assert second is not None
    assert (first.top1, second.top1) == (0.5, 1.0)
    np.testing.assert_array_equal(first.chosen, [0, 1, 0, 1])
    np.testing.assert_allclose(first.confidence, [0.4, 0.2, 0.1, 0.1], rtol=1e-5)
    assert found.classes == ("0", "1")
    # without labels a number is a number
    assert qvis.benchmark(table(shares), data=numbers(4), **QUICK).variants[0].answers is None


def test_without_labels_answers_are_compared_with_the_baseline_alone() -> None:
    before, after = scores_of([0, 1, 2, 3]), scores_of([0, 1, 2, 0])
    found = qvis.benchmark(table(after), table(before), data=numbers(4), **QUICK)
    answers = found.variants[1].answers
    assert answers is not None
    assert (answers.top1, answers.top5, answers.agreement) == (None, None, 0.75)
    assert (found.labelled, found.classes, found.changed_counts) == (False, (), (0, 1))
    assert (found.changed[0].index, found.changed[0].label) == (3, None)


def test_all_outputs_count_the_same() -> None:
    generator = np.random.default_rng(1)
    small, large = generator.normal(size=(6, 3)), 1000 * generator.normal(size=(6, 4, 5))

    def model(shift: float) -> Model:
        return Model(Fake(lambda x: [one[x[:, 0].astype(int)] * (1 + shift) for one in (small, large)]))

    assert qvis.benchmark(model(0.1), model(0.0), data=numbers(6), **QUICK).variants[1].sqnr_db == pytest.approx(20)
    zeros = Model(Fake(lambda x: [np.zeros((len(x), 3)), large[x[:, 0].astype(int)]]))
    found = qvis.benchmark(zeros, model(0.0), data=numbers(6), **QUICK).variants[1].sqnr_db
    assert found == pytest.approx(10 * np.log10(2))
    same = qvis.benchmark(model(0.0), model(0.0), data=numbers(6), **QUICK).variants[1]
    assert same.sqnr_db == np.inf


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_outputs_that_are_not_finite_are_told(value: float) -> None:
    exact = scores_of([0, 1, 2, 3])
    broken = exact.copy()
    broken[2, 4:] = value
    found = qvis.benchmark(table(broken), table(exact), data=numbers(4), labels=[0, 1, 2, 3], **QUICK)
    assert found.variants[1].notes == ("Some of its outputs are NaN or infinite.",)
    assert found.variants[1].sqnr_db is not None
    assert not np.isfinite(found.variants[1].sqnr_db)
    same = qvis.benchmark(table(broken), table(broken), data=numbers(4), **QUICK)
    assert all(one.notes == ("Some of its outputs are NaN or infinite.",) for one in same.variants)
    assert np.isnan(same.variants[1].sqnr_db or 0.0)


def test_models_without_an_output_that_is_a_number_are_timed_all_the_same() -> None:
    def model() -> Model:
        return Model(Fake(lambda _: []))

    found = qvis.benchmark(model(), model(), data=numbers(4), **QUICK).variants[1]
    assert found.answers is None
    assert np.isnan(found.sqnr_db or 0.0)
    assert len(found.latencies) == 1


def test_changed_samples_are_the_surest_and_come_with_all_answers_and_pictures() -> None:
    generator = np.random.default_rng(0)
    pictures = generator.random((60, 3, 100, 80)).astype(np.float32)
    pictures[:, 0, 0, 0] = np.arange(60) + 10
    margin = generator.random(60).astype(np.float32) + 1

    def model(answers: Any) -> Model:
        scores = scores_of(answers) * margin[:, None]
        return Model(Fake(lambda x: scores[np.rint(x[:, 0, 0, 0] - 10).astype(int)]))

    zeros, ones = np.zeros(60, int), np.ones(60, int)
    few = zeros.copy()
    few[np.argsort(-margin)[[2, 50]]] = 3
    found = qvis.benchmark([model(ones), model(few)], model(zeros), data=pictures, **QUICK)
    assert found.changed_counts == (0, 60, 2)
    order = np.argsort(-margin)
    of_first = [one.index for one in found.changed if one.variant == 1]
    # also the one that only the second variant brings in
    assert of_first == [*order[:24], order[50]]
    assert [one.index for one in found.changed if one.variant == 2] == [order[2], order[50]]
    picture = found.changed[0].picture
    assert picture is not None
    assert (picture.shape, picture.dtype, picture.max()) == ((64, 51, 3), np.uint8, picture[0, 0, 0])


@pytest.mark.parametrize(("shape", "place"), [((8, 8, 1), -1), ((1, 8, 8), 0), ((3, 9, 5), 0), ((9, 5, 3), -1)])
def test_a_picture_has_its_channels_last_and_three_of_them(shape: tuple[int, ...], place: int) -> None:
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(1, *shape) - 5
    picture = picture_of(Batch((numbers(1), values), size=1), 0)
    assert picture is not None
    expected = np.rint(np.moveaxis(values[0], place, -1) / (values.size - 1) * 255 + 5 / (values.size - 1) * 255)
    np.testing.assert_allclose(picture, np.broadcast_to(expected, picture.shape), atol=1)
    assert picture.shape[2] == 3


def test_what_is_no_picture_has_none() -> None:
    for shape in ((1, 8), (1, 8, 8), (1, 2, 8, 8), (1, 3, 2, 2), (1, 3, 8, 8, 8)):
        assert picture_of(Batch((np.zeros(shape),), size=1), 0) is None
    flat = picture_of(Batch((), {"image": np.full((2, 8, 8, 3), 7.0)}, size=2), 1)
    assert flat is not None
    assert not flat.any()


def test_labels_that_do_not_go_with_the_outputs_are_refused_in_one_line() -> None:
    model = table(scores_of([0, 1, 2, 3], classes=4))
    with pytest.raises(BadArgumentError, match=r"labels: .*'Model'.*labels from 0 to 4, and 4 classes; give a whole"):
        qvis.benchmark(model, data=numbers(4), labels=[0, 1, 2, 4], **QUICK)
    with pytest.raises(BadArgumentError, match=r"labels: .*the labels are float64"):
        qvis.benchmark(model, data=numbers(4), labels=[0.5, 1, 2, 4], **QUICK)
    with pytest.raises(BadArgumentError, match=r"labels.*3 samples.*4"):
        qvis.benchmark(model, data=numbers(4), labels=[0, 1, 2], **QUICK)
    flat = table(np.arange(4.0))
    with pytest.raises(BadArgumentError, match=r"labels: .*first output has shape \(4,\)"):
        qvis.benchmark(flat, data=numbers(4), labels=[0, 1, 2, 3], **QUICK)


def test_targets_of_a_regression_that_come_with_the_data_are_left_out_and_that_is_said() -> None:
    values = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    data = [(numbers(4), values[:, 0])]
    found = qvis.benchmark(table(values), table(values), data=data, **QUICK)
    assert found.variants[0].answers is None
    assert not found.labelled
    [note] = found.notes
    assert note.startswith("Right answers are not counted: the labels are float32, 1 for each sample")
    assert found.variants[1].sqnr_db == np.inf


def test_classes_are_called_as_the_folders_of_images_are(tmp_path: Path) -> None:
    from PIL import Image

    for name, shade in (("zebra", 200), ("ant", 20)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), (shade,) * 3).save(tmp_path / name / "one.png")
    model = Model(Fake(lambda x: np.eye(2)[(x.mean(axis=(1, 2, 3)) > 0.5).astype(int)]))
    found = qvis.benchmark(model, data=tmp_path, **QUICK)
    assert found.classes == ("ant", "zebra")
    assert found.variants[0].answers is not None
    assert found.variants[0].answers.top1 == 1.0


# ---------------------------------------------------------------------------------------------------------------------
# One data set for all


def channels_first(x: Any) -> Any:
    if x.shape[1:] != (3, 4, 5):
        raise ValueError(f"expected (N, 3, 4, 5), got {x.shape}")
    return x.reshape(len(x), -1)[:, :7]


def channels_last(x: Any) -> Any:
    if x.shape[1:] != (4, 5, 3):
        raise ValueError(f"expected (N, 4, 5, 3), got {x.shape}")
    return channels_first(np.moveaxis(x, -1, 1))


@pytest.mark.parametrize(("given", "moved"), [((3, 4, 5), 1), ((4, 5, 3), 0)])
def test_channels_are_moved_where_a_model_has_them_elsewhere(given: tuple[int, ...], moved: int) -> None:
    x = np.random.default_rng(0).normal(size=(5, *given)).astype(np.float32)
    models = [Model(Fake(channels_first)), Model(Fake(channels_last))]
    found = qvis.benchmark(models[1], models[0], data=x, **QUICK)
    assert found.variants[1].sqnr_db == np.inf
    layout = ("channels first, (N, 3, 4, 5)", "channels last, (N, 4, 5, 3)")[moved]
    assert found.variants[moved].notes == (
        f"Its inputs were given with the {layout}: the data are laid out otherwise.",
    )
    assert found.variants[1 - moved].notes == ()
    assert all(len(one.latencies) == 1 for one in found.variants)


def test_data_that_a_model_takes_in_no_layout_or_in_two_are_refused_by_its_name() -> None:
    x = np.zeros((4, 2, 3, 4), np.float32)
    with pytest.raises(BadArgumentError, match=r"data: the model 'Model' cannot .*ValueError: expected \(N, 3, 4, 5\)"):
        qvis.benchmark(Model(Fake(channels_first)), data=x, **QUICK)

    def either(x: Any) -> Any:
        if x.shape[1:] == (2, 3, 4):
            raise ValueError("not like this")
        return x.sum(axis=(2, 3))

    with pytest.raises(BadArgumentError, match="not like this; with the channels moved it takes them in two ways"):
        qvis.benchmark(Model(Fake(either)), data=x, **QUICK)


def test_a_model_of_fixed_batch_gets_all_samples() -> None:
    values = np.random.default_rng(0).normal(size=(10, 3))
    fixed = table(values)
    fixed.engine.fixed_batch = 4
    found = qvis.benchmark(fixed, table(values), data=numbers(10), **QUICK)
    assert found.variants[1].sqnr_db == np.inf
    assert found.variants[1].notes == ("It takes 4 samples at once only, and was timed with that.",)
    assert [one.batch for one in found.variants[1].latencies] == [4]
    assert [one.batch for one in found.variants[0].latencies] == [2, 4]
    assert [one.batch for one in found.variants[1].ratios] == [4]


def test_tensors_several_inputs_and_names_reach_every_engine_as_arrays() -> None:
    def add(a: Any, *, b: Any) -> Any:
        assert type(a) is np.ndarray
        assert type(b) is np.ndarray
        return a + b

    x = torch.arange(12.0).reshape(6, 2)
    model = Model(Fake(lambda a, b: add(a, b=b)))
    found = qvis.benchmark(model, model, data={"a": x.bfloat16(), "b": x.numpy()}, **QUICK)
    assert found.variants[1].sqnr_db == np.inf
    batches = [(x[:4], torch.arange(4) % 2), (x[4:], torch.arange(2))]
    found = qvis.benchmark(Model(Fake(lambda a: a)), data=batches, **{**QUICK, "batch_sizes": (5, 9)})
    assert (found.samples, found.labelled) == (6, True)
    assert found.variants[0].answers is not None
    assert found.variants[0].answers.top1 == 0.5


def test_samples_are_gathered_and_repeated() -> None:
    batches = [Batch((numbers(3),), {"flag": True}, size=3), Batch((numbers(2) + 3,), {"flag": True}, size=2)]
    assert gather(batches, 2).args[0].ravel().tolist() == [0, 1]
    assert gather(batches, 7).args[0].ravel().tolist() == [0, 1, 2, 3, 4, 0, 1]
    longer = Batch((np.zeros((2, 2)),), {"flag": True}, size=2)
    assert gather([batches[0], longer], 4).args[0].ravel().tolist() == [0, 1, 2, 0]


def test_outputs_are_matched_by_order_then_by_shape() -> None:
    generator = np.random.default_rng(0)
    one, two = generator.normal(size=(2, 5)), generator.normal(size=(2, 3, 4, 4))
    assert match_outputs("m", [one, two], [one, two]).places == (0, 1)
    swapped = match_outputs("m", [two, one], [one, two])
    assert swapped.places == (1, 0)
    assert "another order" in swapped.notes[0]
    assert match_outputs("m", [one.reshape(2, 1, 1, 5)], [one]).apply([one.reshape(2, 1, 5, 1)])[0].shape == (2, 5)
    moved = match_outputs("m", [np.moveaxis(two, 1, -1)], [two])
    assert moved.apply([np.zeros((9, 4, 4, 3))])[0].shape == (9, 3, 4, 4)
    assert "channels elsewhere" in moved.notes[0]
    fewer = match_outputs("m", [one], [one, two])
    assert (fewer.places, "1 output and the baseline 2" in fewer.notes[0]) == ((0,), True)
    more = match_outputs("m", [two, one], [one])
    assert more.places == (1,)
    with pytest.raises(BadArgumentError, match=r"model: the outputs of 'm' have shapes \(5,\).*\(6,\)"):
        match_outputs("m", [one], [np.ones((2, 6))])


def test_outputs_of_one_shape_are_matched_by_order_unless_another_is_much_nearer() -> None:
    generator = np.random.default_rng(0)
    outputs = [generator.normal(size=(4, 5)) for _ in range(3)]
    rounded = [np.round(one, 1) for one in outputs]
    assert match_outputs("m", rounded, outputs).places == (0, 1, 2)
    assert match_outputs("m", [rounded[1], rounded[2], rounded[0]], outputs).places == (2, 0, 1)
    # nothing is near: the order stands
    assert match_outputs("m", [generator.normal(size=(4, 5)) for _ in range(3)], outputs).places == (0, 1, 2)
    broken = [rounded[0], rounded[1] * np.nan, rounded[2]]
    assert match_outputs("m", broken, outputs).places == (0, 1, 2)
    many = [generator.normal(size=(4, 5)) for _ in range(9)]
    assert match_outputs("m", many[::-1], many).places == tuple(range(9))


def test_made_up_inputs_are_for_size_and_speed_alone() -> None:
    seen = []

    def model(x: Any) -> Any:
        seen.append(x)
        return x

    found = qvis.benchmark(Model(Fake(model)), Model(Fake(model)), example_inputs=(1, 3, 4), **QUICK)
    assert (found.samples, found.source) == (0, "made-up inputs")
    assert found.notes == ("No data: the models ran on noise, so that nothing is known of their accuracy.",)
    assert all(one.answers is None and one.sqnr_db is None for one in found.variants)
    assert [one.no_layers for one in found.variants] == ["there are no data to run them on"] * 2
    assert {one.shape[1:] for one in seen} == {(3, 4)}
    assert seen[0].std() > 0.1


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calls": 0}, "calls: got 0"),
        ({"warmup": -1}, "warmup: got -1"),
        ({"samples": 0}, "samples: got 0"),
        ({"seed": -1}, "seed: got -1"),
        ({"batch_sizes": (1, 0)}, r"batch_sizes: got \(1, 0\)"),
        ({"batch_sizes": ()}, r"batch_sizes: got \(\)"),
        ({"threads": (True,)}, "threads: got"),
        ({"names": ["a", "b"]}, "names: got .* expected 1"),
        ({"data": None}, "data: got none"),
        ({"data": None, "labels": [1]}, "labels: there are no data"),
    ],
)
def test_arguments_out_of_bounds_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(BadArgumentError, match=message):
        qvis.benchmark(Model(Fake(lambda x: x)), **{"data": numbers(4), **QUICK, **arguments})


def test_models_that_cannot_be_run_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BadArgumentError, match="model: got none"):
        qvis.benchmark([], data=numbers(4))
    with pytest.raises(BadArgumentError, match=r"there is no file 'none\.onnx'"):
        qvis.benchmark("none.onnx", data=numbers(4))
    (tmp_path / "bad.tflite").write_bytes(b"")
    with pytest.raises(NotRunnableError, match=r"model 'bad.tflite': bad.tflite is refused"):
        qvis.benchmark(tmp_path / "bad.tflite", data=numbers(4))
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(UnsupportedModelError, match=r"holds weights without the model.*--weights"):
        qvis.benchmark(tmp_path / "weights.safetensors", data=numbers(4))
    with pytest.raises(UnsupportedModelError, match="model 'object': nothing runs it"):
        qvis.benchmark(object(), data=numbers(4))


def test_models_of_one_name_are_told_apart() -> None:
    found = qvis.benchmark([Model(Fake(lambda x: x))] * 2, data=numbers(4), **QUICK)
    assert [one.name for one in found.variants] == ["Model (1)", "Model (2)"]


def test_a_model_that_fails_later_is_named() -> None:
    def late(x: Any) -> Any:
        if x.max() > 40:
            raise RuntimeError("sample 41")
        return x

    with pytest.raises(BadArgumentError, match="data: the model 'late' cannot be run on them: RuntimeError: sample 41"):
        qvis.benchmark(Model(Fake(late)), data=numbers(50), names=["late"], **QUICK)


def test_a_reason_that_counting_gives_is_known_to_the_check_of_labels() -> None:
    # the words by which labels of other classes are told from labels of something else
    batch = Batch((numbers(2),), labels=np.array([0, 7]), size=2)
    assert why_no_answers([np.zeros((2, 3))], [batch]).startswith("there are labels")


# ---------------------------------------------------------------------------------------------------------------------
# Size and memory


def test_numbers_in_memory_count_as_they_are_stored() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 5))
    numbers_of = sum(one.numel() for one in model.parameters())
    assert parameter_bytes(model) == 4 * numbers_of
    assert parameter_bytes(model.half()) == 2 * numbers_of
    assert parameter_bytes(object()) == 0
    assert [bits_of(one) for one in ("float32", "bfloat16", "int4", "uint8", "complex64", "?")] == [32, 16, 4, 8, 64, 8]


def test_the_size_of_a_file_is_what_is_found_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.onnx").write_bytes(bytes(70))
    monkeypatch.setitem(files, "net.onnx", Fake(lambda x: x))
    contents = Contents((), {"int8": 30, "float32": 8}, 70)
    monkeypatch.setattr(engines, "inspect", lambda _: contents)
    [found] = qvis.benchmark(str(tmp_path / "net.onnx"), data=numbers(4), **QUICK).variants
    assert (found.name, found.path) == ("net.onnx", str(tmp_path / "net.onnx"))
    assert (found.file_bytes, found.parameter_bytes, found.contents) == (70, 38, contents)

    def refuse(path: Path) -> Contents:
        raise UnsupportedModelError(f"model: {path.name} cannot be looked into")

    monkeypatch.setattr(engines, "inspect", refuse)
    [found] = qvis.benchmark(tmp_path / "net.onnx", data=numbers(4), **QUICK).variants
    assert (found.file_bytes, found.parameter_bytes, found.contents) == (70, 0, None)
    assert found.notes == ("What the file holds cannot be told: model: net.onnx cannot be looked into",)


def test_the_memory_of_a_model_in_memory_is_not_known() -> None:
    found = qvis.benchmark(Model(Fake(lambda x: x)), data=numbers(4), **{**QUICK, "memory": True})
    assert (found.variants[0].peak_bytes, found.variants[0].file_bytes) == (None, None)
    assert found.variants[0].no_memory == "it is in memory already; save it to a file, and give that"
    found = qvis.benchmark(Model(Fake(lambda x: x)), data=numbers(4), **QUICK)
    assert found.variants[0].no_memory == "it was not asked for"


def test_inputs_reach_another_process_as_they_are(tmp_path: Path) -> None:
    batch = Batch((numbers(3), np.arange(6).reshape(3, 2)), {"mask": np.ones((3, 4), bool), "0": numbers(3)}, size=3)
    write_inputs(tmp_path / "inputs.npz", batch)
    found = read_inputs(tmp_path / "inputs.npz")
    assert (found.size, set(found.kwargs)) == (3, {"mask", "0"})
    for one, other in zip((*batch.args, *batch.kwargs.values()), (*found.args, *found.kwargs.values()), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell the peak")
def test_the_peak_rises_by_what_running_takes(tmp_path: Path) -> None:
    taken = 64 * 2**20
    code = f"""
import numpy as np
from pathlib import Path
from qvis.benchmarking.peak import rise
from qvis.quantization import engines
from qvis.running import Batch
class Engine:
    def prepare(self, batch):
        return lambda: np.ones((batch.size, {taken} // 16))
engines.open_engine = lambda model, threads: Engine()
print(rise(Path("net.none"), Batch((np.zeros(2),), size=2), 1))
"""
    path = os.pathsep.join(map(os.path.abspath, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
    )
    assert done.stderr == ""
    assert 0.5 * taken < int(done.stdout) < 3 * taken


def test_memory_says_what_failed_in_the_other_process(tmp_path: Path) -> None:
    file = tmp_path / "net.nothing"
    file.write_bytes(b"")
    fake: Any = Fake(lambda x: x)
    found, why = peak_memory(Contender("net", file, fake, 1), Batch((numbers(2),), size=2))
    assert found is None
    assert why.startswith("running it in a process of its own failed: UnsupportedModelError: model: there is nothing")
    nested = Batch(({"a": numbers(2)},), size=2)
    assert "nests of arrays" in peak_memory(Contender("net", file, fake, 1), nested)[1]


# ---------------------------------------------------------------------------------------------------------------------
# Layers


class Net(nn.Module):
    """Two convolutions with normalizations and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 6, 3, bias=False), nn.Linear(6, 4)
        self.after = nn.BatchNorm2d(6)
        for norm in (self.norm, self.after):
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.uniform_(norm.bias, 0.2, 1)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.nn.functional.relu6(self.after(self.second(x)))
        return self.head(x.mean((2, 3)))


class Written(nn.Module):
    """What a converter makes of it: normalizations folded, other names, weights rounded."""

    def __init__(self, net: Net, bits: int) -> None:
        super().__init__()
        fuse = torch.nn.utils.fusion.fuse_conv_bn_eval
        self.conv_1, self.conv_2, self.dense = fuse(net.first, net.norm), fuse(net.second, net.after), nn.Linear(6, 4)
        self.dense.load_state_dict(net.head.state_dict())
        with torch.no_grad():
            for layer in (self.conv_1, self.conv_2, self.dense):
                step = layer.weight.abs().max() / (2 ** (bits - 1) - 1)
                layer.weight.copy_(torch.round(layer.weight / step) * step)
        self.eval()

    @torch.no_grad()
    def trace(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        found = {"conv_1": torch.relu(self.conv_1(x))}
        found["conv_2"] = torch.nn.functional.relu6(self.conv_2(found["conv_1"]))
        found["dense"] = self.dense(found["conv_2"].mean((2, 3)))
        return found


def opened(net: nn.Module, function: Callable[..., Any], **attributes: Any) -> nn.Module:
    object.__setattr__(net, "engine", Fake(function, **attributes))
    return net


def run_of(net: nn.Module) -> Callable[..., Any]:
    return lambda x: net(torch.as_tensor(x)).detach().numpy()


def float_net() -> nn.Module:
    net = Net()
    return opened(net, run_of(net))


def written(bits: int = 6, shown: tuple[str, ...] = ("conv_1", "conv_2", "dense")) -> nn.Module:
    made = Written(Net(), bits)
    fused = {"conv_1": "relu", "conv_2": "relu6", "dense": ""}

    def look(batch: Batch) -> Mapping[str, Looked]:
        # as an engine does that has its channels last, behind activations that it has fused
        found = {name: values.numpy() for name, values in made.trace(torch.as_tensor(batch.args[0])).items()}
        return {
            name: Looked(np.moveaxis(values, 1, -1), values.ndim - 1, fused[name])
            for name, values in found.items()
            if name in shown
        }

    return opened(made, lambda x: made.trace(torch.as_tensor(x))["dense"].numpy(), look=look)


def test_each_layer_is_compared_behind_its_normalization_and_activation() -> None:
    x = np.random.default_rng(0).normal(size=(20, 3, 10, 9)).astype(np.float32)
    before = {name: values.clone() for name, values in Net().state_dict().items()}
    net, file = float_net(), written()
    found = qvis.benchmark(file, net, data=x, **QUICK)
    errors = {one.name: one for one in found.variants[1].layers}
    assert [(one.name, one.found, one.op) for one in found.variants[1].layers] == [
        ("first", "conv_1", "Conv2d"),
        ("second", "conv_2", "Conv2d"),
        ("head", "dense", "Linear"),
    ]
    exact = Written(Net(), 24).trace(torch.as_tensor(x))  # 24 bits: nothing but the fusing
    rounded = Written(Net(), 6).trace(torch.as_tensor(x))
    for name, layer in (("first", "conv_1"), ("second", "conv_2"), ("head", "dense")):
        own = exact[layer].transpose(0, 1).flatten(1).double().numpy()
        noise = np.square(own - rounded[layer].transpose(0, 1).flatten(1).numpy()).sum(axis=1)
        power = np.square(own).sum(axis=1)
        assert errors[name].sqnr_db == pytest.approx(10 * np.log10(power.sum() / noise.sum()), abs=0.05)
        np.testing.assert_allclose(errors[name].channels, 10 * np.log10(power / noise), atol=0.1)
        assert 10 < errors[name].sqnr_db < 60
    assert found.variants[0].no_layers == "it is the baseline"
    assert (found.variants[1].no_layers, found.variants[1].notes) == ("", ())
    for name, values in net.state_dict().items():
        assert torch.equal(values, before[name])


@pytest.mark.parametrize("behind", [False, True])
def test_a_file_with_normalizations_may_show_what_is_before_or_behind_them(behind: bool) -> None:
    x = np.random.default_rng(0).normal(size=(8, 3, 10, 9)).astype(np.float32)
    other = Net()

    @torch.no_grad()
    def look(batch: Batch) -> Mapping[str, Looked]:
        first = other.first(torch.as_tensor(batch.args[0]))
        normed = other.norm(first)
        second = other.second(torch.relu(normed))
        shown = {"first": normed, "second": other.after(second)} if behind else {"first": first, "second": second}
        return {name: Looked(values.numpy(), 1) for name, values in shown.items()}

    found = qvis.benchmark(opened(other, run_of(other), look=look), float_net(), data=x, **QUICK).variants[1]
    assert [(one.name, one.sqnr_db > 100) for one in found.layers] == [("first", True), ("second", True)]


def test_layers_that_are_not_shown_or_not_known_are_told() -> None:
    x = np.random.default_rng(0).normal(size=(4, 3, 10, 9)).astype(np.float32)
    found = qvis.benchmark(written(shown=("conv_1",)), float_net(), data=x, **QUICK).variants[1]
    assert [one.name for one in found.layers] == ["first"]
    assert found.notes == ("2 layers not compared, since the engine does not show what it puts out: conv_2, dense.",)
    stranger = written()
    with torch.no_grad():
        stranger.dense.weight.normal_()  # type: ignore[operator, union-attr]
    found = qvis.benchmark(stranger, float_net(), data=x, **QUICK).variants[1]
    assert [one.name for one in found.layers] == ["first", "second"]
    assert found.notes == ("1 layer not compared, since no layer of the baseline has weights like these: dense.",)


def test_an_activation_that_is_not_known_leaves_its_layer_out() -> None:
    x = np.random.default_rng(0).normal(size=(4, 3, 10, 9)).astype(np.float32)
    file = written()
    own = file.engine.look  # type: ignore[union-attr]
    file.engine.look = lambda batch: {  # type: ignore[union-attr]
        name: Looked(one.values, one.axis, "tanh") for name, one in own(batch).items()
    }
    found = qvis.benchmark(file, float_net(), data=x, **QUICK).variants[1]
    assert (found.layers, found.no_layers) == ((), "tanh is fused into it")


def test_nothing_fails_because_layers_cannot_be_looked_at() -> None:
    x = np.random.default_rng(0).normal(size=(4, 3, 10, 9)).astype(np.float32)

    def why(model: Any, baseline: Any, **arguments: Any) -> str:
        return qvis.benchmark(model, baseline, data=x, **{**QUICK, **arguments}).variants[1].no_layers

    assert why(float_net(), float_net()) == "fake 1.0 does not show what single layers put out"
    assert why(written(), float_net(), layers=False) == "it was not asked for"
    file = written()

    file.engine.look = None  # type: ignore[union-attr]
    assert why(file, float_net()) == "TypeError: 'NoneType' object is not callable"
    run = float_net().engine.function  # type: ignore[union-attr]
    assert "the layers of the baseline cannot be looked at" in why(written(), Model(Fake(run)))
    alone = qvis.benchmark(written(), data=x, **QUICK).variants[0]
    assert alone.no_layers == "there is no baseline to compare them with"


def test_a_baseline_that_qvis_cannot_run_is_looked_at_in_its_own_engine() -> None:
    x = np.random.default_rng(0).normal(size=(16, 3, 10, 9)).astype(np.float32)
    exact, file = written(bits=24), written(bits=6)
    file.engine.fixed_batch = 4  # type: ignore[union-attr]
    found = qvis.benchmark(file, exact, data=x, **QUICK).variants[1]
    whole = qvis.benchmark(written(bits=6), float_net(), data=x, **QUICK).variants[1]
    assert found.no_layers == ""
    assert [one.name for one in found.layers] == ["conv_1", "conv_2", "dense"]
    for one, other in zip(found.layers, whole.layers, strict=True):
        assert one.sqnr_db == pytest.approx(other.sqnr_db, abs=0.05)


def test_a_benchmark_says_what_it_is() -> None:
    found = qvis.benchmark(Model(Fake(lambda x: x)), data=numbers(4), **QUICK)
    assert isinstance(found, Benchmark)
    assert isinstance(found, qvis.Benchmark)
    assert "core" in found.machine
    assert found.warmup == 1
    assert found.baseline is None
