"""``qvis quantize``."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from qvis.cli import main
from qvis.cli.progress import Work
from qvis.quantization import quantize as module
from qvis.quantization.contents import Arithmetic, Contents, Operation
from qvis.quantization.methods import CELLS, Epoch, Job, TrainingStep
from tests.nets import fill

CONTENTS = Contents(
    (
        Operation("a", "linear", Arithmetic.INTEGER, "0"),
        Operation("b", "layer_norm", Arithmetic.FLOAT),
    ),
    {"int8": 30, "float32": 10},
    50,
    ("about the file",),
)


class Fake:
    """A backend that trains for one epoch, and remembers its job."""

    job: Job

    @staticmethod
    def check(job: Job) -> None:
        Fake.job = job

    @staticmethod
    def convert(job: Job, target: Path) -> tuple[Epoch, ...]:
        target.write_bytes(b"quantized")
        job.notes.append("about\nthe work")
        if job.training is None:
            return ()
        job.training.watch(TrainingStep(1, 1, 2, 2, 0.5, 0.75))
        return (Epoch(0, 1.5, 0.25), Epoch(1, 0.5, 0.75))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for cell in CELLS:
        monkeypatch.setitem(sys.modules, f"qvis.quantization.backends.{cell.backend}", Fake)  # type: ignore[arg-type]
    monkeypatch.setattr(module, "inspect", lambda _: CONTENTS)
    return fill(tmp_path)


def run(*arguments: str) -> int:
    return main(["quantize", "--model", "net.py:make", *arguments])


def test_what_is_in_the_file_is_printed_and_how_to_measure_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--output", "q.pt2", "--calibration-data", "val.npz", "--bits", "4", "--exclude", "2") == 0
    output = capsys.readouterr()
    assert output.out.splitlines() == [
        "40 bytes of numbers, 0.90 % of the float model; 75 % of the bytes are integers, and 1 of 2 operations compute "
        "with integers. With floats: b.",
        "  layer_norm in float: b",
        "about\\nthe work",
        "about the file",
        "",
        "q.pt2",
    ]
    assert output.err == "Measure it: qvis benchmark --model q.pt2 --baseline net.py:make --data val.npz\n"
    assert Fake.job.bits == {"0": 4, "2": 32, "4": 4}
    assert Path("q.pt2").read_bytes() == b"quantized"


def test_training_is_told_epoch_by_epoch_also_into_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--method", "quantization_aware", "--train-data", "val.npz", "--epochs", "1", "--per-tensor"]
    assert run("--output", "q.pt2", *options) == 0
    output = capsys.readouterr()
    assert "Epoch 1 of 1: loss 0.5000, 75.0 % right\n" in output.err
    assert "1 epoch: loss from 1.5000 to 0.5000, right answers from 25.0 to 75.0 %, on the training data." in output.out
    assert Fake.job.granularity == "tensor"
    assert Fake.job.training is not None
    assert Fake.job.training.epochs == 1


def test_json_alone_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--output", "q.safetensors", "--method", "weight_only", "--json", "--name", "Mine") == 0
    output = capsys.readouterr()
    document = json.loads(output.out)
    assert (document["model"]["name"], document["method"], document["bytes_by_type"]["int8"]) == (
        "Mine",
        "weight_only",
        30,
    )
    assert output.err == "wrote q.safetensors\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "q.pt2"], "calibration_data: post_training finds the ranges"),
        (["--output", "q.tflite", "--calibration-data", "val.npz"], "output: a PyTorch model is quantized to"),
        (["--output", "q.pt2", "--bits", "four"], "--bits: got 'four', expected a width such as 4, or a file"),
        (
            ["--output", "no/q.pt2", "--method", "weight_only"],
            "output: 'no/q.pt2' lies in a folder that does not exist",
        ),
    ],
)
def test_bad_input_gives_one_line_and_no_file(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.iterdir())
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert {path.name for path in folder.iterdir()} - {path.name for path in before} <= {"__pycache__"}


def test_the_bar_tells_the_loss_and_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("qvis.cli.progress.AFTER_SECONDS", 0.0)
    with Work() as work:
        for step in range(1, 4):
            work.train(TrainingStep(1, 2, step, 3, 2.0 / step, step / 4))
        assert work._bar is not None
        assert work._bar.tasks[0].completed == 3
        assert work._bar.tasks[0].total == 6
    assert "Epoch 1 of 2: loss 0.6667, 75.0 % right" in terminal.getvalue()
