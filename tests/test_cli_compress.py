"""``qvis compress``: what is printed, written, and kept when it is stopped."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from qvis.analysis.planning import Bench
from qvis.analysis.sizes import Compressibility, Trial
from qvis.cli import compress, main
from tests.nets import fill

COMMAND = ["compress", "net.py:make", "--data", "val.npz"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return fill(tmp_path)


def test_the_layers_are_printed_and_nothing_is_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(COMMAND) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Sequential: compressibility"
    assert " ".join(lines).count("measured on 8 samples") == 1
    (heading,) = (i for i, line in enumerate(lines) if line.startswith("Layer"))
    assert sorted(line.split()[0] for line in lines[heading + 1 :]) == ["0", "2", "4"]
    assert all(len(line) <= 80 for line in lines)
    assert {path.name for path in folder.iterdir()} <= {"net.py", "val.npz", "__pycache__"}


def test_the_report_is_written_and_final(capsys: pytest.CaptureFixture[str]) -> None:
    command = [*COMMAND, "--report", "out", "--format", "html", "--format", "json", "--format", "md"]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [f"out/compressibility.{one}" for one in ("html", "json", "md")]
    page, document = Path("out/compressibility.html").read_text(), read()
    assert document["progress"]["state"] == "complete"
    assert 'http-equiv="refresh"' not in page
    assert 'data-state="complete"' in page
    assert document["accuracy"] is not None


def read() -> Any:
    return json.loads(Path("out/compressibility.json").read_text())


def test_json_alone_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--json", "--report", "out", "--format", "json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out) == read()
    assert output.err.endswith("wrote out/compressibility.json\n")


def test_measuring_can_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--no-measure", "--layers", "2", "--bits", "6", "--keep-db", "20"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "In 6 bits 1 layer takes" in text
    assert "Nothing is measured yet" in text


def test_a_budget_ends_it_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--budget", "0.000001", "--report", "out", "--format", "html", "--format", "json"]) == 0
    assert re.search("The time was up: [01] of", " ".join(capsys.readouterr().out.split()))
    assert read()["progress"]["state"] == "out of time"
    assert "The time was up" in Path("out/compressibility.html").read_text()


def test_an_interruption_keeps_what_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, seen = Bench.run, []

    def run(self: Bench, trial: Trial) -> tuple[float, float]:
        seen.append(trial)
        if len(seen) > 5:
            raise KeyboardInterrupt
        return real(self, trial)

    monkeypatch.setattr(Bench, "run", run)
    assert main([*COMMAND, "--report", "out", "--format", "html", "--format", "json"]) == 130
    output = capsys.readouterr()
    assert output.err == "qvis: error: interrupted\n"
    assert "Interrupted: 5 of" in " ".join(output.out.split())
    page, document = Path("out/compressibility.html").read_text(), read()
    assert document["progress"]["state"] == "interrupted"
    assert document["progress"]["done"] == 5
    assert "Interrupted: 5 of" in page
    assert 'http-equiv="refresh"' not in page


def test_the_page_can_be_watched_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(compress, "monotonic", lambda: float(next(clock)))  # each look at the clock takes a second
    pages: list[str] = []
    real = Compressibility.write

    def write(self: Compressibility, *arguments: Any) -> Any:
        written = real(self, *arguments)
        pages.append(written.paths["html"].read_text())
        return written

    monkeypatch.setattr(Compressibility, "write", write)
    assert main([*COMMAND, "--report", "out"]) == 0
    pages.append(Path("out/compressibility.html").read_text())
    assert len(pages) >= 3
    for page in pages[:-1]:
        assert 'http-equiv="refresh"' in page
        assert 'data-state="running"' in page
    assert "just begun" in pages[0]
    assert "to go." in pages[1]
    assert 'http-equiv="refresh"' not in pages[-1]
    assert [path.name for path in Path("out").iterdir()] == ["compressibility.html"]  # nothing half-written is left


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data: needed to run the model; without data, --example-inputs 1x3x224x224 has inputs made up"),
        (["--data", "val.npz", "--open"], "--open: needs the page, expected '--report DIR' as well"),
        (["--data", "val.npz", "--budget", "0"], "--budget: got 0, expected a number of seconds above 0"),
        (["--data", "val.npz", "--keep-db", "nan"], "keep_db: got nan, expected a finite number"),
        (["--data", "val.npz", "--bits", "1"], "Invalid value for '--bits'"),
        (["--data", "val.npz", "--layers", "nome"], "selected_layers: no layer matches 'nome'"),
    ],
)
def test_wrong_use_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "net.py:make", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith(f"qvis: error: {message}")
