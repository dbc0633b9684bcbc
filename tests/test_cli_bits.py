"""``qvis bits``."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from qvis.analysis import bit_widths
from qvis.cli import main
from qvis.cli.bits import WIDTHS, read_damage, read_exports, read_granularity, read_size, read_widths
from qvis.cli.models import FORMS
from qvis.errors import BadArgumentError, OutputError
from qvis.exporting import FORMATS
from tests.nets import fill

QUICK = ["--widths", "8,4,2", "--samples", "8"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return fill(tmp_path)


def run(*arguments: str, data: str | None = "val.npz") -> int:
    given = [] if data is None else ["--data", data]
    return main(["bits", "net.py:make", *given, *QUICK, *arguments])


def test_the_verdict_and_the_layers_are_printed_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--average-bits", "4") == 0
    output = capsys.readouterr()
    assert output.err == ""
    lines = output.out.splitlines()
    assert lines[0] == "Sequential: bit widths"
    assert lines[1].startswith("Measured on 8 samples: at ")
    head = next(i for i, line in enumerate(lines) if line.startswith("Layer "))
    assert [line.split()[0] for line in lines[head + 1 : head + 4]] == ["0", "2", "4"]
    for line, weights in zip(lines[head + 1 : head + 4], (384, 576, 96), strict=True):
        assert line.split()[1] == str(weights)
        assert line.split()[2] in ("2", "4", "8")
    compared = [line.split()[0] for line in lines if "the output keeps" in line and " bits " in line[:20]]
    assert {"int2", "int4", "int8"} <= set(compared)
    assert any(line.startswith("> mix ") for line in lines)
    assert any("answers" in line for line in lines)
    assert {path.name for path in folder.iterdir()} <= {"net.py", "val.npz", "__pycache__"}


def test_json_alone_is_on_stdout_and_paths_are_told_beside(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--target-size", "1kB", "--json", "--report", "out", "--format", "json", "--format", "html"]
    assert run(*command, "--export", "csv=widths.csv", "--export", "json=widths.json", "--name", "Mine") == 0
    output = capsys.readouterr()
    document: dict[str, Any] = json.loads(output.out)
    assert document == json.loads(Path("out/bit_widths.json").read_text())
    assert (document["kind"], document["model"]["name"]) == ("bit_widths", "Mine")
    assert document["asked"] == "at most 1,000 bytes"
    assert document["sizes"]["bytes"] <= 1000
    written = [line.removeprefix("wrote ") for line in output.err.splitlines()]
    assert written == ["widths.csv", "widths.json", *(str(Path(f"out/bit_widths.{end}")) for end in ("json", "html"))]
    with (folder / "widths.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["layer"], int(row["bits"])) for row in rows] == [
        (layer["name"], layer["bits"]) for layer in document["layers"]
    ]
    told = json.loads((folder / "widths.json").read_text())
    assert [layer["bits"] for layer in told["layers"]] == [layer["bits"] for layer in document["layers"]]


def test_a_damage_is_kept_and_layers_stay_in_float(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--max-damage", "1%", "--layers", "2", "--layers", "4", "--granularity", "channel", "--granularity", "8"]
    assert run(*command, "--example-inputs", "1x16", "--export", "torchao=widths.py", data=None) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("Measured on made-up inputs: at ")
    assert "Asked for: at least 20 dB of the output." in lines[2]
    assert lines[-2:] == ["", "widths.py"]
    assert any(line.startswith("torchao: ") for line in lines)
    text = Path("widths.py").read_text()
    assert "('2', weights(" in text
    assert "('0', weights(" not in text
    # once more over what it wrote itself, but not over what it did not
    assert read_exports(["torchao=widths.py"]) == [("torchao", Path("widths.py"))]
    with pytest.raises(OutputError, match=r"path: 'widths.py' is not what qvis writes for csv, and is left alone"):
        read_exports(["csv=widths.py"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--average-bits, --target-size, --max-damage: got none, expected exactly one, such as --average-bits 5"),
        (["--average-bits", "5", "--max-damage", "20dB"], "got --average-bits and --max-damage, expected exactly one"),
        (["--average-bits", "0"], "--average-bits: got 0, expected a number above 0"),
        (["--average-bits", "nan"], "--average-bits: got nan, expected a number above 0"),
        (["--target-size", "much"], "--target-size: got 'much', expected a size such as 500kB, 2.5MB or 1MiB"),
        (["--max-damage", "20"], "--max-damage: got '20', expected what the output keeps, as 20dB, or may lose"),
        (["--average-bits", "5", "--widths", "8,1"], "--widths: got '8,1', expected widths from 2 to 16"),
        (["--average-bits", "5", "--granularity", "row"], "--granularity: got 'row', expected tensor, channel, or a"),
        (["--average-bits", "5", "--open"], "--open: needs the page, expected '--report DIR' as well"),
        (["--average-bits", "5", "--format", "md", "--open"], "--open: needs the page, expected '--format html'"),
        (["--average-bits", "5", "--export", "gguf=a"], "--export: got 'gguf=a', expected a format (json, csv, aimet"),
        (["--average-bits", "5", "--export", "csv"], "--export: got 'csv', expected a format"),
        (["--average-bits", "5", "--export", "csv=net.py"], "path: 'net.py' is not what qvis writes for csv"),
        (["--average-bits", "5", "--export", "csv=."], "path: '.' is a folder; name a file in a folder that is there"),
        (["--average-bits", "5", "--export", "csv=no/a.csv"], "lies in a folder that does not exist"),
        (["--average-bits", "5", "--format", "pdf"], "Invalid value for '--format'"),
        (["--average-bits", "1"], "average_bits: got 1, expected at least 2, the least of bits"),
    ],
)
def test_wrong_use_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("qvis: error: ")
    assert message in line
    assert not Path("a").exists()


def test_data_is_needed_and_never_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--average-bits", "5", data=None) == 2
    assert "--data: needed to run the model; without data, --example-inputs" in capsys.readouterr().err
    Path("widths.csv").write_text("layer,op,shape,weights,bits,granularity,bytes\r\n")
    assert run("--average-bits", "5", "--export", "csv=widths.csv", data="widths.csv") == 2
    assert "--export: 'widths.csv' is --data itself; name another file" in capsys.readouterr().err
    assert main(["bits", "none.onnx", "--data", "val.npz", "--average-bits", "5"]) == 2
    assert f"there is no file 'none.onnx'; give {FORMS}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "size"),
    [
        ("500kB", 500_000),
        ("2.5MB", 2_500_000),
        ("1MiB", 2**20),
        ("0.5 KiB", 512),
        ("812", 812),
        ("812 bytes", 812),
        ("3gb", 3_000_000_000),
    ],
)
def test_sizes_are_read_with_their_units(typed: str, size: int) -> None:
    assert read_size(typed) == size


@pytest.mark.parametrize("typed", ["", "kB", "-5kB", "5 apples", "1e3", "0", "0.0MB", "٥kB", "5k", "nan"])
def test_other_sizes_are_refused(typed: str) -> None:
    with pytest.raises(BadArgumentError, match="--target-size: got"):
        read_size(typed)


def test_damages_and_grids_are_read() -> None:
    assert read_damage("20dB") == read_damage("20 DB") == read_damage("1%") == pytest.approx(20)
    assert read_damage("-3.5dB") == -3.5
    for wrong in ("", "0%", "-1%", "20 d", "1 %%"):
        with pytest.raises(BadArgumentError, match="--max-damage: got"):
            read_damage(wrong)
    assert [read_granularity(one) for one in ("tensor", "channel", "32")] == ["tensor", "channel", 32]
    for wrong in ("0", "-1", "", "1.5", "٣", "9" * 12):
        with pytest.raises(BadArgumentError, match="--granularity: got"):
            read_granularity(wrong)


def test_the_defaults_are_those_of_the_function() -> None:
    assert tuple(read_widths(WIDTHS)) == bit_widths.WIDTHS
    for form in FORMATS:
        assert read_exports([f"{form}=new"]) == [(form, Path("new"))]


def test_nothing_is_written_where_one_of_several_exports_cannot_be(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exports = ["--export", "json=a.json", "--export", "onnxruntime=b.py"]
    assert run("--average-bits", "4", *exports, "-o", "out") == 2
    assert "cannot be told any of the layers" in capsys.readouterr().err
    assert not (folder / "a.json").exists()
    assert not (folder / "out").exists()


def test_a_page_that_may_not_be_written_is_said_before_the_model_is_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "bit_widths.html").write_text("mine")
    # the data is not looked at
    assert main(["bits", "net.py:make", "--data", "none.npz", "--average-bits", "4", "-o", "out"]) == 2
    assert "was not written by qvis and is left alone" in capsys.readouterr().err
    assert main(["bits", "net.py:make", "--data", "none.npz", "--average-bits", "4", "-o", "net.py/out"]) == 2
    assert "is a file or lies below one" in capsys.readouterr().err


def test_limits_that_round_to_nothing_are_said_as_typed() -> None:
    with pytest.raises(BadArgumentError, match=r"got '0\.5B'"):
        read_size("0.5B")
    assert f"{read_damage('100%'):g}" == "0"
