"""How small layers can be made: figures against a loop that does what it says, predictions against the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from math import isnan, log2, log10
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qvis
from qvis import adapters
from qvis.adapters.digits import load_digits_model, load_digits_samples
from qvis.analysis.coding import FewerBits, entropy
from qvis.analysis.compressing import Compression, Stored
from qvis.analysis.factorizing import LowRank, Spectrum, decompose, why_not
from qvis.analysis.planning import accuracy
from qvis.analysis.pruning import SmallestWeights, TwoOfFour, WholeChannels
from qvis.analysis.sizes import METHODS, Compressibility, kept_db
from qvis.analysis.study import rank_correlation
from qvis.errors import BadArgumentError, OutputError, QvisError
from qvis.layers import Graph, Layer, Node
from qvis.noise import WeightGrid, round_weight
from qvis.quantization.grids import Scheme
from qvis.running import Batch

WAYS = (SmallestWeights, TwoOfFour, WholeChannels, LowRank)
SHAPES = ((12, 30), (30, 12), (5, 6), (40, 9))


def weight_of(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    weight = random.standard_normal(shape) * np.exp(random.standard_normal((shape[0], 1)))
    weight[0, :2] = 0
    weight[1] *= 1e-5
    weight[2, 1:4] = weight[2, 0]
    return weight.astype(np.float32)


def stored(shape: tuple[int, int] = SHAPES[0], bits: int = 8) -> Stored:
    weight = weight_of(shape)
    return Stored(weight, round_weight(weight, WeightGrid(bits, "channel")), bits)


def shown(way: type[Compression], what: Stored, gradients: Sequence[np.ndarray]) -> Compression:
    """A way that has seen the gradients."""
    made = way(what)
    for gradient in gradients:
        rows: Any = np.flatnonzero(gradient.any(axis=1))
        made.see(gradient[rows], slice(None) if len(rows) == len(gradient) else rows)
    made.settle(np.sum([np.square(one).sum(axis=1) for one in gradients], axis=0))
    return made


def gradients_of(shape: tuple[int, int]) -> list[np.ndarray]:
    random = np.random.default_rng(1)
    found = [random.standard_normal(shape).astype(np.float32) for _ in range(4)]
    found[2][1:] = 0  # as of a table of which one row was looked up
    return found


# ---------------------------------------------------------------------------------------------- each way, naively


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", WAYS)
def test_one_pass_tells_of_every_size_what_making_the_change_would(
    way: type[Compression], shape: tuple[int, int]
) -> None:
    what, gradients = stored(shape), gradients_of(shape)
    made = shown(way, what, gradients)
    noise = made.noise()
    for option, setting in enumerate(made.settings):
        change = made.make(setting).astype(np.float64) - what.weight
        for gradient, along in zip(gradients, made.along, strict=True):
            assert along[option] == pytest.approx(float((gradient * change).sum()), rel=1e-4, abs=1e-4)
        np.testing.assert_allclose(noise[option], (change**2).sum(axis=1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_the_estimates_are_those_of_the_noise_model(way: type[Compression]) -> None:
    what, gradients = stored(), gradients_of(SHAPES[0])
    made = shown(way, what, gradients)
    importance = np.stack([np.square(one, dtype=float).sum(axis=1) for one in gradients])
    samples = np.array([2.0, 1.0, 3.0, 4.0])
    diagonal, projected, coarse = made.estimates(importance, samples)
    for option, setting in enumerate(made.settings):
        change = made.make(setting).astype(float) - what.weight
        for i, gradient in enumerate(gradients):
            mean = sum((gradient[o] ** 2).sum() * (change[o] ** 2).mean() for o in range(len(change)))
            assert diagonal[i, option] == pytest.approx(mean / samples[i], rel=1e-3)
            assert projected[i, option] == pytest.approx(
                (gradient * change).sum() ** 2 / samples[i], rel=1e-3, abs=1e-6
            )
        if way is WholeChannels:
            assert coarse[option] == (setting < 11)  # one of the 12 is dead
            continue
        lost = [(change[o] ** 2).sum() > 0.25 * (what.weight[o].astype(float) ** 2).sum() for o in range(len(change))]
        damage = importance.sum(axis=0) * (change**2).sum(axis=1)
        assert coarse[option] == pytest.approx(damage[lost].sum() / damage.sum(), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_smallest_weights_go_first(shape: tuple[int, int]) -> None:
    what = stored(shape)
    made = SmallestWeights(what)
    for setting, size in zip(made.settings, made.sizes, strict=True):
        kept = made.make(setting) != 0
        assert np.count_nonzero(kept) == setting
        worth = (what.rounded != 0) & ~kept
        assert not worth.any() or np.abs(what.weight[worth]).max() < np.abs(what.weight[kept]).min()
        assert size == -(-what.weight.size // 8) + setting + 2 * shape[0]
    # those that round to zero cost nothing
    np.testing.assert_array_equal(made.make(made.settings[-1]), what.rounded)


def test_two_of_each_four_neighbours_stay() -> None:
    what = stored((6, 10))
    made = TwoOfFour(what)
    left = made.make(made.settings[0])
    for o in range(6):
        for start in range(0, 10, 4):
            part = what.weight[o, start : start + 4]
            order = sorted(range(len(part)), key=lambda i: (-abs(part[i]), i))[:2]
            for i in range(len(part)):
                assert left[o, start + i] == (what.rounded[o, start + i] if i in order else 0)
    assert made.settings == [6 * (2 + 2 + 2)]
    assert made.sizes == [6 * 6 * 10 // 8 + 2 * 6]


def test_channels_go_in_the_order_of_their_importance() -> None:
    what, gradients = stored(), gradients_of(SHAPES[0])
    made = shown(WholeChannels, what, gradients)
    importance = np.sum([np.square(one).sum(axis=1) for one in gradients], axis=0)
    order = np.argsort(-importance * np.square(what.rounded).sum(axis=1))
    for setting, size in zip(made.settings, made.sizes, strict=True):
        expected = np.zeros_like(what.weight)
        expected[order[:setting]] = what.rounded[order[:setting]]
        np.testing.assert_array_equal(made.make(setting), expected)
        assert size == -(-12 // 8) + setting * (30 + 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_low_rank_is_the_best_one(shape: tuple[int, int]) -> None:
    what = stored(shape, bits=16)
    made = LowRank(what)
    u, s, v = np.linalg.svd(what.weight.astype(float), full_matrices=False)
    np.testing.assert_allclose(made.spectrum.values, s, atol=1e-6 * s[0])
    for setting, size in zip(made.settings, made.sizes, strict=True):
        best = (u[:, :setting] * s[:setting]) @ v[:setting]
        np.testing.assert_allclose(made.make(setting), best, atol=2e-4 * s[0])
        assert size == setting * (2 * sum(shape) + 4) < what.bytes or setting == 0


def test_a_matrix_that_no_rank_makes_smaller_has_no_rank() -> None:
    made = LowRank(stored((3, 4)))
    assert max(made.settings) * (3 + 4 + 4) < stored((3, 4)).bytes


def test_singular_vectors_multiply_to_the_matrix() -> None:
    for shape in SHAPES:
        weight = weight_of(shape)
        left, right, _ = decompose(weight, min(shape))
        np.testing.assert_allclose(left.T @ right, weight, atol=1e-5)


def test_effective_and_energy_rank() -> None:
    assert Spectrum(np.ones(7)).effective_rank == pytest.approx(7)
    assert Spectrum(np.array([3.0, 0, 0])).effective_rank == pytest.approx(1)
    shares = [0.5, 0.25, 0.25]
    expected = 2 ** -sum(p * log2(p) for p in shares)
    spectrum = Spectrum(np.array([2.0, 1.0, 1.0]))
    assert spectrum.effective_rank == pytest.approx(expected)
    assert [spectrum.energy_rank(share) for share in (0.5, 0.8, 0.99)] == [1, 2, 3]
    assert Spectrum(np.zeros(3)).effective_rank == Spectrum(np.zeros(3)).energy_rank(0.9) == 0


def test_codes_have_the_entropy_that_counting_gives() -> None:
    codes = np.array([[-2, -2, 3, 0], [3, 3, -2, -2]])
    bits, used = entropy(codes)
    assert bits == pytest.approx(-(0.5 * log2(0.5) + 0.375 * log2(0.375) + 0.125 * log2(0.125)))
    assert used == 3
    assert entropy(np.zeros((4, 4), dtype=int)) == (0.0, 1)


def test_fewer_bits_are_those_of_the_grids() -> None:
    weight = weight_of((40, 90))
    made = FewerBits(weight, (2, 3, 4, 8))
    for width, packed, coded, mean in zip(made.widths, made.packed, made.coded, made.entropies, strict=True):
        fitted = Scheme("uniform", width, "channel").fit(weight)
        np.testing.assert_allclose(made.make(width), fitted.rounded(), rtol=1e-6, atol=1e-9)
        assert packed == fitted.bytes
        bits, used = entropy(fitted.codes)
        assert mean == bits <= width
        assert coded == min(packed, -(-int(np.ceil(bits * weight.size)) // 8) + 2 * used + 2 * 40)


# ---------------------------------------------------------------------------------------------- what does not suit


def layer_of(op: str, shape: tuple[int, ...]) -> Layer:
    return Layer("a", op, shape, "float32", lambda: np.ones((shape[0], int(np.prod(shape[1:]))), np.float32))


def graph_of(op: str, **attributes: Any) -> Graph:
    return Graph((Node("a", op, layer="a", attributes=attributes),))


@pytest.mark.parametrize(
    ("op", "shape", "graph", "reason"),
    [
        ("Conv2d", (8, 4, 3, 3), graph_of("conv", groups=1), ""),
        ("Conv2d", (8, 1, 3, 3), graph_of("conv", groups=8), "a convolution of 8 groups"),
        ("Conv2d", (8, 4, 3, 3), None, "the model's graph is not known"),
        ("Linear", (8, 4), None, ""),
        ("other", (8, 4), None, "it is not known how the model uses this weight"),
        ("Linear", (2100, 2200), None, "its shorter side is 2,100"),
    ],
)
def test_why_a_matrix_cannot_be_put_in_two(op: str, shape: tuple[int, ...], graph: Graph | None, reason: str) -> None:
    found = why_not(layer_of(op, shape), graph)
    assert reason in found
    assert bool(found) == bool(reason)


# ---------------------------------------------------------------------------------------------- a whole model


@pytest.fixture(scope="module")
def found() -> Compressibility:
    """The shipped model, everything measured."""
    inputs, labels = load_digits_samples()
    made = qvis.compressibility(load_digits_model(), inputs, labels=labels, samples=24, probes=2)
    assert made.state == "predicted"
    list(made.measure())
    return made


def test_predictions_agree_with_what_is_measured(found: Compressibility) -> None:
    for method, agreement, off in (("coding", 0.9, 2), ("rank", 0.9, 2.5), ("weights", 0.7, 3), ("channels", 0.5, 8)):
        pairs = np.array(
            [
                (kept_db(one.trial.predicted), kept_db(one.damage))
                for one in found.scores
                if one.trial.method == method and kept_db(one.damage) > 10
            ]
        )
        assert len(pairs) > 8
        assert rank_correlation(pairs[:, 0], pairs[:, 1]) > agreement, method
        assert np.median(np.abs(pairs[:, 0] - pairs[:, 1])) < off, method


def test_a_measured_score_is_what_the_model_does_with_the_change(found: Compressibility) -> None:
    model = load_digits_model(folded=True)
    inputs = torch.as_tensor(load_digits_samples()[0])
    every = np.unique(np.linspace(0, len(inputs) - 1, 24).astype(int))
    assert found.samples == len(every)
    score = next(one for one in found.scores if one.trial.method == "rank")
    layer = found.by_name[score.trial.layer]
    changed = layer.curves["rank"].make(score.trial.choice[layer.name][1])
    with torch.no_grad():
        before = model(inputs)
        weight: Any = model.get_submodule(layer.name).weight
        weight.copy_(torch.as_tensor(changed).reshape(weight.shape))
        after = model(inputs)
    # other samples of the same kind: the same to some dB
    noise = float(((after - before) ** 2).sum() / (before**2).sum())
    assert kept_db(noise) == pytest.approx(kept_db(score.damage), abs=3)


def test_curves_go_from_small_and_bad_to_large_and_good(found: Compressibility) -> None:
    for layer in found.layers:
        assert set(layer.curves) | set(layer.refused) == set(METHODS)
        for curve in layer.curves.values():
            sizes = [point.bytes for point in curve.points]
            assert sizes == sorted(sizes)
            assert len({point.setting for point in curve.points}) == len(sizes) <= 24
        assert layer.curves["rounding"].points[-1].bytes == layer.bytes
        first, last = (layer.curves["weights"].points[i].damage.predicted for i in (0, -1))
        assert first > last


def test_depthwise_convolutions_are_refused_by_name(found: Compressibility) -> None:
    refused = {layer.name: layer.refused["rank"] for layer in found.layers if "rank" in layer.refused}
    assert refused
    assert all("depthwise" in name and "groups" in reason for name, reason in refused.items())


def test_what_fewer_bits_do_is_measured_once_for_both_ways_to_store_them(found: Compressibility) -> None:
    for layer in found.layers:
        packed = {one.setting: one.damage.measured for one in layer.curves["rounding"].points}
        coded = {one.setting: one.damage.measured for one in layer.curves["coding"].points}
        np.testing.assert_equal(packed, coded)
    made = [
        (one.trial.layer, one.trial.choice[one.trial.layer][1]) for one in found.scores if "ing" in one.trial.method
    ]
    assert len(made) == len(set(made))


def test_the_best_way_saves_most_of_what_keeps_enough(found: Compressibility) -> None:
    for layer in found.layers:
        best = found.best(layer)
        if best is None:
            continue
        method, point = best
        assert kept_db(point.damage.value) >= 30
        for other in layer.curves:
            offer = found.offer(layer, other)
            assert offer is None or offer.bytes >= point.bytes
        failed = [one.bytes for one in layer.curves[method].points if one.damage.measured > found.allowed]
        assert all(point.bytes > size for size in failed)


def test_bytes_per_db_are_those_of_the_whole_model(found: Compressibility) -> None:
    layer = found.ranked[0]
    best = found.best(layer)
    assert best is not None
    total, before, after = found.baseline, layer.damage.value, best[1].damage.value
    lost = 10 * log10((total + max(0, after - before)) / total)
    assert found.worth(layer, best[1]) == pytest.approx((layer.bytes - best[1].bytes) / max(lost, 0.01))
    worths = [found.worth(one, point[1]) for one in found.ranked if (point := found.best(one)) is not None]
    assert worths == sorted(worths, reverse=True)


def test_all_layers_at_once_keep_about_what_was_planned(found: Compressibility) -> None:
    plans = [one for one in found.scores if one.trial.all_layers]
    assert len(plans) >= 3
    for one in plans:
        assert kept_db(one.damage) == pytest.approx(kept_db(one.trial.predicted), abs=4)
        assert one.trial.saved > 0
    assert "measured on 24 samples" in found.verdict


def test_the_most_promising_trials_come_first(found: Compressibility) -> None:
    single = [one for one in found.trials if not one.all_layers]
    worth = [found.bytes_per_db(one.saved, found.lost_db(one.predicted, one.base)) for one in single]
    assert worth == sorted(worth, reverse=True)
    assert all(one.saved > 0 for one in single)


def test_accuracy_comes_with_labels(found: Compressibility) -> None:
    assert found.accuracy[0] > 0.9
    assert all(0 <= one.accuracy <= 1 for one in found.scores)
    outputs = np.array([[1.0, 2], [3, 1], [0, 1]])
    batches = [Batch((outputs,), labels=np.array([1, 0, 0]), size=3)]
    assert accuracy(batches, [[outputs]]) == pytest.approx(2 / 3)
    for labels, out in ((None, outputs), (np.array([0.5, 1, 2]), outputs), (np.array([2, 0, 0]), outputs[:, :1])):
        assert isnan(accuracy([Batch((outputs,), labels=labels, size=3)], [[out]]))


# ---------------------------------------------------------------------------------------------- small models


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))


INPUTS = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)


def small(**options: Any) -> Compressibility:
    return qvis.compressibility(small_model(), INPUTS, **{"probes": 2, **options})


def test_measuring_can_be_stopped_and_goes_on_from_there() -> None:
    made = small()
    scores = made.measure()
    first = list(islice(scores, 3))
    assert made.state == "running"
    assert made.remaining_seconds >= 0
    scores.close()
    assert made.state == "interrupted"
    rest = list(made.measure())
    assert made.state == "complete"
    assert made.scores == first + rest
    assert [one.trial for one in made.scores] == list(made.trials)
    again = small()
    assert [one.damage for one in again.measure()] == [one.damage for one in made.scores]


def test_no_trial_begins_after_the_time_is_up() -> None:
    made = small()
    assert len(list(made.measure(seconds=1e-9))) <= 1
    assert made.state == "out of time"
    with pytest.raises(BadArgumentError, match=r"seconds: got 0, expected a number above 0"):
        made.measure(seconds=0)


def test_an_error_in_the_middle_leaves_what_was_measured() -> None:
    made = small()
    run, left = made.run, iter(range(3))

    def fail(trial: Any) -> tuple[float, float]:
        next(left)
        return run(trial)

    made.run = fail
    with pytest.raises((StopIteration, RuntimeError)):
        list(made.measure())
    assert made.state == "interrupted"
    assert len(made.scores) == 3


def test_the_model_is_not_changed() -> None:
    model = small_model()
    before = [one.detach().clone() for one in model.parameters()]
    list(qvis.compressibility(model, INPUTS, probes=1).measure())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_other_layers_count_as_rounded_when_some_are_selected() -> None:
    whole, part = small(), small(selected_layers="2")
    assert [layer.name for layer in part.layers] == ["2"]
    assert part.baseline == pytest.approx(whole.baseline)


def test_the_common_width_sets_sizes_and_widths() -> None:
    made = small(bits=4)
    layer = made.layers[0]
    assert layer.bytes == 24 * 16 // 2 + 2 * 24
    assert [point.setting for point in layer.curves["rounding"].points] == [2, 3, 4]
    assert set(layer.entropies) == {2, 3, 4}


def test_without_derivatives_only_what_is_measured_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    real = adapters.runner

    def blind(*arguments: Any) -> Any:
        made = real(*arguments)
        monkeypatch.setattr(made, "differentiable", False, raising=False)
        return made

    monkeypatch.setattr(adapters, "runner", blind)
    made = small()
    assert made.passes == 0
    assert made.evidence == "measured on 8 samples"
    assert all(isnan(point.damage.predicted) for one in made.layers for point in one.curves["weights"].points)
    assert made.best(made.layers[0]) is None
    assert "cannot be differentiated" in " ".join(made.notes)
    scores = list(made.measure())
    assert {one.trial.method for one in scores} >= {"coding", "weights", "channels"}
    assert all(one.damage > 0 for one in scores)
    json.loads(json.dumps(plain(made), allow_nan=False))


class Lookup(nn.Module):
    """A table of which one row is broken, but never looked up, and a layer of zeros."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.broken = nn.Embedding(40, 16), nn.Embedding(9, 16)
        self.head, self.nothing = nn.Linear(16, 5), nn.Linear(16, 5)
        with torch.no_grad():
            self.broken.weight[7] = float("nan")
            self.nothing.weight.zero_()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids) + self.broken(ids % 4)
        found: torch.Tensor = self.head(x) + self.nothing(x)
        return found


