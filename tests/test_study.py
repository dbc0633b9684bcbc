"""A study of a model: what calibration, backward passes and measurements gather, compared with direct computation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvis.analysis import study as module
from qvis.analysis.study import Change, Study, class_probe, rank_correlation
from qvis.errors import BadArgumentError
from qvis.layers import Layer, Network
from qvis.noise import WeightGrid, round_input, round_weight, span
from qvis.running import Batch, Gradient, Passage, silently

RANDOM = np.random.default_rng(0)
GRIDS = [WeightGrid(4, "tensor"), WeightGrid(4, "channel")]
INPUTS = RANDOM.standard_normal((12, 5)).astype(np.float32)


WEIGHT = RANDOM.standard_normal((4, 5)).astype(np.float32)
FIRST = (INPUTS[:4] @ WEIGHT.T)[0]


class Linear:
    """Two matrices, one after the other, and the outputs of both."""

    differentiable = True
    layers = ("first", "second")

    def __init__(self, outputs: Callable[..., list[np.ndarray]] = lambda a, b: [a, b]) -> None:
        self.own = {
            "first": RANDOM.standard_normal((4, 5)).astype(np.float32),
            "second": 100 * RANDOM.standard_normal((3, 4)).astype(np.float32),
        }
        self.notes: list[str] = []
        self.outputs = outputs
        self.passes = 0

    def network(self) -> Network:
        layers = [Layer(n, "Linear", w.shape, "float32", lambda w=w: w) for n, w in self.own.items()]
        return Network("model", "none", tuple(layers))

    def run(
        self, batch: Batch, *, weights: Any = None, grids: Any = None, watch: Any = None, others: Any = None
    ) -> Any:
        x, results = batch.args[0], []
        for name in self.layers:
            w = {**self.own, **(weights or {})}[name]
            x = round_input(x, grids[name]) if grids and name in grids else x
            y = x @ w.T
            if watch:
                watch(Passage(name, x, -1, y, x @ others[name].T if others and name in others else None))
            results.append(y)
            x = y
        return self.outputs(*results)

    def differentiate(self, batch: Batch, probe: Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]]) -> Any:
        self.passes += 1
        x = batch.args[0]
        y = x @ self.own["first"].T
        v = probe([y, y @ self.own["second"].T])
        back = v[0] + v[1] @ self.own["second"]
        yield Gradient("first", back.T @ x, ((x, back @ self.own["first"]),), -1)
        yield Gradient("second", v[1].T @ y, ((y, v[1] @ self.own["second"]),), -1)


def batches(size: int = 4) -> list[Batch]:
    return [Batch((INPUTS[i : i + size],), size=size) for i in range(0, len(INPUTS), size)]


def begun(runner: Linear | None = None) -> tuple[Linear, Study]:
    runner = runner or Linear()
    study = Study(runner.network(), runner, batches(), GRIDS, silently)
    study.calibrate()
    return runner, study


def exact(runner: Linear, weights: Mapping[str, np.ndarray] = {}) -> list[np.ndarray]:
    w = {**runner.own, **weights}
    first = INPUTS.astype(float) @ w["first"].T
    return [first, first @ w["second"].T]


def test_calibration_sees_powers_ranges_and_means() -> None:
    runner, study = begun()
    np.testing.assert_allclose(study.power, [np.square(one).sum() / 12 for one in exact(runner)], rtol=1e-5)
    entering = study.entering["second"]
    hidden = exact(runner)[0]
    np.testing.assert_allclose(entering.low, hidden.min(axis=0), rtol=1e-5)
    np.testing.assert_allclose(entering.high, hidden.max(axis=0), rtol=1e-5)
    np.testing.assert_allclose(entering.total, hidden.sum(axis=0), rtol=1e-4, atol=1e-4)
    assert entering.count == 12
    assert entering.grids == (span(float(entering.low.min()), float(entering.high.max()), 4),)
    assert study.operations == {"first": 20, "second": 12}


def test_the_noise_in_a_layers_own_output_is_that_of_its_first_batch() -> None:
    runner, study = begun()
    x = INPUTS[:4].astype(float)
    for grid in GRIDS:
        y = x @ runner.own["first"].T
        noise = x @ (round_weight(runner.own["first"], grid) - runner.own["first"]).T
        expected = 10 * np.log10(np.square(y).sum() / np.square(noise).sum())
        assert study.output_sqnr("first")[grid.granularity] == pytest.approx(expected, rel=1e-3)


def test_measured_damage_weighs_each_output_by_its_own_power() -> None:
    runner, study = begun()
    plain = exact(runner)
    for name, grid in (("first", GRIDS[0]), ("second", GRIDS[1])):
        moved = exact(runner, {name: round_weight(runner.own[name], grid)})
        shares = [np.square(a - b).sum() / np.square(b).sum() for a, b in zip(moved, plain, strict=True)]
        assert study.measure([Change({name: grid})]) == pytest.approx([np.mean(shares)], rel=1e-3)
    entering = study.entering["second"].grids[0]
    moved_second = round_input(plain[0], entering) @ runner.own["second"].T
    expected = np.square(moved_second - plain[1]).sum() / np.square(plain[1]).sum() / 2
    assert study.measure([Change(inputs={"second": entering})]) == pytest.approx([expected], rel=1e-3)


def test_predicted_damage_of_a_linear_model_comes_to_the_measured_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTLED", 2.0)
    _, study = begun()
    outcome = study.differentiate(batches(2) * 150)
    assert outcome.passes == 900
    found = study.predict_weights().damage
    names, inputs = study.predict_inputs()
    assert names == ["first", "second"]
    for row, name in enumerate(study.layers):
        for column, grid in enumerate(GRIDS):
            measured = study.measure([Change({name.name: grid})])[0]
            assert found[row, column] == pytest.approx(measured, rel=0.5)
        measured = study.measure([Change(inputs={name.name: study.entering[name.name].grids[0]})])[0]
        assert inputs.damage[row, 0] == pytest.approx(measured, rel=0.5)


def test_passes_stop_once_two_halves_of_them_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    for agreement, expected in ((1.0, 20), (0.5, 60)):
        runner, study = begun()
        monkeypatch.setattr(Study, "_agreement", lambda _, agreement=agreement: agreement)
        outcome = study.differentiate(batches(4) * 20)
        assert (outcome.passes, outcome.settled, outcome.agreement) == (expected, expected < 60, agreement)
        assert runner.passes == expected


def test_few_passes_are_all_made() -> None:
    _, study = begun()
    assert study.differentiate(batches(4)).passes == 3
    assert module.LEAST_PASSES > 3


def test_an_output_without_power_is_left_out() -> None:
    runner, study = begun(Linear(lambda a, b: [0 * a, b]))
    (damage,) = study.measure([Change({"second": GRIDS[0]})])
    plain, moved = exact(runner)[1], exact(runner, {"second": round_weight(runner.own["second"], GRIDS[0])})[1]
    assert damage == pytest.approx(np.square(moved - plain).sum() / np.square(plain).sum(), rel=1e-3)


@pytest.mark.parametrize(
    ("outputs", "text"),
    [
        (lambda a, b: [0 * a, 0 * b], "its outputs hold no real number other than zero"),
        (lambda a, _: [a * np.nan], "NaN or infinite numbers"),
        (lambda *_: [], "its outputs hold no real number"),
        (lambda a, b: [a, b] if np.array_equal(a[0], FIRST) else [a], "another number for others"),
    ],
)
def test_outputs_that_tell_nothing_are_refused(outputs: Any, text: str) -> None:
    runner = Linear(outputs)
    runner.own["first"] = WEIGHT
    with pytest.raises(BadArgumentError, match=text):
        begun(runner)


def test_outputs_that_change_their_shape_are_refused() -> None:
    runner, study = begun()
    own = runner.own["first"]
    runner.outputs = lambda a, b: [a, b] if np.array_equal(a, INPUTS[:4] @ own.T) else [a[1:], b]
    with pytest.raises(BadArgumentError, match="with rounded numbers"):
        study.measure([Change({"first": GRIDS[0]})])


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=12))
@settings(deadline=None)
def test_the_rank_correlation_is_spearmans(pairs: list[tuple[int, int]]) -> None:
    a, b = np.array(pairs, dtype=float).T
    ranks = [[(one < v).sum() + ((one == v).sum() - 1) / 2 for v in one] for one in (a, b)]
    if a.std() == 0 or b.std() == 0:
        assert rank_correlation(a, b) == 1
    else:
        assert rank_correlation(a, b) == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-12)


def test_rounding_errors_of_small_layers_are_kept_until_the_memory_is_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Linear()
    study = Study(runner.network(), runner, batches(), GRIDS, silently)
    study.weights = {"big": np.zeros((8, 8)), "small": np.zeros((1, 2)), "middle": np.zeros((2, 2))}
    monkeypatch.setattr(module, "CACHE_BYTES", 4 * 6 * len(GRIDS))
    assert study._kept() == {"small", "middle"}


@pytest.mark.parametrize("share", [False, True])
def test_one_score_for_two_classes_is_probed_as_two_scores_are(share: bool) -> None:
    logits = np.linspace(-3, 3, 7)[:, None]
    ones = 1 / (1 + np.exp(-logits))
    found = np.stack([class_probe(ones if share else logits, np.random.default_rng(i)) for i in range(4000)])
    # the derivative of log p of the class by the logit is 1 - p or -p, by the share 1 / p or -1 / (1 - p)
    expected = ones * (1 - ones) if not share else 1 / (ones * (1 - ones))
    np.testing.assert_allclose(np.square(found, dtype=np.float64).mean(axis=0), expected, rtol=0.15)
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=0.1 * np.sqrt(expected.max()))
