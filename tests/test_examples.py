"""The examples of quantizing and benchmarking, run as their texts say."""

from __future__ import annotations

import runpy
import sys
import warnings
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


class Runner:
    """Runs examples in a folder, and tells what they print."""

    def __init__(self, patch: pytest.MonkeyPatch, captured: pytest.CaptureFixture[str]) -> None:
        self.patch, self.captured = patch, captured

    def __call__(self, name: str, *options: str) -> str:
        self.patch.setattr(sys, "argv", [name, *options])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras uses what NumPy deprecates
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return self.captured.readouterr().out


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return Runner(monkeypatch, capsys)


def test_a_pytorch_model_is_quantized_and_measured(run: Runner, tmp_path: Path) -> None:
    printed = run("post_training_quantization.py", "--frameworks", "torch", "--batch-sizes", "2")
    assert "post_training to int8.onnx" in printed
    assert (tmp_path / "quantized/torch/benchmark.html").stat().st_size > 10_000

    printed = run("quantize_model.py")
    assert printed.rstrip().endswith("digits.onnx")
    assert (tmp_path / "digits.onnx").exists()

    model = ("--baseline", "qvis.adapters.digits:load_digits_model", "--data", "quantized/torch/test.npz")
    printed = run("benchmark.py", "--model", "digits.onnx", *model, "--report", "review", "--calls", "5")
    assert (tmp_path / "review/benchmark.html").exists()
    assert "digits.onnx: " in printed
    assert "% right" in printed


def test_a_keras_model_is_quantized_and_measured(run: Runner, tmp_path: Path) -> None:
    printed = run("post_training_quantization.py", "--frameworks", "keras", "--keras-epochs", "8")
    assert "post_training to int8.tflite" in printed
    assert (tmp_path / "quantized/keras/benchmark.html").exists()

    given = ("--model", "quantized/keras/model.keras", "--calibration-data", "quantized/keras/train.npz")
    printed = run("quantize_model.py", *given, "--output", "model.tflite", "--method", "post_training")
    assert printed.rstrip().endswith("model.tflite")

    files = ("--model", "model.tflite", "--baseline", "quantized/keras/model.keras")
    printed = run("benchmark.py", *files, "--data", "quantized/keras/test.npz", "--report", "review", "--calls", "5")
    assert "model.tflite: " in printed


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_training_at_2_bits_gains(framework: str, run: Runner, tmp_path: Path) -> None:
    options = ("--frameworks", framework, "--epochs", "1", "--keras-epochs", "8", "--bits", "2")
    printed = run("quantization_aware_training.py", *options)
    (gain,) = (line for line in printed.splitlines() if "bits training gains" in line)
    assert gain.split()[1] == "2"
    assert "nothing" not in gain
    assert (tmp_path / f"trained/{framework}/benchmark.html").exists()


def test_what_an_example_needs_is_said_by_its_help(run: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (
        "post_training_quantization.py",
        "quantization_aware_training.py",
        "quantize_model.py",
        "benchmark.py",
    ):
        with pytest.raises(SystemExit) as stopped:
            run(name, "--help")
        assert stopped.value.code == 0
        assert f"python examples/{name}" in capsys.readouterr().out
