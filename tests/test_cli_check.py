"""``qvis check``, the command for continuous integration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from qvis import analyze
from qvis.cli import main
from qvis.cli.check import FailOn, find_failures
from qvis.layers import decibels

CODE = """
import torch
from torch import nn

def make(spoil=0, blank=False):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 8, bias=False) for _ in range(3)))
    with torch.no_grad():
        if spoil:
            model[1].weight[::2] *= spoil
        if blank:
            model[2].weight.zero_()
    return model

def problem():
    return make(4e-3)

def watch():
    return make(7e-2)

def unusable():
    return make(4e-3, blank=True)

def partly_complex():
    model = make()
    model.add_module("waves", nn.Linear(2, 2, bias=False, dtype=torch.complex64))
    return model

def named():
    return nn.ModuleDict({"a\\n\\x1b[2J": problem()[1]})
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def spoilt(factor: float) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 8, bias=False) for _ in range(3)))
    with torch.no_grad():
        model[1].weight[::2] *= factor
    return model


def test_a_good_model_passes_in_one_line_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "net.py:make"]) == 0
    output = capsys.readouterr()
    expected = "ok: Sequential: all 3 layers pass at int8 with one grid per tensor, from the weights alone\n"
    assert (output.out, output.err) == (expected, "")
    assert {path.name for path in folder.iterdir()} <= {"net.py", "__pycache__"}


def test_a_failing_layer_is_a_line_that_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "net.py:problem"]) == 1
    fail, last = capsys.readouterr().out.splitlines()
    layer = analyze(spoilt(4e-3)).layers[1]
    assert fail.startswith("FAIL 1: problem: On one int8 grid for the tensor, a quarter of the channels lose ")
    assert f"({decibels(1.0, layer.noise_share):.1f} dB)" in fail
    assert fail.endswith("(from the weights alone)")
    assert last.startswith("FAILED: Sequential: 1 of 3 layers fails at int8")


@pytest.mark.parametrize(
    ("factory", "fail_on", "code"),
    [
        ("make", "watch", 0),
        ("watch", "watch", 1),
        ("watch", "problem", 0),
        ("problem", "watch", 1),
        ("problem", "problem", 1),
        ("problem", "unusable", 0),
        ("unusable", "unusable", 1),
    ],
)
def test_fail_on_is_the_mildest_severity_that_fails(factory: str, fail_on: str, code: int) -> None:
    assert main(["check", f"net.py:{factory}", "--fail-on", fail_on]) == code


def test_the_worst_layer_comes_first_and_the_reason_is_the_one_that_decided(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["check", "net.py:unusable"]) == 1
    first, second, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("FAIL 2: unusable: No channel holds a finite weight other than zero")
    assert second.startswith("FAIL 1: problem: ")
    # starved channels alone make the severity where the noise would be allowed
    main(["check", "net.py:problem", "--problem-db", "-100", "--watch-db", "-99"])
    assert capsys.readouterr().out.startswith("FAIL 1: problem: 4 channels of 8 are starved")


@pytest.mark.parametrize("option", ["--min-kept-db", "--min-sqnr"])
def test_a_limit_fails_just_above_what_the_model_keeps_and_passes_just_below(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = analyze(spoilt(7e-2)).layers
    worst = min(decibels(1.0, x.noise_share) if option == "--min-kept-db" else x.rounding.sqnr_tensor for x in layers)
    assert main(["check", "net.py:watch", option, f"{worst - 0.01}"]) == 0
    capsys.readouterr()
    assert main(["check", "net.py:watch", option, f"{worst + 0.01:.4f}"]) == 1
    assert f"{worst:.1f} dB, below {option} {worst + 0.01:g}" in capsys.readouterr().out


def test_all_that_a_layer_fails_stands_in_its_one_line() -> None:
    ((layer, why),) = find_failures(analyze(spoilt(4e-3)), FailOn.watch, 21.0, 10.0)
    assert layer.name == "1"
    assert [text.split()[0] for text in why] == ["problem:", "a"]


def test_json_tells_the_same_to_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "net.py:problem", "--json", "--min-kept-db", "12.5", "--bits", "7"]) == 1
    output = capsys.readouterr()
    result = json.loads(output.out)
    assert result["passed"] is False
    expected = {"min_kept_db": 12.5, "min_sqnr": None, "max_damage": None, "max_total_damage": None}
    assert result["limits"] == expected
    assert (result["bits"], result["layers"], result["fail_on"]) == (7, 3, "problem")
    assert [failure["name"] for failure in result["failures"]] == ["1"]
    assert result["failures"][0]["severity"] == "problem"
    assert main(["check", "net.py:make", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True


def test_the_report_is_written_when_asked_for_also_where_the_check_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "net.py:problem", "-o", "out", "--format", "md"]) == 1
    path = Path("out/relative_weight_ranges.md")
    assert path.is_file()
    output = capsys.readouterr()
    assert output.err == f"wrote {path}\n"
    assert output.out.splitlines()[-1].startswith("FAILED")


