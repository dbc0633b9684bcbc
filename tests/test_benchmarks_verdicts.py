"""The benchmark of the predictions, on the model that comes with qvis and few samples."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
PRINTED = ("digits: 18 layers, 2 samples", "qvis without data", "relative range", "weight SQNR", "total measured dB")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the benchmark prints, and the folder that it writes to."""
    folder = tmp_path_factory.mktemp("verdicts")
    arguments = ["--models", "digits", "resnet56", "--samples", "2", "--probes", "2", "--draws", "1"]
    arguments += ["--json", "figures.json", "--out", "tables.txt"]
    command = [sys.executable, str(BENCHMARKS / "verdicts.py"), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout, folder


@pytest.mark.parametrize("text", PRINTED)
def test_the_tables_are_printed_and_written(run: tuple[str, Path], text: str) -> None:
    printed, folder = run
    assert text in printed
    assert text in (folder / "tables.txt").read_text()


def test_a_model_whose_weights_are_missing_is_left_out_by_name(run: tuple[str, Path]) -> None:
    assert "resnet56: left out, needs --data" in run[0]


def test_the_figures_of_every_layer_are_written(run: tuple[str, Path]) -> None:
    (found,) = json.loads((run[1] / "figures.json").read_text())
    assert found["layers"] == len(found["figures"]["tensor 8"]) == 18
    assert all(measured > 0 for _, measured in found["figures"]["tensor 8"].values())
    assert found["ranking"]["qvis"]["tensor 8"] > 0.4
