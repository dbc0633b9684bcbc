"""Grids compared: every figure against a loop, the answers by hand, and what is refused."""

from __future__ import annotations

import json
from math import inf, isinf, isnan, log10, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qvis
from qvis.analysis import trying
from qvis.analysis.frontier import Curve, Point, beaten_by, best_first, tell_sides, weigh
from qvis.analysis.schemes import checked_schemes, default_schemes, label_schemes
from qvis.cli import main
from qvis.quantization.grids import KINDS, Scheme
from qvis.report.grids import GridReport

SOME = (
    Scheme(bits=8, granularity="tensor"),
    Scheme(bits=4),
    Scheme(bits=4, symmetric=False),
    Scheme(bits=4, granularity=32),
    Scheme(bits=3, range="mse"),
    Scheme("kmeans", 2, "tensor"),
    Scheme("quantile", 4),
    Scheme("float4_e2m1", 4),
    Scheme("power_of_two", 6),
)


def compared(weights: Any, folder: Path, **options: Any) -> GridReport:
    """A report without its page, which takes longer to write than to find."""
    return qvis.compare_grids(weights, folder, **{"schemes": SOME, "formats": ("json",), **options})


def drawn(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Weights whose channels differ in size."""
    generator = np.random.default_rng(seed)
    sizes = generator.lognormal(0, 0.5, (shape[0], *[1] * (len(shape) - 1)))
    return (generator.standard_normal(shape) * sizes).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def test_noise_and_size_are_those_of_a_loop_over_the_rounded_weights(tmp_path: Path) -> None:
    weight = drawn(6, 40)
    layer = compared(weight, tmp_path).layers[0]
    for result in layer.results:
        fitted = result.scheme.fit(weight)
        signal = noise = 0.0
        for row, rounded in zip(weight.tolist(), fitted.rounded().tolist(), strict=True):
            for a, b in zip(row, rounded, strict=True):
                signal += a**2
                noise += (a - b) ** 2
        assert result.sqnr_db == pytest.approx(10 * log10(signal / noise), rel=1e-5)
        assert result.bytes == fitted.bytes
        assert result.bits_per_weight == pytest.approx(8 * fitted.bytes / 240)


def test_totals_add_up_sizes_and_take_the_mean_noise_of_the_layers(tmp_path: Path) -> None:
    found = compared({"a": drawn(4, 30), "b": drawn(8, 3, 3, 3, seed=1)}, tmp_path).comparison
    for place, total in enumerate(found.totals):
        results = [layer.results[place] for layer in found.layers]
        assert total.bytes == sum(one.bytes for one in results)
        assert total.noise == pytest.approx(sum(one.noise for one in results) / 2)
        assert isnan(total.damage.value)


def test_large_layers_are_tried_on_channels_that_stand_for_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weight = drawn(400, 24)
    exact = compared(weight, tmp_path).layers[0]
    monkeypatch.setattr(trying, "TRIED", 3000)
    found = compared(weight, tmp_path)
    layer = found.layers[0]
    assert (exact.rows, layer.rows) == (400, 125)
    assert "1 layer of more than 3,000 weights tried on some of the channels" in " ".join(found.comparison.notes)
    for one, whole in zip(layer.results, exact.results, strict=True):
        assert one.bytes == whole.bytes
        assert one.sqnr_db == pytest.approx(whole.sqnr_db, abs=0.6)
    # the grid of the tensor is the one of all channels
    assert layer.shown[0].scales[0] == SOME[0].fit(weight).scale[0, 0]


def test_channels_are_chosen_by_their_largest_weight() -> None:
    weight = np.arange(1, 101, dtype=np.float32)[:, None] * np.ones((1, 4), np.float32)
    weight[7] = np.nan  # counts as the smallest
    rows = trying.spread_rows(weight, 40)
    assert rows.tolist() == [4, 15, 25, 35, 45, 55, 65, 75, 85, 95]
    assert trying.spread_rows(weight, 4000).tolist() == [*range(100)]


def test_groups_longer_than_a_channel_are_the_same_as_a_grid_per_channel(tmp_path: Path) -> None:
    found = compared(
        {"short": drawn(5, 9), "long": drawn(5, 64)}, tmp_path, schemes=(Scheme(bits=4), Scheme(bits=4, granularity=32))
    )
    short, long = found.layers
    assert (short.same_as, long.same_as, found.comparison.same_as) == ((0, 0), (0, 1), [0, 1])
    assert short.results[0].bytes == short.results[1].bytes == Scheme(bits=4, granularity=32).fit(drawn(5, 9)).bytes
    assert short.results[0].noise == short.results[1].noise


def test_what_is_shown_of_a_channel_are_its_weights_and_its_grids(tmp_path: Path) -> None:
    weight = drawn(5, 40)
    layer = compared(weight, tmp_path).layers[0]
    whole, *channels = layer.shown
    assert whole.channel is None
    assert whole.counts.sum() == 200
    assert [one.channel for one in channels] == np.abs(weight).max(axis=1).argsort().tolist()
    for one in channels:
        row = weight[one.channel]
        assert (one.low, one.high) == (pytest.approx(row.min()), pytest.approx(row.max()))
        assert one.counts.tolist() == np.histogram(row.astype(float), len(one.counts))[0].tolist()
        for place, scheme in enumerate(SOME):
            fitted = scheme.fit(weight)
            group = int(np.abs(row).argmax()) // 32 if scheme.granularity == 32 else 0
            at = (0, 0) if scheme.granularity == "tensor" else (one.channel, group)
            assert one.scales[place] == fitted.scale[at]
            assert one.zeros[place] == fitted.zero_point[at]
            if scheme.kind == "kmeans":
                assert one.codebooks[place].tolist() == fitted.levels(0).tolist()
    assert [isnan(scale) for scale in whole.scales] == [scheme.granularity != "tensor" for scheme in SOME]


def test_damage_is_what_running_the_model_on_rounded_weights_does(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 10)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = np.random.default_rng(0).standard_normal((64, 20)).astype(np.float32)
    schemes = (Scheme(bits=8), Scheme(bits=6, granularity="tensor"), Scheme("kmeans", 4, "tensor"))
    found = compared(model, tmp_path, schemes=schemes, inputs=inputs, keep_db=40.0).comparison
    assert found.evidence == "predicted from 64 samples"
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    exact = model(torch.tensor(inputs)).detach()
    for total in found.totals:
        with torch.no_grad():
            for layer in (model[0], model[2]):
                layer.weight.copy_(torch.tensor(total.scheme.fit(layer.weight.numpy()).rounded()))
            moved = model(torch.tensor(inputs)) - exact
        model.load_state_dict(before)
        measured = float(moved.square().sum() / exact.square().sum())
        assert total.damage.measured == pytest.approx(measured, rel=1e-4)
        assert total.damage.confidence == "measured"
        assert 0.5 < total.damage.predicted / measured < 2
    for layer in found.layers:
        assert layer.judged_by == "damage"
        assert [one.damage.confidence for one in layer.results] == ["high"] * 3


def test_a_model_without_derivatives_is_measured_as_a_whole(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from qvis.analysis.gridding import find_grids
    from qvis.analysis.preparing import open_model
    from qvis.running import silently

    torch.manual_seed(0)
    opened = open_model(torch.nn.Linear(8, 4), np.ones((4, 8), np.float32), None, samples=4)
    opened.runner.differentiable = False
    found = find_grids(opened.ready, SOME[:2], opened=opened, progress=iter, track=silently)
    assert [one.damage.confidence for one in found.totals] == ["measured"] * 2
    assert found.layers[0].why_no_damage == "the model cannot be differentiated"
    assert found.evidence == "measured on 4 samples"
    GridReport(found).write(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Choosing


def test_a_grid_is_beaten_by_one_that_is_no_larger_and_no_worse() -> None:
    generator = np.random.default_rng(0)
    points = [Point(float(b), float(e)) for b, e in generator.integers(0, 12, (60, 2))]
    for i, (point, by) in enumerate(zip(points, beaten_by(points), strict=True)):
        better = [
            other for other in points if other.bits <= point.bits and other.error <= point.error and other != point
        ]
        assert (by < 0) == (not better), i
        if better:
            assert points[by].error == min(other.error for other in better)


def test_nothing_unknown_beats_or_is_beaten() -> None:
    assert beaten_by([Point(4, nan), Point(4, 0.1), Point(5, nan)]).tolist() == [-1, -1, -1]


def test_best_is_the_smallest_that_keeps_enough_then_what_keeps_most() -> None:
    points = [Point(8, 1e-5), Point(4, 2e-3), Point(5, 9e-4), Point(3, nan), Point(5, 1e-4), Point(2, 1e-1)]
    assert best_first(points, 30) == [4, 2, 0, 1, 5, 3]
    assert best_first(points, 60) == [0, 4, 2, 1, 5, 3]


def test_a_curve_joins_the_best_grids_by_straight_lines() -> None:
    curve = Curve([Point(8, 1e-5), Point(4, 1e-2), Point(6, 1e-1), Point(6, nan)])
    assert (curve.at(6), curve.at(4), curve.at(9)) == pytest.approx((35, 20, 50))
    assert isnan(curve.at(3))
    assert (curve.needed(35), curve.needed(5)) == pytest.approx((6, 4))
    assert isinf(curve.needed(51))


def test_a_curve_passes_over_grids_below_it() -> None:
    curve = Curve([Point(4, 1e-2), Point(5, 8e-3), Point(6, 2e-5), Point(6.5, 1.9e-5), Point(7, 1e-5)])
    assert (curve.bits, curve.kept) == ([4, 6, 7], pytest.approx([20, 46.99, 50], abs=0.01))
    # so that more grids never make a kind worse
    generator = np.random.default_rng(0)
    points = [Point(float(b), float(10**-k)) for b, k in zip(*generator.uniform(1, 6, (2, 40)), strict=True)]
    for count in range(2, 40):
        fewer, more = Curve(points[:count]), Curve(points[: count + 1])
        for kept in (12, 20, 30, 45):
            assert more.needed(kept) <= fewer.needed(kept) + 1e-9


def test_no_line_leads_to_a_grid_without_any_error() -> None:
    curve = Curve([Point(4, 1e-2), Point(6, 0.0), Point(8, 0.0)])
    assert (curve.at(5.9), curve.at(6)) == (pytest.approx(20), inf)
    assert (curve.needed(20), curve.needed(20.1), curve.most) == (pytest.approx(4), 6, inf)


def test_sides_are_told_with_their_numbers() -> None:
    families = {
        "per channel": [Point(4, 1e-2), Point(6, 1e-3)],
        "in groups of 32": [Point(4.5, 1e-3)],
        "per tensor": [Point(8, 2e-3)],
    }
    answer = tell_sides("Per what?", *weigh(families, 30), "per channel")
    assert str(answer) == (
        "Per what? In groups of 32: 30.0 dB take 4.50 bits a weight in groups of 32, 6.00 per channel (33 % more, or"
        " 22.5 dB with as many), and per tensor 27.0 dB are the most."
    )
    near = tell_sides("Per what?", *weigh({**families, "per channel": [Point(4.6, 1e-3)]}, 30), "per channel")
    assert near.short == "per channel will do"
    # where nothing keeps as much, sides are compared at the most that there is
    options, at = weigh(families, 50)
    assert (options[0].label, at) == ("in groups of 32", pytest.approx(30))


def test_the_three_answers_follow_from_the_results(tmp_path: Path) -> None:
    layer = compared(drawn(32, 64), tmp_path, schemes=None, keep_db=25).layers[0]
    uniform, shared, bits = layer.answers
    assert layer.best is not None
    assert layer.best.bytes == min(one.bytes for one in layer.results if one.kept_db >= 25)
    assert bits.short == f"{layer.best.scheme.bits} bits"
    assert f"the smallest that keeps 25 dB is {layer.best.scheme}" in bits.text
    assert {option.label for option in shared.options} == {"per tensor", "per channel", "in groups of 32"}
    assert "with uniform grids" in {option.label for option in uniform.options}
    assert shared.options[0].bits == min(option.bits for option in shared.options)


def test_codebooks_that_win_are_said_to_be_looked_up(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).laplace(size=(4, 4000))
    schemes = (
        Scheme(bits=4, granularity="tensor"),
        Scheme("kmeans", 4, "tensor"),
        Scheme(bits=6, granularity="tensor"),
    )
    report = compared(weight, tmp_path, schemes=schemes, keep_db=18)
    assert report.comparison.answers[0].short == "k-means codebooks"
    assert report.comparison.answers[0].text.endswith("are looked up: that saves memory, not arithmetic.")
    assert report.verdict.startswith("4-bit kmeans, per tensor is the smallest grid that keeps 18 dB")
    kept = report.comparison.totals[2].sqnr_db
    assert report.document["verdict"]["details"][0] == (
        "Of the grids whose codes integer engines multiply as they are, the first is 6-bit uniform, per tensor:"
        f" 6.00 bits a weight, {kept:.1f} dB."
    )


def test_beaten_grids_name_what_beats_them(tmp_path: Path) -> None:
    layer = compared(drawn(8, 32), tmp_path, schemes=(Scheme(bits=4), Scheme(bits=4, range="mse"))).layers[0]
    by = layer.beaten_by(Scheme(bits=4))
    assert by is not None
    assert by.scheme == Scheme(bits=4, range="mse")
    assert layer.frontier == [by]
    assert layer.beaten_by(by.scheme) is None


def test_the_default_schemes_differ_and_have_names_that_do() -> None:
    schemes = default_schemes()
    assert len(set(label_schemes(schemes))) == len(set(schemes)) == len(schemes)
    assert {one.kind for one in schemes} == {*KINDS} - {"offset"}
    assert {one.bits for one in default_schemes([5, 4, 5])} == {5, 4}


def test_schemes_with_the_same_words_are_told_apart_by_what_differs() -> None:
    schemes = (Scheme(range="percentile"), Scheme(range="percentile", percentile=99.0), Scheme(bits=4))
    assert label_schemes(checked_schemes([*schemes, schemes[0]])) == [
        "8-bit uniform, per channel, percentile, percentile 99.9",
        "8-bit uniform, per channel, percentile, percentile 99.0",
        "4-bit uniform, per channel",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Odd weights, and what is refused


def test_layers_without_anything_to_round_are_answered_as_such(tmp_path: Path) -> None:
    holes = drawn(4, 10)
    holes[1, 2], holes[3] = np.inf, np.nan
    weights = {
        "zero": np.zeros((3, 4)),
        "constant": np.full((4, 5), 2.5, np.float32),
        "nothing": np.full((2, 2), np.nan),
        "holes": holes,
        "vector": np.linspace(-1, 1, 7),
        "whole": np.arange(-6, 6).reshape(3, 4),
        "empty": np.zeros((0, 3)),
    }
    found = compared(weights, tmp_path)
    layers = found.comparison.by_name
    assert [str(layers["zero"].answers[0]), str(layers["nothing"].answers[2])] == [
        "Uniform or not? Any: all its weights are zero, which any grid holds.",
        "How many bits? Any: there are no numbers in it.",
    ]
    assert layers["zero"].best is None
    assert layers["zero"].frontier == []
    assert layers["constant"].result(SOME[0]).noise < 1e-10
    assert (layers["holes"].nonfinite, layers["nothing"].nonfinite) == (11, 4)
    finite = np.isfinite(holes)
    noise = np.square(SOME[1].fit(holes).rounded()[finite] - holes[finite]).sum()
    assert layers["holes"].result(SOME[1]).noise == pytest.approx(noise / np.square(holes[finite]).sum(), rel=1e-5)
    assert (layers["vector"].channels, layers["vector"].elements) == (1, 7)
    assert layers["whole"].result(SOME[0]).noise == pytest.approx(0, abs=1e-4)
    assert [one.name for one in found.comparison.skipped] == ["empty"]
    assert json.loads(found.to_json())["layers"][0]["best"] is None
    assert "there is nothing to round" in compared(np.zeros((2, 2)), tmp_path).verdict.lower()


def test_channels_of_arrays_lie_along_the_axis_that_is_named(tmp_path: Path) -> None:
    weight = drawn(3, 5, 4)
    layer = compared(weight, tmp_path, channel_axis=-1).layers[0]
    turned = np.moveaxis(weight, -1, 0).reshape(4, 15)
    assert (layer.channels, layer.elements, layer.shape) == (4, 15, (3, 5, 4))
    assert layer.shown[-1].scales[1] == SOME[1].fit(turned).scale.max()


@pytest.mark.parametrize(
    ("weights", "options", "error", "message"),
    [
        ({}, {}, qvis.UnsupportedModelError, "model: got an empty mapping, expected arrays of weights by name"),
        ({"a": [1, 2]}, {}, qvis.UnsupportedModelError, "model: 'a' is an object of type list, expected an array"),
        (np.array([["a"]]), {}, qvis.UnsupportedModelError, "model: 'weights' is an array of type <U1, expected"),
        (np.ones((2, 2), complex), {}, qvis.UnsupportedModelError, "is an array of type complex128, expected"),
        (np.array(3.0), {}, qvis.UnsupportedModelError, "model: 'weights' is an array without axes, expected"),
        (np.zeros((0, 2)), {}, qvis.UnsupportedModelError, "model: no array has a number in it, such as 'weights'"),
        (3, {}, qvis.UnsupportedModelError, "model: cannot read an object of type int"),
        (np.ones((2, 2)), {"schemes": ["int4"]}, qvis.BadArgumentError, "schemes: got 'int4', expected qvis"),
        (np.ones((2, 2)), {"schemes": []}, qvis.BadArgumentError, "schemes: got none, expected at least one"),
        (np.ones((2, 2)), {"keep_db": 0}, qvis.BadArgumentError, "keep_db: got 0, expected a number of dB above 0"),
        (np.ones((2, 2)), {"samples": 0}, qvis.BadArgumentError, "samples: got 0, expected a whole number of 1"),
        (np.ones((2, 2)), {"inputs": np.ones(2)}, qvis.BadArgumentError, "inputs: arrays of weights cannot be run"),
        (np.ones((2, 2)), {"channel_axis": 2}, qvis.BadArgumentError, "channel_axis: 'weights' has 2 axes"),
        (np.ones((2, 2)), {"selected_layers": "x"}, qvis.UnknownLayerError, "'x'"),
        (np.ones((2, 2)), {"formats": "pdf"}, qvis.BadArgumentError, "formats: got 'pdf'"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(
    weights: Any, options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error) as raised:
        compared(weights, tmp_path / "out", **options)
    assert message in str(raised.value)
    assert not (tmp_path / "out").exists() or not [*(tmp_path / "out").iterdir()]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(qvis.OutputError, match="is a file or lies below one"):
        compared(np.ones((2, 2)), tmp_path / "file" / "out")
    (tmp_path / "grids.json").write_text("{}")
    with pytest.raises(qvis.OutputError, match="was not written by qvis"):
        compared(np.ones((2, 2)), tmp_path)


def test_a_model_whose_weights_are_broken_cannot_be_run(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(4, 3)
    with torch.no_grad():
        model.weight[0, 0] = nan
    with pytest.raises(
        qvis.BadArgumentError, match="are NaN or infinite, and so it returns no numbers; mend them, or judge"
    ):
        compared(model, tmp_path, inputs=np.ones((2, 4), np.float32))
    assert compared(model, tmp_path).layers[0].nonfinite == 1


# ---------------------------------------------------------------------------------------------------------------------
# The forms of the report


def test_the_document_says_what_the_records_say(tmp_path: Path) -> None:
    report = compared({"a": drawn(6, 40), "b": drawn(4, 9)}, tmp_path, formats=("json", "md"))
    document = json.loads((tmp_path / "grids.json").read_text())
    found = report.comparison
    assert (document["kind"], document["judged_by"], document["keep_db"]) == ("grids", "sqnr", 30)
    assert [one["label"] for one in document["schemes"]] == found.labels
    assert [one["bytes"] for one in document["schemes"]] == [one.bytes for one in found.totals]
    ranked = sorted(document["schemes"], key=lambda one: one["rank"])
    assert [one["label"] for one in ranked] == [found.labels[found.schemes.index(one.scheme)] for one in found.ranked]
    for part, layer in zip(document["layers"], found.layers, strict=True):
        assert part["best"] == (None if layer.best is None else found.labels[found.schemes.index(layer.best.scheme)])
        assert part["grids"]["bytes"] == [one.bytes for one in layer.results]
        assert part["grids"]["sqnr_db"] == pytest.approx([one.sqnr_db for one in layer.results], rel=1e-3)
        assert part["grids"]["damage"] == [None] * len(SOME)
        assert part["grids"]["beaten_by"] == [None if by < 0 else by for by in layer.beaten]
        assert [answer["question"] for answer in part["answers"]] == [one.question for one in layer.answers]
    text = (tmp_path / "grids.md").read_text()
    assert "**Uniform or not?**" in text
    assert "| 4-bit uniform, per channel |" in text
    assert report.to_json() == compared({"a": drawn(6, 40), "b": drawn(4, 9)}, tmp_path).to_json()


def test_the_command_prints_the_answers_and_the_best_grids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "net.npz", **{"fc.weight": drawn(8, 64), "other.weight": drawn(4, 5)})
    out = ["-o", str(tmp_path / "out"), "--format", "json", "--format", "html"]
    assert main(["grids", str(tmp_path / "net.npz"), "--bits", "4", "--layers", "fc*", "--keep-db", "18", *out]) == 0
    printed = capsys.readouterr().out
    for text in ("Uniform or not? ", "How many bits? 4 bits: ", "4-bit uniform, groups of 32"):
        assert text in printed
    assert "other" not in printed
    assert printed.endswith(f"\n{tmp_path / 'out' / 'grids.json'}\n{tmp_path / 'out' / 'grids.html'}\n")
    assert main(["grids", str(tmp_path / "net.npz"), "--bits", "2", "--json", "-o", str(tmp_path / "out")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {one["bits"] for one in document["schemes"]} == {2}
    assert main(["grids", str(tmp_path / "missing.npz"), *out]) == 2
    assert main(["grids", str(tmp_path / "net.npz"), "--data", "x.npz", *out]) == 2
