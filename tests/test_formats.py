"""One model in several formats: the same layers, numbers and pairs, whatever the file is called."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import qvis
from qvis.adapters.digits import load_digits_model
from qvis.analysis import analyze
from qvis.analysis.matching import match_layers
from qvis.cli import main
from qvis.layers import Analysis
from tests import keras_models
from tests.browser import opened, part, points, show, shown_rows

if TYPE_CHECKING:
    from playwright.sync_api import Browser

keras = keras_models.require()
pytestmark = keras_models.QUIET
Files = Callable[[str], Path]

KERAS = {
    "stem": "digits_1/stem_1",
    "depthwise": "digits_1/depthwise_1",
    "separable/depthwise_kernel": "digits_1/separable_1",
    "separable/pointwise_kernel": "digits_1/separable_1#2",
    "head": "digits_1/head_1",
}
"""The layers of the Keras model, and what the converter to TensorFlow Lite makes of their names."""
KERAS_FILES = ("a.keras", "a.h5", "a.weights.h5", "a.onnx", "a.tflite")
TORCH_FILES = ("pt", "safetensors", "pt2", "onnx")
STATISTICS = ("min", "q25", "q50", "mean", "q75", "max", "std", "range", "relative_range")


class Tokens(nn.Module):
    """Token indices (batch, 7) through an embedding, and grouped and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.grouped = nn.Conv1d(6, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose1d(8, 4, 2, stride=2)
        self.up_grouped = nn.ConvTranspose1d(4, 6, 2, groups=2)
        self.linear = nn.Linear(6, 3)

    def forward(self, indices: Tensor) -> Tensor:
        hidden = self.up(self.grouped(self.embedding(indices).transpose(1, 2)))
        return self.linear(torch.relu(self.up_grouped(hidden)).mean(2))


def make_tokens() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Tokens().eval()


TORCH = {
    "digits": (load_digits_model, torch.zeros(2, 1, 8, 8)),
    "tokens": (make_tokens, torch.zeros(2, 7, dtype=torch.long)),
}
"""How to make each torch model, and an input for it."""


@cache
def folded() -> Any:
    """The Keras model with its BatchNorm, which follows ``stem``, folded into it by hand."""
    model = keras.models.clone_model(keras_models.digits())
    model.set_weights(keras_models.digits().get_weights())
    norm = next(layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization))
    gamma, beta, mean, variance = norm.get_weights()
    scale = gamma / np.sqrt(variance + norm.epsilon)
    stem = model.get_layer("stem")
    stem.set_weights([stem.get_weights()[0] * scale])
    norm.set_weights([np.ones_like(gamma), beta - mean * scale, np.zeros_like(mean), np.full_like(variance, 1)])
    return model


def write(name: str, path: Path) -> None:
    """Write a model in the format that the end of its name says."""
    model, _, ending = name.partition(".")
    if model in TORCH:
        make, example = TORCH[model]
        net = make()
        if ending == "pt":
            torch.save(net.state_dict(), path)
        elif ending == "safetensors":
            save_file(net.state_dict(), path)
        elif ending == "pt2":
            torch.export.save(torch.export.export(net, (example,)), path)
        else:
            torch.onnx.export(net, (example,), path, dynamo=True, verbose=False, external_data=False)
        return
    trained = keras_models.digits()
    if ending == "weights.h5":
        trained.save_weights(path)
    elif ending == "onnx":
        pytest.importorskip("tf2onnx")
        trained.export(path, format="onnx", verbose=False)
    elif ending == "tflite":
        path.write_bytes(converter(quantized=model == "int8").convert())
    else:
        trained.save(path)


