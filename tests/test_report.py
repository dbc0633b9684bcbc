"""What the visualizations return, and how its files are written."""

from __future__ import annotations

import copy
import errno
import html
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qvis
from qvis import BadArgumentError, OutputError, QvisError, Report, Thresholds, UnknownLayerError, UnsupportedModelError
from qvis.analysis import analyze_network
from qvis.analysis.comparison import compare
from qvis.layers import Reason, Severity, Skipped
from qvis.report import files as writing
from qvis.report.document import summarize, summarize_changes
from tests.weights import analysis, gaussian, network

KINDS = ("weight_ranges", "relative_weight_ranges", "changes_after_optimization")
FORMATS = ("html", "json", "md")
STATISTICS = ("min", "max", "mean", "std", "q25", "q50", "q75", "range", "relative_range")


def make_model(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[3].weight[1] *= 1000
        model[4].weight[0, 0] = torch.nan
    return model


def visualize(kind: str, out_dir: Any, **options: Any) -> Report:
    """Call the function that writes reports of this kind."""
    function = getattr(qvis, f"visualize_{kind}")
    models = [make_model(seed) for seed in range(2 if kind == "changes_after_optimization" else 1)]
    report = function(*models, out_dir, **options)
    assert isinstance(report, Report)
    return report


def make_report(weights: dict[str, Any] | None = None) -> Report:
    """A report of arrays, with nothing written yet."""
    found = analysis(weights or {"a": gaussian(4, 9), "b": gaussian(6, 5)})
    return Report(summarize(found, "weight_ranges"), found.layers)


def files(folder: Path) -> dict[str, bytes]:
    """All that is in a folder, hidden and temporary files too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def model() -> Iterator[nn.Module]:
    """A model that must be as it was when the test is over."""
    model = make_model()
    before, random = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    yield model
    assert all(
        torch.equal(a.nan_to_num(7), b.nan_to_num(7))
        for a, b in zip(model.state_dict().values(), before.values(), strict=True)
    )
    assert model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), random)


# ---------------------------------------------------------------------------------------------------------------------
# What is returned


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_has_the_names_that_scripts_rely_on(kind: str, tmp_path: Path) -> None:
    report = visualize(kind, tmp_path, formats="json")
    assert [layer.name for layer in report.layers] == ["0", "3", "4"]
    assert [layer.op for layer in report.layers] == ["Conv2d", "Linear", "Linear"]
    assert [layer.shape for layer in report.layers] == [(8, 3, 3, 3), (4, 8), (2, 4)]
    for layer in report.layers:
        assert isinstance(layer.severity, Severity)
        assert all(isinstance(reason, Reason) for reason in layer.reasons)
        for name in STATISTICS:
            values = getattr(layer.statistics, name)
            assert isinstance(values, np.ndarray)
            assert values.shape == layer.shape[:1]
    if kind == KINDS[2]:
        for layer in report.layers:
            assert layer.before.name == layer.after.name == layer.name
            assert layer.statistics is layer.after.statistics


@pytest.mark.parametrize("kind", KINDS)
def test_problematic_layers_are_those_that_are_a_problem_or_unusable_worst_first(kind: str, tmp_path: Path) -> None:
    report = visualize(kind, tmp_path, formats="json")
    assert [(layer.name, str(layer.severity)) for layer in report.problematic_layers] == [
        ("4", "unusable"),
        ("3", "problem"),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_each_visualization_writes_a_page_named_after_it(kind: str, tmp_path: Path) -> None:
    report = visualize(kind, tmp_path)
    assert report.path == tmp_path / f"{kind}.html"
    assert report.paths == {"html": report.path}
    assert files(tmp_path) == {f"{kind}.html": report.to_html().encode()}
    assert report.to_dict()["kind"] == kind


@pytest.mark.parametrize("kind", KINDS)
def test_all_formats_say_what_the_report_says(kind: str, tmp_path: Path) -> None:
    report = visualize(kind, str(tmp_path), formats=FORMATS)
    assert report.paths == {name: tmp_path / f"{kind}.{name}" for name in FORMATS}
    written = {name: path.read_text(encoding="utf-8") for name, path in report.paths.items()}
    assert written == {"html": report.to_html(), "json": report.to_json() + "\n", "md": report.to_markdown()}
    assert json.loads(written["json"]) == report.to_dict()
    assert report.verdict == report.to_dict()["verdict"]["text"]
    assert len(files(tmp_path)) == 3


def test_arguments_reach_the_analysis(tmp_path: Path, model: nn.Module) -> None:
    seen: list[str] = []

    def progress(layers: Any) -> Iterator[Any]:
        for layer in layers:
            seen.append(layer.name)
            yield layer

    thresholds = Thresholds(problem_db=5, watch_db=6)
    for kind in KINDS[:2]:
        seen.clear()
        document = getattr(qvis, f"visualize_{kind}")(
            model,
            tmp_path,
            selected_layers=["0", "3"],
            bits=5,
            thresholds=thresholds,
            name="mine",
            progress=progress,
            formats="json",
        ).to_dict()
        assert [layer["name"] for layer in document["layers"]] == seen == ["0", "3"]
        assert document["bits"] == 5
        assert document["thresholds"]["problem_db"] == 5
        assert document["model"]["name"] == "mine"
    document = qvis.visualize_changes_after_optimization(
        model, make_model(1), tmp_path, selected_layers="3", bits=5, names=("old", None), formats="json"
    ).to_dict()
    assert [model["name"] for model in document["model"].values()] == ["old", "Sequential"]
    assert [layer["name"] for layer in document["layers"]] == ["3"]
    assert document["bits"] == 5


def test_json_can_be_indented_and_holds_no_nan(tmp_path: Path) -> None:
    report = visualize("weight_ranges", tmp_path, formats="json")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    texts = [report.to_json(), report.to_json(indent=2)]
    assert texts[0].count("\n") == 0 < texts[1].count("\n")
    assert [json.loads(text, parse_constant=refuse) for text in texts] == [report.to_dict()] * 2


def test_an_unwritten_report_has_no_path_and_can_be_read() -> None:
    report = make_report()
    assert report.path is None
    assert report.paths == {}
    assert report.verdict in repr(report) == f"<qvis report: {report.verdict}>"
    with pytest.raises(BadArgumentError, match=r"no page was written.*call write\(out_dir\)"):
        report.open()


def test_open_shows_the_page_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    folder = tmp_path / "a folder #1"
    report = make_report().write(folder, "json")
    with pytest.raises(BadArgumentError):
        report.open()
    report.write(folder, FORMATS).open()
    assert opened == [(folder / "weight_ranges.html").as_uri()]
    assert "%231" in opened[0]
    assert str(report.path) in repr(report)


def test_a_notebook_shows_the_page_in_a_frame_that_holds_it_whole() -> None:
    report = make_report({'</iframe>"><img src=x onerror=alert(1)>': gaussian(4, 9), "b": gaussian(6, 5)})
    shown = report._repr_html_()
    match = re.fullmatch(r'<iframe srcdoc="([^"<>]*)"( [^<>]*)></iframe>', shown)
    assert match
    assert html.unescape(match[1]) == report.to_html()
    assert 'sandbox="' in match[2]
    assert "allow-same-origin" not in match[2]
    assert report.path is None


def test_the_same_model_gives_the_same_files(tmp_path: Path) -> None:
    for kind in KINDS:
        first, second = (visualize(kind, tmp_path / folder, formats=FORMATS) for folder in ("one", "other"))
        assert [path.read_bytes() for path in first.paths.values()] == [
            path.read_bytes() for path in second.paths.values()
        ]


@pytest.mark.parametrize("arguments", [(1,), (1, 2)])
def test_all_but_models_and_folder_are_given_by_name(arguments: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="positional arguments"):
        qvis.visualize_weight_ranges(make_model(), tmp_path, *arguments)  # type: ignore[misc]


# ---------------------------------------------------------------------------------------------------------------------
# Whole reports of a small model. "python -m pytest --update-golden" writes them anew; read the difference.


def pattern(channels: int, elements: int, factor: int) -> Any:
    """Weights from -1 to 1 without any random numbers or rounding, so that they are the same everywhere."""
    places = np.arange(channels * elements).reshape(channels, elements)
    return (((factor * places * places + 11 * places) % 129 - 64) / 64).astype(np.float32)


def golden_model(optimized: bool) -> dict[str, Any]:
    stem, wide, quiet = pattern(6, 9, 5), pattern(12, 8, 7), pattern(10, 8, 3)
    if not optimized:
        wide[2] *= 64
    quiet[[1, 4]] = 0
    quiet[7] /= 8192
    broken = pattern(3, 4, 9)
    broken[1, 2] = np.nan
    only = {"head": pattern(2, 5, 5)} if optimized else {"old|head": pattern(2, 5, 5)}
    return {
        "stem": stem,
        "blocks.0.wide": wide,
        "blocks.1.quiet": quiet,
        "scale": pattern(4, 1, 13),
        "broken": broken,
    } | only


def golden_report(kind: str) -> Report:
    if kind == KINDS[2]:
        comparison = compare(analysis(golden_model(False)), analysis(golden_model(True)))
        return Report(summarize_changes(comparison), comparison.layers)
    found = analysis(golden_model(False))
    return Report(summarize(found, kind), found.layers)


def rounded(value: Any) -> Any:
    """Numbers to six digits: the last ones depend on the processor."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value


@pytest.fixture
def check_golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compares text with a file of tests/golden, whatever the version of qvis."""

    def check(name: str, text: str) -> None:
        text = text.replace(f'"{qvis.__version__}"', '"VERSION"').replace(f"qvis {qvis.__version__}", "qvis VERSION")
        path = Path(__file__).parent / "golden" / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert text == path.read_text(encoding="utf-8")

    return check


@pytest.mark.parametrize("kind", KINDS[1:])
def test_reports_say_of_the_golden_model_what_they_always_said(
    kind: str, check_golden: Callable[[str, str], None]
) -> None:
    report = golden_report(kind)
    lists = re.compile(r"\[\s+((?:[^\[\]{}\"]+)?)\s*\]")  # arrays of numbers on one line each
    text = json.dumps(rounded(report.to_dict()), indent=1, ensure_ascii=False)
    check_golden(f"{kind}.json", lists.sub(lambda match: f"[{' '.join(match[1].split())}]", text) + "\n")
    check_golden(f"{kind}.md", report.to_markdown())


# ---------------------------------------------------------------------------------------------------------------------
# Where it is written


def test_folders_are_made(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b" / "größe 1"
    assert make_report().write(folder, "json").path == folder / "weight_ranges.json"
    assert list(files(folder)) == ["weight_ranges.json"]


def test_the_current_folder_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_report().write("", "json")
    make_report().write(".", "md")
    assert sorted(files(tmp_path)) == ["weight_ranges.json", "weight_ranges.md"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_report_replaces_an_earlier_one(name: str, tmp_path: Path) -> None:
    report = make_report().write(tmp_path, name)
    before = files(tmp_path)
    other = make_report({"other": gaussian(3, 4)}).write(tmp_path, name)
    assert other.path == report.path
    assert list(files(tmp_path)) == list(before)
    assert files(tmp_path) != before


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("content", [b"# my own notes\n", b"<!doctype html>", b"{}", b"\xff\x00", b" " * 5000])
def test_a_file_that_qvis_did_not_write_is_left_alone(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / f"weight_ranges.{name}").write_bytes(content)
    report = make_report()
    with pytest.raises(OutputError, match=r"^out_dir: '.*' was not written by qvis and is left alone; remove it or"):
        report.write(tmp_path, FORMATS)
    assert files(tmp_path) == {f"weight_ranges.{name}": content}
    assert report.path is None


@pytest.mark.parametrize(("written", "name"), [("html", "json"), ("json", "md"), ("md", "html")])
def test_a_report_in_one_format_is_no_report_in_another(written: str, name: str, tmp_path: Path) -> None:
    path = make_report().write(tmp_path, written).path
    assert path
    path.rename(tmp_path / f"weight_ranges.{name}")
    with pytest.raises(OutputError, match="was not written by qvis"):
        make_report().write(tmp_path, name)


@pytest.mark.parametrize("name", FORMATS)
def test_an_empty_file_holds_nothing_to_lose_and_is_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / f"weight_ranges.{name}").touch()
    path = make_report().write(tmp_path, name).path
    assert path
    assert path.stat().st_size > 0


def test_other_files_in_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("mine")
    (tmp_path / ".weight_ranges.html.old").write_text("mine")
    make_report().write(tmp_path, FORMATS)
    assert len(files(tmp_path)) == 5


def test_a_link_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    elsewhere = make_report({"other": gaussian(3, 4)}).write(tmp_path / "elsewhere", "json").path
    assert elsewhere
    before = elsewhere.read_bytes()
    link = tmp_path / "weight_ranges.json"
    link.symlink_to(elsewhere)
    make_report().write(tmp_path, "json")
    assert not link.is_symlink()
    assert elsewhere.read_bytes() == before != link.read_bytes()


@pytest.mark.parametrize("below", ["", "deeper", "deeper/still"])
def test_a_file_where_the_folder_should_be_is_an_error(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"^out_dir: '.*' is a file or lies below one, expected a folder$"):
        make_report().write(tmp_path / "file" / below)
    assert files(tmp_path) == {"file": b"mine"}


def test_a_folder_where_a_file_should_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "weight_ranges.md").mkdir()
    with pytest.raises(OutputError, match=r"^out_dir: '.*weight_ranges\.md' cannot be replaced: Is a directory$"):
        make_report().write(tmp_path, FORMATS)
    assert files(tmp_path) == {}


@pytest.mark.parametrize("folder", ["a" * 300, "null\0byte"])
def test_a_folder_with_an_impossible_name_is_an_error(folder: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"^out_dir: cannot make '.*': .+; choose another folder$"):
        make_report().write(tmp_path / folder)
    assert files(tmp_path) == {}


def failing(error: BaseException, after: int) -> Callable[..., Any]:
    """Something that does as ``os.replace`` for ``after`` calls, and then fails."""
    replace, calls = os.replace, iter(range(100))

    def fail(*arguments: Any, **options: Any) -> Any:
        if next(calls) >= after:
            raise error
        return replace(*arguments, **options)

    return fail


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", failing(PermissionError(errno.EACCES, "Permission denied"), 0))
    with pytest.raises(OutputError, match=r"cannot make '.*new': Permission denied; choose another folder$"):
        make_report().write(tmp_path / "new")
    assert files(tmp_path) == {}


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing.tempfile, "mkstemp", failing(PermissionError(errno.EACCES, "Permission denied"), 0))
    with pytest.raises(OutputError, match=r"cannot write '.*weight_ranges\.html': Permission denied; choose another"):
        make_report().write(tmp_path)
    assert files(tmp_path) == {}


@pytest.mark.parametrize("earlier", [False, True], ids=["in an empty folder", "over an earlier report"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_when_one_of_several_files_cannot_be_put_in_place_all_is_as_before(
    earlier: bool, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if earlier:
        make_report({"other": gaussian(3, 4)}).write(tmp_path, FORMATS)
    before, report = files(tmp_path), make_report()
    monkeypatch.setattr(os, "replace", failing(FULL, after))
    with pytest.raises(OutputError, match=rf"weight_ranges\.{FORMATS[after]}': No space left on device") as caught:
        report.write(tmp_path, FORMATS)
    assert caught.value.__cause__ is FULL
    assert files(tmp_path) == before
    assert report.path is None


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing_half_written(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "chmod", failing(error, 0))
    with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt):
        make_report().write(tmp_path, FORMATS)
    assert files(tmp_path) == {}


def test_an_interruption_between_two_files_puts_the_first_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_report({"other": gaussian(3, 4)}).write(tmp_path, "json")
    before = files(tmp_path)
    monkeypatch.setattr(os, "replace", failing(KeyboardInterrupt(), 1))
    with pytest.raises(KeyboardInterrupt):
        make_report().write(tmp_path, ("json", "md"))
    assert files(tmp_path) == before


@pytest.mark.parametrize("renderer", ["to_html", "to_json", "to_markdown"])
def test_when_one_format_cannot_be_made_none_is_written(
    renderer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Report, renderer, failing(RuntimeError("broken"), 0))
    with pytest.raises(RuntimeError, match="broken"):
        make_report().write(tmp_path, FORMATS)
    assert files(tmp_path) == {}


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_may_be_read_by_whom_the_umask_lets(mask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        report = make_report().write(tmp_path, FORMATS)
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in report.paths.values()} == {mode}


def test_names_that_no_file_can_hold_are_spelled_out(tmp_path: Path) -> None:
    found = analyze_network(
        replace(network({"a\ud800b": gaussian(3, 4)}, "m\udfff"), skipped=(Skipped("\ud800", "why"),))
    )
    report = Report(summarize(found, "weight_ranges"), found.layers).write(tmp_path, FORMATS)
    for path in report.paths.values():
        assert "a\\ud800b" in path.read_text(encoding="utf-8").replace("\\\\", "\\").replace("&#92;", "\\")
    document = report.to_dict()
    assert (document["model"]["name"], document["skipped"][0]["name"]) == ("m\\udfff", "\\ud800")


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, before anything is written


@pytest.mark.parametrize(
    ("formats", "got"),
    [("pdf", "'pdf'"), (("html", "xlsx"), "'xlsx'"), ((), "none"), ([], "none"), ("", "''"), (("HTML",), "'HTML'")],
)
def test_unknown_formats_are_refused(formats: Any, got: str, tmp_path: Path) -> None:
    with pytest.raises(BadArgumentError, match=rf"^formats: got {got}, expected some of 'html', 'json', 'md'$"):
        make_report().write(tmp_path / "new", formats)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("formats", ["md", ["md"], ("md", "md"), iter(["md"])])
def test_formats_may_be_one_word_or_several(formats: Any, tmp_path: Path) -> None:
    assert make_report().write(tmp_path, formats).path == tmp_path / "weight_ranges.md"
    assert list(files(tmp_path)) == ["weight_ranges.md"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"selected_layers": "conv9"}, UnknownLayerError, "^selected_layers: .*'conv9'"),
        ({"selected_layers": ["0", "9*"]}, UnknownLayerError, r"^selected_layers: .*'9\*'"),
        ({"selected_layers": []}, BadArgumentError, "^selected_layers: "),
        ({"bits": 1}, BadArgumentError, "^bits: got 1, "),
        ({"bits": "8"}, BadArgumentError, "^bits: got '8', "),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(
    kind: str, options: dict[str, Any], error: type[QvisError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        visualize(kind, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("wrong", [7, object(), nn.ReLU(), nn.Linear])
def test_what_is_no_model_is_refused_before_anything_is_written(wrong: Any, tmp_path: Path) -> None:
    for arguments in ((wrong,), (wrong, make_model()), (make_model(), wrong)):
        kind = KINDS[0] if len(arguments) == 1 else KINDS[2]
        with pytest.raises(UnsupportedModelError, match=r"^model: "):
            getattr(qvis, f"visualize_{kind}")(*arguments, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_comparison_without_a_common_layer_can_be_written(tmp_path: Path) -> None:
    comparison = compare(analysis({"a": gaussian(2, 3)}), analysis({"b": gaussian(2, 3)}))
    report = Report(summarize_changes(comparison), comparison.layers).write(tmp_path, FORMATS)
    assert sorted(files(tmp_path)) == [f"changes_after_optimization.{name}" for name in sorted(FORMATS)]
    assert report.layers == report.problematic_layers == []