def test_layers_that_cannot_be_read_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "net.py:partly_complex"]) == 0
    assert capsys.readouterr().out.endswith("from the weights alone; 1 tensor not read\n")
    assert main(["check", "net.py:partly_complex", "--json"]) == 0
    (skipped,) = json.loads(capsys.readouterr().out)["skipped"]
    assert skipped["name"] == "waves"


def test_a_name_cannot_break_the_line_or_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "net.py:named"]) == 1
    fail, _ = capsys.readouterr().out.splitlines()
    assert fail.startswith(r"FAIL a\n\x1b[2J: problem: ")


# ---------------------------------------------------------------------------------------------------------------------
# With data


@pytest.fixture
def data(folder: Path) -> list[str]:
    import numpy as np

    (folder / "deep.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def make():\n    torch.manual_seed(0)\n    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))\n"
    )
    np.save(folder / "val.npy", np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32))
    return ["check", "deep.py:make", "--data", "val.npy"]


def test_with_data_layers_pass_by_their_damage(data: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for limit in ("0.1%", "0.001", "0.1 %", "1e-3"):
        assert main([*data, "--max-damage", limit]) == 0
        line = capsys.readouterr().out
        assert line == "ok: Sequential: all 3 layers pass at int8 with one grid per tensor, predicted from 8 samples\n"


def test_a_damage_above_the_limit_fails_with_both_figures(data: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*data, "--max-damage", "0.00001%", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["limits"]["max_damage"] == pytest.approx(1e-7)
    assert (result["passed"], result["whole"], len(result["failures"])) == (False, "", 3)
    for failure in result["failures"]:
        assert failure["severity"] == "ok"
        weights, inputs = failure["why"]
        assert weights.startswith("rounding its weights does a damage of ")
        assert inputs.startswith("rounding what enters it does a damage of ")
        assert weights.endswith(", above --max-damage less than 0.0001 %")


def test_all_layers_together_may_fail_where_each_passes(data: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*data, "--max-total-damage", "0.0001%"]) == 1
    fail, last = capsys.readouterr().out.splitlines()
    assert fail.startswith("FAIL all layers together: rounding all weights and inputs changes the output by 0.0")
    assert fail.endswith(", above --max-total-damage 0.00010 % (measured on 8 samples)")
    assert last.startswith("FAILED: Sequential: all 3 layers pass one by one, but not together, at int8 ")
    assert main([*data, "--max-total-damage", "0.0001%", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["failures"] == []
    assert result["whole"] in fail
    assert main([*data, "--max-total-damage", "10%"]) == 0


@pytest.mark.parametrize("option", ["--max-damage", "--max-total-damage"])
@pytest.mark.parametrize("typed", ["nonsense", "-1", "nan", "inf", "1%%", "0.1% of it", "", "%"])
def test_shares_are_numbers_or_percentages(
    data: list[str], option: str, typed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*data, f"{option}={typed}"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == f"qvis: error: {option}: got {typed!r}, expected a share such as 0.1% or 0.001\n"


@pytest.mark.parametrize("option", ["--max-damage", "--max-total-damage"])
def test_limits_of_damage_need_a_run(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "net.py:make", option, "1%"]) == 2
    message = f"{option}: needs the model to be run, expected --data or --example-inputs as well"
    assert capsys.readouterr().err == f"qvis: error: {message}\n"


def test_a_check_may_run_on_made_up_inputs_and_says_so(data: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*data[:2], "--example-inputs", "1x8", "--samples", "8", "--measure", "all"]) == 0
    assert capsys.readouterr().out.endswith("measured on made-up inputs\n")
