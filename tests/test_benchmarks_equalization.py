"""The benchmark of equalization, on the model that comes with qvis and few samples, and the rounding it judges by."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
ROWS = ("folded, per channel", "qvis, square root", "qvis, without data", "qvis, with data")
PRINTED = ("digits: 8 samples", "SQNR of the outputs, dB", "qvis, with data: function kept", *ROWS)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the benchmark prints, and the folder that it writes to."""
    folder = tmp_path_factory.mktemp("equalization")
    arguments = ["--models", "digits", "resnet56", "--samples", "4", "--held-out", "8", "--draws", "2", "--no-aimet"]
    arguments += ["--bits", "8", "--json", "figures.json", "--out", "tables.txt"]
    command = [sys.executable, str(BENCHMARKS / "equalization.py"), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout, folder


@pytest.mark.parametrize("text", PRINTED)
def test_the_tables_are_printed_and_written(run: tuple[str, Path], text: str) -> None:
    printed, folder = run
    assert text in printed
    assert text in (folder / "tables.txt").read_text()


def test_a_model_whose_weights_are_missing_is_left_out_by_name(run: tuple[str, Path]) -> None:
    assert "resnet56: left out, needs --data" in run[0]


def test_bars_against_what_was_not_measured_are_open(run: tuple[str, Path]) -> None:
    lines = [line for line in run[0].splitlines() if "not below AIMET" in line]
    assert len(lines) == 2
    assert all("open" in line for line in lines)


def test_the_figures_of_every_draw_are_written(run: tuple[str, Path]) -> None:
    (found,) = json.loads((run[1] / "figures.json").read_text())["models"]
    assert set(ROWS) < set(found["rows"])
    for name in ROWS:
        row = found["rows"][name]
        assert len(row["sqnr"]["w8"]) == 2
        assert np.shape(row["right"]["w8a8"]) == (2, 8)
        assert 0 < row["changed"] < 1e-5
    by_tensor, equalized = (found["rows"][name]["sqnr"]["w8"] for name in ("folded", "qvis, with data"))
    assert min(equalized) > max(by_tensor) + 10


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module with the benchmark's own rounding."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import rounding

    return rounding


def small() -> Any:
    """A network of a convolution and a Linear layer."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(2, 3, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(12, 4)]
    return torch.nn.Sequential(*layers).eval()


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_weights_are_rounded_to_a_symmetric_grid(rounding: Any, granularity: str) -> None:
    weight = small()[3].weight.detach().numpy()
    for row, new in zip(weight, rounding.rounded(weight, (0,), rounding.Setting(4, granularity), 1.05), strict=True):
        largest = abs(row if granularity == "channel" else weight).max()
        step = 1.05 * largest / 7
        expected = [step * round(float(one) / step) for one in row]
        np.testing.assert_allclose(new, expected, rtol=1e-6)


def test_a_model_is_itself_again_after_its_draws(rounding: Any) -> None:
    model = rounding.wrap(small())
    inputs = np.random.default_rng(0).normal(size=(5, 2, 4, 4)).astype(np.float32)
    exact = rounding.run_all(model, inputs)
    outputs = rounding.draw_all(model, rounding.Setting(3), [{"0": 1.0, "3": 1.0}, {"0": 1.05, "3": 1.0}], inputs)
    assert outputs.shape == (2, 5, 4)
    assert abs(outputs[0] - outputs[1]).max() > 1e-3
    np.testing.assert_array_equal(rounding.run_all(model, inputs), exact)


def test_what_enters_layers_is_rounded_to_8_bits(rounding: Any) -> None:
    model = rounding.wrap(torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False)))
    torch.nn.init.eye_(model.model[0].weight)
    inputs = np.array([[-1.0, 0.3, 1.55]], np.float32)
    ranges = model.ranges(inputs)
    with model.rounding_inputs(ranges):
        np.testing.assert_allclose(model.run(inputs), [[-1.0, 0.3, 1.55]], atol=1e-6)  # a step of 0.01
        np.testing.assert_allclose(model.run(inputs + np.float32(0.004)), [[-1.0, 0.3, 1.55]], atol=1e-6)
    np.testing.assert_allclose(model.run(inputs), inputs)