def test_broken_layers_are_named_and_tables_say_what_was_seen() -> None:
    made = qvis.compressibility(Lookup(), np.arange(12, dtype=np.int64).reshape(6, 2), probes=2)
    assert {one.name: one.reason for one in made.skipped} == {
        "broken": "some of its weights are NaN or infinite",
        "nothing": "all its weights are zero",
    }
    table = made.by_name["table"]
    assert table.notes[-1] == "12 of 40 rows were looked up"
    assert "entries" in table.refused["channels"]
    assert table.spectrum is not None
    list(made.measure())
    plain(made)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "bits: got 1, expected a whole number from 2 to 16"),
        ({"keep_db": float("nan")}, "keep_db: got nan, expected a finite number such as 30"),
        ({"samples": 0}, "samples: got 0, expected a whole number of 1 or more"),
        ({"probes": True}, "probes: got True"),
        ({"seed": -1}, "seed: got -1, expected a whole number of 0 or more"),
        ({"selected_layers": "none"}, "selected_layers: no layer matches 'none'"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(QvisError) as error:
        small(**options)
    assert message in str(error.value)


# ---------------------------------------------------------------------------------------------- what is written


def plain(made: Compressibility) -> Any:
    from qvis.report.compressibility import summarize
    from qvis.report.document import jsonable

    return jsonable(summarize(made))


def test_all_formats_are_written_and_tell_the_same(found: Compressibility, tmp_path: Path) -> None:
    written = found.write(tmp_path, ("html", "json", "md")).paths
    assert [path.name for path in written.values()] == [f"compressibility.{one}" for one in ("html", "json", "md")]
    document = json.loads(written["json"].read_text(), parse_constant=lambda text: pytest.fail(text))
    assert document["kind"] == "compressibility"
    assert "".join(text for text, _ in document["verdict"]["sentence"]) == found.verdict
    assert len(document["scores"]) == len(found.scores) - sum(one.trial.all_layers for one in found.scores)
    per_db = [one["bytes_per_db"] for one in document["scores"]]
    assert per_db == sorted(per_db, reverse=True)
    assert [one["name"] for one in sorted(document["layers"], key=lambda one: one["rank"])] == [
        one.name for one in found.ranked
    ]
    markdown = written["md"].read_text()
    assert markdown.startswith("<!-- qvis ")
    assert f"`{found.ranked[0].name}`" in markdown
    assert "<details><summary>8 more layers" in markdown
    assert found.write(tmp_path).paths == {"html": tmp_path / "compressibility.html"}  # its own page is replaced


def test_what_others_wrote_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "compressibility.html").write_text("mine")
    made = small()
    with pytest.raises(OutputError, match="was not written by qvis"):
        made.write(tmp_path)
    with pytest.raises(BadArgumentError, match=r"formats: got 'pdf', expected some of"):
        made.write(tmp_path, "pdf")