def converter(*, quantized: bool) -> Any:
    """What turns the Keras model into a file of TensorFlow Lite."""
    import tensorflow as tf
    from sklearn.datasets import load_digits

    made = tf.lite.TFLiteConverter.from_keras_model(keras_models.digits())
    if quantized:
        images = (load_digits().images[:20, None, :, :, None] / 16).astype("f4")
        made.optimizations = [tf.lite.Optimize.DEFAULT]
        made.representative_dataset = lambda: ([image] for image in images)
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Writes each file when it is first asked for."""
    folder = tmp_path_factory.mktemp("formats")

    @cache
    def file(name: str) -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the exporters say
            write(name, folder / name)
        return folder / name

    return file


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pairs_of(one: Analysis, other: Analysis) -> Iterator[tuple[str, str]]:
    """Names of the layers that are matched, whose statistics must be the same to 1e-6."""
    for before, after in match_layers(one, other)[0]:
        for name in STATISTICS:
            expected, found = getattr(before.statistics, name), getattr(after.statistics, name)
            largest = float(np.nanmax(np.abs(before.statistics.peak))) if name != "relative_range" else 0
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * largest, err_msg=f"{after.name} {name}")
        yield before.name, after.name


# ---------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("name", KERAS_FILES)
def test_a_trained_keras_model_has_the_same_statistics_in_every_format(name: str, files: Files) -> None:
    # Both converters fold the BatchNorm into the convolution before it, and leave everything else.
    model = folded() if name.endswith(("onnx", "tflite")) else keras_models.digits()
    one, other = analyze(model, fold=False), analyze(files(name), fold=False)
    assert match_layers(one, other)[1] == []
    pairs = dict(pairs_of(one, other))
    assert set(pairs) == set(KERAS)
    if name.endswith("tflite"):
        assert pairs == KERAS
    elif not name.endswith("onnx"):
        assert all(before == after for before, after in pairs.items())


@pytest.mark.parametrize("model", TORCH)
@pytest.mark.parametrize("ending", TORCH_FILES)
def test_a_torch_model_has_the_same_statistics_in_every_format(model: str, ending: str, files: Files) -> None:
    # The exporter to ONNX folds each BatchNorm into the convolution before it.
    live = load_digits_model(folded=True) if (model, ending) == ("digits", "onnx") else TORCH[model][0]()
    one = analyze(live, fold=False)
    bare = ending in ("pt", "safetensors")
    # A checkpoint does not say that a kernel is transposed, and no axis alone is that of one with groups.
    axes = {"up": 1} if bare and model == "tokens" else None
    other = analyze(files(f"{model}.{ending}"), channel_axis=axes, fold=False)
    unmatched = {left.name for left in match_layers(one, other)[1]}
    assert unmatched == ({"up_grouped"} if bare and model == "tokens" else set())
    pairs = dict(pairs_of(one, other))
    assert set(pairs) == {layer.name for layer in one.layers} - unmatched
    assert all(before == after for before, after in pairs.items())


# ---------------------------------------------------------------------------------------------- qvis report

DISGUISES = {
    "a.keras": "zip",
    "a.h5": "dat",
    "a.weights.h5": "bin",
    "a.onnx": "dat",
    "a.tflite": "bin",
    "digits.pt": "weights",
    "digits.safetensors": "bin",
    "digits.pt2": "zip",
    "digits.onnx": "pt",
}
"""What each file is called that is not called by its format."""


@pytest.mark.parametrize("disguised", [False, True], ids=["named", "disguised"])
@pytest.mark.parametrize("name", DISGUISES)
def test_report_reads_each_format_by_its_content(
    name: str, disguised: bool, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    path = f"model.{DISGUISES[name]}" if disguised else name
    shutil.copy(files(name), path)
    capsys.readouterr()
    assert main(["report", path, "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert len(layers) == (18 if name.startswith("digits") else len(KERAS))
    page = Path("qvis-report/relative_weight_ranges.html").read_text(encoding="utf-8")
    assert page.count('data-test="layer-row"') == len(layers)
    assert all(f'title="{layer["name"]}"' in page for layer in layers)


# ---------------------------------------------------------------------------------------------- qvis compare


def compare(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[Any, str]:
    """The document of a comparison, and its page."""
    capsys.readouterr()
    assert main(["compare", *map(str, arguments), "--json"]) == 0
    page = Path("qvis-report/changes_after_optimization.html").read_text(encoding="utf-8")
    return json.loads(capsys.readouterr().out), page


@pytest.mark.parametrize("kind", ["a", "int8"])
def test_a_keras_model_is_compared_with_its_conversion(
    kind: str, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    document, page = compare(capsys, files("a.keras"), files(f"{kind}.tflite"))
    assert {layer["name_before"]: layer["name"] for layer in document["layers"]} == KERAS
    assert document["unmatched"] == []
    for before, after in KERAS.items():
        assert f'title="{after}"' in page
        assert f">was {before}<" in page


def test_what_cannot_be_matched_is_named(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="stranger")]).save("b.keras")
    document, page = compare(capsys, "b.keras", files("a.tflite"))
    assert document["layers"] == []
    reasons = {left["name"]: left["reason"] for left in document["unmatched"]}
    assert set(reasons) == {"stranger", *KERAS.values()}
    assert all("weights like these" in reason for reason in reasons.values())
    assert all(name in page for name in reasons)


def test_a_wide_terminal_and_markdown_show_both_names(
    files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    capsys.readouterr()
    assert main(["compare", str(files("a.keras")), str(files("a.tflite")), "--format", "md"]) == 0
    for text in (capsys.readouterr().out, Path("qvis-report/changes_after_optimization.md").read_text("utf-8")):
        row = next(line for line in text.splitlines() if "digits_1/head_1" in line)
        assert " head " in row


@pytest.mark.browser
@pytest.mark.parametrize("kind", ["a", "int8"])
def test_the_page_of_two_formats_shows_both_names_and_versions(kind: str, files: Files, browser: Browser) -> None:
    changes = qvis.visualize_changes_after_optimization(files("a.keras"), files(f"{kind}.tflite"), Path("out"))
    with opened(browser, changes.path.resolve()) as page:
        for before, after in KERAS.items():
            show(page, after)
            row = part(page, "layer-row").filter(has=page.locator(f'a[title="{after}"]'))
            assert row.locator("[data-test=name-before]").inner_text() == f"was {before}"
            assert f"before: {before}" in page.locator(".detail-meta").inner_text()
            columns = points(page, "ranges", type="Scatter", y="mean")
            layer = next(change for change in changes.layers if change.name == after)
            assert len(columns["before_min"]) == len(columns["min"]) == layer.statistics.min.size
        part(page, "filter").fill("pointwise_kernel")
        assert shown_rows(page) == [KERAS["separable/pointwise_kernel"]]


def test_a_factory_is_compared_with_the_file_exported_from_it(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    Path("net.py").write_text("from qvis.adapters.digits import load_digits_model as model\n")
    document, page = compare(capsys, "net.py:model", files("digits.onnx"))
    names = [layer["name"] for layer in document["layers"]]
    assert len(names) == 18
    assert [layer["name_before"] for layer in document["layers"]] == names
    assert document["unmatched"] == []
    assert 'data-test="name-before"' not in page
