"""``qvis sensitivity``, and data given to the other commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qvis.cli import main
from tests.nets import fill

CODE = """
import torch
from torch import nn

def make(factor=1.0):
    print("making")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        model[2].weight[0] *= factor
    return model

def problem():
    return make(300.0)

def data():
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return fill(tmp_path, CODE)


def test_the_layers_are_printed_and_nothing_is_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sensitivity", "net.py:make", "--data", "val.npz"]) == 0
    output = capsys.readouterr()
    assert output.err == "making\n"  # what the model's own code prints is no result
    lines = output.out.splitlines()
    assert lines[0] == "Sequential: sensitivity"
    assert lines[1].startswith("Predicted from 8 samples: int8 with one grid per tensor suits all 3 layers")
    assert all(len(line) <= 80 for line in lines)
    (heading,) = (i for i, line in enumerate(lines) if line.startswith("Severity"))
    assert sorted(line.split()[2] for line in lines[heading + 1 :]) == ["0", "2", "4"]
    assert lines[-1]  # no empty line at the end
    assert {path.name for path in folder.iterdir()} <= {"net.py", "val.npz", "__pycache__"}


def test_a_report_is_written_where_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sensitivity", "net.py:make", "--data", "val.npz", "--report", "out", "--format", "md"]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(Path("out/sensitivity.md"))
    assert Path("out/sensitivity.md").read_text().count("Predicted from 8 samples") >= 1


def test_json_alone_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sensitivity", "net.py:make", "--data", "val.npz", "--json", "--measure", "top", "--bits", "4"]
    assert main(command) == 0
    output = capsys.readouterr()
    document = json.loads(output.out)
    assert (document["kind"], document["bits"]) == ("sensitivity", 4)
    assert document["sensitivity"]["bits"] == [4, 8, 6, 3, 2]
    for layer in document["layers"]:
        assert set(layer["sensitivity"]["weights"]["tensor"]["confidence"]) == {"measured"}
    assert main([*command, "--report", "out", "--format", "json"]) == 0
    output = capsys.readouterr()
    assert output.err.endswith(f"wrote {Path('out/sensitivity.json')}\n")
    assert json.loads(output.out) == json.loads(Path("out/sensitivity.json").read_text())


def test_inputs_may_be_made_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sensitivity", "net.py:make", "--example-inputs", "1x16", "--samples", "8"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Predicted from made-up inputs: int8" in text
    assert "measured on made-up inputs" in text
    assert "No data: the inputs are made up" in text


def test_a_loss_on_the_labels_of_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sensitivity", "net.py:make", "--data", "val.npz", "--loss", "cross_entropy"]) == 0
    assert "changes the loss by" in " ".join(capsys.readouterr().out.split())


def test_data_may_come_from_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sensitivity", "net.py:make", "--data", "net.py:data"]) == 0
    assert "Predicted from 8 samples" in capsys.readouterr().out


def test_layers_are_left_to_tools_in_float(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sensitivity", "net.py:problem", "--data", "val.npz", "--problem-db", "29", "--exclude-for", "torchao"]
    assert main([*command, "--bits", "4"]) == 0
    assert "in float, for torchao" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data: needed to run the model; without data, --example-inputs 1x3x224x224 has inputs made up"),
        (["--data", "none.npz"], "inputs: there is no file 'none.npz'"),
        (["--data", "val.npz", "--open"], "--open: needs the page, expected '--report DIR' as well"),
        (["--data", "val.npz", "--loss", "l1"], "loss: got 'l1', expected one of 'cross_entropy', 'mse'"),
        (["--data", "val.npz", "--measure", "some"], "Invalid value for '--measure'"),
        (["--data", "val.npz", "--bits", "1"], "Invalid value for '--bits'"),
        (["--data", "val.npz", "--samples", "0"], "Invalid value for '--samples'"),
        (["--data", "val.npz", "--layers", "nome"], "selected_layers: no layer matches 'nome'"),
        (["--data", "val.npz", "--watch-db", "10"], "--problem-db: got 20, expected at most --watch-db (10)"),
        (["--data", "net.py:data", "--loss", "mse"], "loss: needs labels"),
        (["--example-inputs", "many"], "example_inputs: cannot read 'many'"),
        (["--example-inputs", "1x16", "--loss", "mse"], "inputs: a loss cannot be judged without data"),
        (["--example-inputs", "1x7"], "inputs: the model failed on them"),
        (["--data", "val.npz", "--json", "--exclude-for", "pt2e"], "--exclude-for: not with --json"),
    ],
)
def test_wrong_use_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sensitivity", "net.py:make", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = (line for line in output.err.splitlines() if line != "making")
    assert line.startswith(f"qvis: error: {message}")


def test_a_checkpoint_names_the_way_to_run_it(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    torch.save({"a.weight": torch.ones(3, 3)}, "net.pt")
    assert main(["sensitivity", "net.pt", "--data", "val.npz"]) == 2
    assert "package.module:factory, and this file with --weights" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sensitivity", "check", "report", "compare"])
def test_help_loads_neither_numpy_nor_a_framework(command: str) -> None:
    code = (
        "import sys; from qvis.cli import main; main([sys.argv[1], '--help']);"
        "print([name for name in ('numpy', 'torch', 'tensorflow', 'keras', 'onnx', 'bokeh') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
    assert "--data DATA" in run.stdout
    assert f"qvis {command} " in run.stdout


@pytest.mark.parametrize("stored", [False, True])
def test_report_and_compare_take_data(stored: bool, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", "val.npz", "--samples", "4", "--json", "--format", "json", *["--stored"] * stored]
    assert main(["report", "net.py:make", *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["evidence"] == "predicted from 4 samples"
    assert report["sensitivity"]["samples"] == 4
    assert main(["compare", "net.py:make", "net.py:problem", *options]) == 0
    changes = json.loads(capsys.readouterr().out)
    assert changes["evidence"] == "predicted from 4 samples"
    (changed,) = (layer for layer in changes["layers"] if layer["name"] == "2")
    assert changed["damage_before"] != changed["damage_after"]
    assert [text.split(":")[0] for text in changes["verdict"]["details"] if "at once" in text] == ["Before", "After"]