def test_words_tell_how_far_it_is() -> None:
    from qvis.report.compressibility import in_time, tell_state

    assert [in_time(seconds) for seconds in (0.2, 45, 180, 7500)] == ["0 s", "45 s", "3 min", "2 h 5 min"]
    made = small()
    assert "would keep" in made.verdict
    assert "not measured" in made.verdict
    assert tell_state(plain(made)) == f"Nothing is measured yet: {len(made.trials)} scores to go."
    scores = made.measure()
    next(scores)
    assert tell_state(plain(made)).startswith(f"1 of {len(made.trials)} scores measured; about ")
    scores.close()
    assert tell_state(plain(made)).startswith("Interrupted: 1 of ")


def test_where_nothing_can_be_saved_every_format_says_so(tmp_path: Path) -> None:
    made = small(keep_db=90)
    assert "less than the 90 dB that are to be left" in made.verdict
    assert all(made.best(layer) is None for layer in made.layers)
    written = made.write(tmp_path, ("html", "json", "md")).paths
    assert written["html"].read_text().count('<td class="way none">none<') == 3
    assert written["md"].read_text().count("| none |") == 3


def test_layers_that_are_too_small_for_a_product_of_two_are_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    made = qvis.compressibility(model, np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32), probes=2)
    assert "rank" not in made.by_name["2"].curves
    assert made.by_name["2"].refused["rank"] == "it is so small that even rank 1 takes no fewer bytes"
    assert "rank" in made.by_name["0"].curves
    list(made.measure())
    plain(made)
