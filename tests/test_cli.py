"""The command line: what goes to stdout and stderr, what is written, and with which code it ends."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import qvis
from qvis.cli import main
from qvis.layers import Thresholds

CODE = """
import os
import torch
from torch import nn

print("printed by the factory")

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Linear(8, 8, bias=False))

def spoilt():
    model = make()
    with torch.no_grad():
        model[1].weight[::2] *= 4e-3
    return model

def with_nan():
    model = spoilt()
    with torch.no_grad():
        model[0].weight[2, 0, 0, 0] = float("nan")
    return model

def strange_names():
    return nn.ModuleDict({"[red]\\x1b[2J\\n|@user": nn.Linear(4, 4), "x" * 300: nn.Linear(4, 4)})

def many():
    return nn.ModuleDict({f"layer{i}": nn.Linear(4, 4) for i in range(3000)})

def raises():
    raise RuntimeError("first line\\nsecond line")

def interrupted():
    raise KeyboardInterrupt

def not_a_model():
    return 3

def needs(width):
    return make()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test runs in a folder of its own, beside ``net.py``."""
    (tmp_path / "net.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QVIS_DEBUG", raising=False)
    monkeypatch.delenv("COLUMNS", raising=False)
    return tmp_path


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {"net.py"}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "qvis", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, **environment},
    )


# ---------------------------------------------------------------------------------------------- report


def test_report_prints_the_table_and_the_path_and_writes_the_page(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "net.py:spoilt"]) == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert lines[0] == "Sequential: relative weight ranges"
    assert lines[-1] == str(Path("qvis-report", "relative_weight_ranges.html"))
    assert next(line for line in lines if "Linear" in line).startswith("◆ problem  1 ")
    assert files_in(folder) == {lines[-1]}
    assert "<!doctype html>" in Path(lines[-1]).read_text(encoding="utf-8")
    assert output.err == "printed by the factory\n"


def test_report_says_what_the_function_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "net.py:spoilt", "--json", "--name", "A", "-o", "a/b", "--format", "json"]) == 0
    output = capsys.readouterr()
    from qvis.adapters.factories import load

    expected = qvis.visualize_relative_weight_ranges(load("net.py:spoilt"), folder / "c", name="A").to_dict()
    assert json.loads(output.out) == expected
    assert Path("a/b/relative_weight_ranges.json").read_text(encoding="utf-8") == output.out
    assert output.err.splitlines()[-1] == f"wrote {Path('a/b/relative_weight_ranges.json')}"


def test_json_is_the_only_thing_on_stdout_and_the_page_is_still_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "net.py:with_nan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"][0]["severity"] == "unusable"
    assert files_in(folder) == {str(Path("qvis-report/relative_weight_ranges.html"))}


def test_each_format_and_kind_can_be_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["report", "net.py:make", "--kind", "weights", "--format", "html", "--format", "md", "--format", "json"]
    assert main(arguments) == 0
    written = {str(Path("qvis-report") / f"weight_ranges.{suffix}") for suffix in ("html", "json", "md")}
    assert files_in(folder) == written
    assert set(capsys.readouterr().out.splitlines()[-3:]) == written


def test_options_reach_the_analysis(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--layers", "1", "--bits", "4", "--watch-db", "41", "--problem-db", "40.5", "--starved-levels", "3"]
    assert main(["report", "net.py:make", "--json", *arguments]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [layer["name"] for layer in document["layers"]] == ["1"]
    assert document["bits"] == 4
    changed = {name: document["thresholds"][name] for name in ("watch_db", "problem_db", "starved_levels")}
    assert changed == {"watch_db": 41, "problem_db": 40.5, "starved_levels": 3}
    assert document["layers"][0]["severity"] == "problem"


def test_layers_may_be_given_more_than_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "net.py:make", "--json", "--layers", "1", "--layers", "0"]) == 0
    assert [layer["name"] for layer in json.loads(capsys.readouterr().out)["layers"]] == ["0", "1"]


def test_weights_are_put_into_the_model_of_the_factory(capsys: pytest.CaptureFixture[str]) -> None:
    state = {"0.weight": torch.full((8, 3, 3, 3), 0.5), "1.weight": torch.eye(8)}
    save_file(state, "w.safetensors")
    assert main(["report", "net.py:make", "--weights", "w.safetensors", "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert layers[0]["statistics"]["max"] == [0.5] * 8
    assert layers[1]["statistics"]["mean"] == [0.125] * 8


def test_a_pt2_file_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    torch.export.save(torch.export.export(model.eval(), (torch.zeros(1, 4),)), "model.pt2")
    assert main(["report", "model.pt2", "--json"]) == 0
    (layer,) = json.loads(capsys.readouterr().out)["layers"]
    assert layer["statistics"]["max"] == pytest.approx(model[0].weight.detach().amax(1).tolist())


def test_open_shows_the_page_that_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert main(["report", "net.py:make", "--open"]) == 0
    assert opened == [Path("qvis-report/relative_weight_ranges.html").resolve().as_uri()]


def test_all_prints_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "net.py:strange_names", "--all"]) == 0
    output = capsys.readouterr().out
    assert r"[red]\x1b[2J\n|@user" in output
    assert "\x1b" not in output
    assert max(map(len, output.splitlines())) <= 80


def test_the_help_tells_the_true_defaults_of_the_thresholds(capsys: pytest.CaptureFixture[str]) -> None:
    defaults = Thresholds()
    for command in ("report", "compare", "check"):
        assert main([command, "--help"]) == 0
        text = " ".join(capsys.readouterr().out.split())
        for name in ("watch_db", "problem_db", "starved_levels"):
            entry = text.split(f"--{name.replace('_', '-')} ")[1]
            assert re.search(r"\[default: ([\d.]+)\]", entry)[1] == f"{getattr(defaults, name):g}"  # type: ignore[index]


# ---------------------------------------------------------------------------------------------- compare


def test_compare_writes_the_page_of_changes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "net.py:make", "net.py:spoilt"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "make → spoilt: changes after optimization"
    assert any("○ ok → ◆ problem  1" in line for line in lines)
    assert lines[-1] == str(Path("qvis-report", "changes_after_optimization.html"))
    assert files_in(folder) == {lines[-1]}


def test_two_sets_of_weights_of_one_factory_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("a", 0.5), ("b", 0.25)):
        save_file({"0.weight": torch.full((8, 3, 3, 3), value), "1.weight": torch.eye(8)}, f"{name}.safetensors")
    factory = "net.py:make"
    arguments = ["compare", factory, factory, "--weights-old", "a.safetensors", "--weights-new", "b.safetensors"]
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["model"]["before"]["name"] == "a.safetensors"
    assert document["model"]["after"]["name"] == "b.safetensors"
    changes = {layer["name"]: layer for layer in document["layers"]}
    assert changes["0"]["before"]["statistics"]["max"] == [0.5] * 8
    assert changes["0"]["after"]["statistics"]["max"] == [0.25] * 8
    assert changes["1"]["verdict"] == "unchanged"


def test_the_names_of_a_comparison_can_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "net.py:make", "net.py:make", "--name-old", "A", "--name-new", "B"]) == 0
    assert capsys.readouterr().out.startswith("A → B: ")


# ---------------------------------------------------------------------------------------------- wrong use and bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report"], "Missing argument 'MODEL'"),
        (["report", "missing.pt2"], "MODEL: there is no file 'missing.pt2'; give a model's file or folder, 'package"),
        (["compare", "net.py:make", "missing.pt2"], "NEW: there is no file 'missing.pt2'"),
        (["report", "net.py"], "MODEL: 'net.py' is code; name what makes the model, as in 'net.py:make'"),
        (["report", "other.py:make"], "no file 'other.py'"),
        (["report", "no_such_module:make"], "no module 'no_such_module'"),
        (["report", "net.py:mak"], "did you mean|there is 'make'"),
        (["report", "net.py:raises"], "RuntimeError: first line second line"),
        (["report", "net.py:not_a_model"], "cannot read an object of type int"),
        (["report", "net.py:needs"], "cannot be called without arguments"),
        (["report", "notes.txt"], "cannot read the file 'notes.txt'"),
        (["report", "damaged.pt2"], "damaged.pt2"),
        (["report", "damaged.pt2", "--weights", "w.pt"], "--weights: 'damaged.pt2' holds its own weights"),
        (["compare", "net.py:make", "damaged.pt2", "--weights-new", "w.pt"], "--weights-new: 'damaged.pt2' holds"),
        (["report", "net.py:make", "--weights", "missing.pt"], "missing.pt"),
        (["report", "net.py:make", "--layers", "01"], "selected_layers: no layer matches '01'"),
        (["report", "net.py:make", "-o", "net.py"], "out_dir: 'net.py' is a file or lies below one"),
        (["report", "net.py:make", "-o", "net.py/below"], "is a file or lies below one"),
        (["report", "net.py:make", "-o", "theirs"], "was not written by qvis and is left alone"),
        (["report", "net.py:make", "--bits", "1"], "'--bits'"),
        (["report", "net.py:make", "--bits", "many"], "'--bits'"),
        (["report", "net.py:make", "--format", "pdf"], "'--format'"),
        (["report", "net.py:make", "--kind", "other"], "'--kind'"),
        (["report", "net.py:make", "--open", "--format", "md"], "--open: needs the page"),
        (["report", "net.py:make", "--watch-db", "nan"], "--watch-db: got nan, expected a finite number"),
        (["report", "net.py:make", "--problem-db", "35"], "--problem-db: got 35, expected at most --watch-db"),
        (["report", "net.py:make", "--starved-levels", "0"], "'--starved-levels'"),
        (["check", "net.py:make", "--min-sqnr", "inf"], "--min-sqnr: got inf, expected a finite number"),
        (["check", "net.py:make", "--fail-on", "ok"], "'--fail-on'"),
        (["frobnicate"], "No such command 'frobnicate'"),
        (["report", "net.py:make", "--frobnicate"], "No such option"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_code_2_and_writes_nothing(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("notes.txt").write_text("hello")
    Path("damaged.pt2").write_bytes(b"PK\x03\x04 not an archive")
    Path("theirs").mkdir()
    Path("theirs/relative_weight_ranges.html").write_text("<p>Mine</p>")
    before = files_in(folder)
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (error,) = (line for line in output.err.splitlines() if line != "printed by the factory")
    assert error.startswith("qvis: error: ")
    assert re.search(message, error) or message in error
    assert files_in(folder) == before
    assert Path("theirs/relative_weight_ranges.html").read_text() == "<p>Mine</p>"


def test_an_interruption_ends_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "net.py:interrupted"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "qvis: error: interrupted"


def test_a_fault_of_qvis_is_one_line_too_unless_the_traceback_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise LookupError("no\nsuch \x1b[2Jthing")

    monkeypatch.setattr("qvis.report.terminal.print_document", fail)
    assert main(["report", "net.py:make"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "qvis: error: unexpected LookupError: no such [2Jthing; set QVIS_DEBUG=1 to see where"
    monkeypatch.setenv("QVIS_DEBUG", "1")
    with pytest.raises(LookupError):
        main(["report", "net.py:make"])


# ---------------------------------------------------------------------------------------------- as a process


def test_help_loads_nothing_that_takes_time() -> None:
    program = "import sys; from qvis.cli import main; print(main(['--help']), *sys.modules, file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    code, *modules = result.stderr.split()
    assert code == "0"
    slow = {"torch", "bokeh", "numpy", "scipy", "jinja2", "tensorflow", "keras", "onnx", "onnxruntime", "h5py", "PIL"}
    assert not slow & set(modules)
    assert [name for name in modules if name.startswith("qvis.adapters")] == []
    for command in ("report", "compare", "check", "demo"):
        assert re.search(rf"^  {command} +\S", result.stdout, re.MULTILINE)


@pytest.mark.parametrize("command", ["report", "compare", "check", "demo"])
def test_the_help_of_each_command_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"  qvis {command}" in capsys.readouterr().out.split("Examples:")[1]


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"qvis {qvis.__version__}\n"


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "Commands:" in capsys.readouterr().out


def test_a_process_keeps_results_and_messages_apart_and_ends_with_the_code() -> None:
    good, bad = run("check", "net.py:make"), run("report", "net.py:raises")
    assert good.returncode == 0
    assert good.stdout.startswith("ok: ")
    assert good.stderr == "printed by the factory\n"
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert "Traceback" not in bad.stderr
    assert len(bad.stderr.splitlines()) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="a closed pipe is told differently there")
def test_a_reader_that_goes_away_causes_no_complaint() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "qvis", "report", "net.py:many", "--all"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    error = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(120) == 141
    assert error == "printed by the factory\n"


def test_output_in_a_narrow_encoding_still_works() -> None:
    result = run("report", "net.py:spoilt", PYTHONIOENCODING="ascii")
    assert result.returncode == 0
    assert "# problem" in result.stdout
