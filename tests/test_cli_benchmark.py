"""``qvis benchmark``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qvis.cli import main
from qvis.cli.benchmark import own_names, read_numbers, share_weights
from qvis.errors import BadArgumentError
from tests.nets import CODE, fill

QUICK = ["--calls", "3", "--warmup", "1", "--batch-sizes", "1,4", "--no-memory"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    changed = (
        "\ndef make_rounded():\n    net = make()\n    with torch.no_grad():\n        for one in net.parameters():\n"
    )
    return fill(tmp_path, CODE + changed + "            one.copy_((one * 32).round() / 32)\n    return net\n")


def run(*arguments: str, data: str | None = "val.npz") -> int:
    given = [] if data is None else ["--data", data]
    return main(["benchmark", "--model", "net.py:make_rounded", *given, *QUICK, *arguments])


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("qvis: error: ")
    assert output.err.count("\n") == 1
    return output.err


def test_the_table_is_printed_and_nothing_is_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--baseline", "net.py:make") == 0
    output = capsys.readouterr()
    assert output.err == ""
    lines = output.out.splitlines()
    head = next(place for place, line in enumerate(lines) if line.startswith("Model "))
    assert [line.split()[0] for line in lines[head + 1 : head + 3]] == ["make", "make_rounded"]
    assert {path.name for path in folder.iterdir()} <= {"net.py", "val.npz", "__pycache__"}


def test_json_alone_is_on_stdout_and_paths_are_told_beside(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--baseline", "net.py:make", "--json", "--report", "out", "--format", "json", "--format", "html"]
    assert run(*command, "--name", "float", "--name", "rounded", "--threads", "1,2") == 0
    output = capsys.readouterr()
    document: dict[str, Any] = json.loads(output.out)
    assert document == json.loads((folder / "out/benchmark.json").read_text())
    assert document["kind"] == "benchmark"
    assert [one["name"] for one in document["variants"]] == ["float", "rounded"]
    assert [(one["batch"], one["threads"]) for one in document["points"]] == [(1, 1), (4, 1), (1, 2), (4, 2)]
    assert all(one["calls"] == 3 for variant in document["variants"] for one in variant["latencies"])
    assert document["variants"][0]["answers"]["top1"] is not None
    assert 10 < document["variants"][1]["sqnr_db"] < 40
    layers = document["variants"][1]["layers"]
    assert [(layer["name"], layer["found"], layer["op"]) for layer in layers] == [(n, n, "Linear") for n in "024"]
    assert all(10 < layer["sqnr_db"] < 60 for layer in layers)
    written = [line.removeprefix("wrote ") for line in output.err.splitlines()]
    assert written == [str(Path(f"out/benchmark.{end}")) for end in ("json", "html")]


def test_made_up_inputs_will_do_without_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--example-inputs", "1x16", "--json", "--no-layers", data=None) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (document["has_baseline"], document["samples"]) == (False, 0)
    assert document["variants"][0]["answers"] is None


def test_weights_reach_the_factory_that_they_are_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(1)
    sizes = {"0": (24, 16), "2": (24, 24), "4": (4, 24)}
    state = {f"{name}.weight": torch.randn(size) for name, size in sizes.items()}
    save_file(
        {**state, **{f"{name}.bias": torch.zeros(size[0]) for name, size in sizes.items()}}, folder / "own.safetensors"
    )
    for spec, weights, expected in (
        ("net.py:make", "--weights-baseline", ["own.safetensors", "make_rounded"]),
        ("net.py:make", "--weights", ["make", "own.safetensors"]),
    ):
        assert run("--baseline", spec, weights, "own.safetensors", "--json") == 0
        document = json.loads(capsys.readouterr().out)
        assert [one["name"] for one in document["variants"]] == expected
        assert document["variants"][1]["sqnr_db"] < 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-sizes", "1,none"], "--batch-sizes: got '1,none', expected whole numbers of 1 or more such as 1,32"),
        (["--threads", "0"], "--threads: got '0'"),
        (["--open"], "--open: needs the page"),
        (["--baseline", "none.onnx"], "--baseline: there is no file 'none.onnx'"),
        (["--weights", "a.pt", "--weights", "b.pt"], "--weights: got 2, and 1 factories as --model"),
        (["--weights-baseline", "a.pt"], "--weights-baseline: got 'a.pt', but no factory as --baseline"),
        (["--baseline", "val.npz"], "val.npz"),
        (["--name", "one", "--name", "two"], "names: got ['one', 'two'], expected 1"),
        (["--calls", "0"], "--calls"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    assert message in complaint(capsys)


def test_without_data_the_way_out_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data=None) == 2
    assert "--example-inputs 1x3x224x224" in complaint(capsys)
    assert run(data="none.npz") == 2
    assert "there is no file 'none.npz'" in complaint(capsys)


def test_a_file_of_weights_alone_is_refused_with_the_way_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "int8.safetensors").write_bytes(b"")
    assert main(["benchmark", "--model", "int8.safetensors", "--data", "val.npz"]) == 2
    assert "give that, on the command line as 'file.py:factory' with --weights" in complaint(capsys)


def test_numbers_are_read_with_commas_between_them() -> None:
    assert read_numbers("--threads", " 1,32 ") == (1, 32)
    for typed in ("", "1,", "1.5", "-1", "1 2", "٣"):
        with pytest.raises(BadArgumentError, match="--threads: got"):
            read_numbers("--threads", typed)


def test_weights_go_to_factories_in_turn_else_to_the_baseline() -> None:
    a, b = Path("a.pt"), Path("b.pt")
    assert share_weights(["x.onnx"], "net.py:make", [a], None) == ([None], a)
    assert share_weights(["x.onnx", "net.py:make"], "net.py:make", [a], b) == ([None, a], b)
    assert share_weights(["n:f", "x.onnx", "n:g"], None, [a, b], None) == ([a, None, b], None)
    assert share_weights(["n:f"], "n:g", [], b) == ([None], b)
    for models, baseline, weights in ((["x.onnx"], None, [a]), (["n:f", "n:g"], None, [a]), (["x"], "n:f", [a, b])):
        with pytest.raises(BadArgumentError, match="--weights: got"):
            share_weights(models, baseline, weights, None)
    with pytest.raises(BadArgumentError, match="--weights: got 1, and 0 factories"):
        share_weights(["x.onnx"], "n:f", [a], b)


def test_models_are_called_by_their_files_and_functions() -> None:
    assert own_names([("a/net.py:make", None), ("out/q.onnx", None)]) == ["make", "q.onnx"]
    assert own_names([("n:make", None), ("n:make", Path("q.safetensors"))]) == ["make", "q.safetensors"]
    assert own_names([("a/q.onnx", None), ("b/q.onnx", None)]) == ["a/q.onnx", "b/q.onnx"]
    assert own_names([("n:make", None), ("n:make", None)]) is None
