"""Equalizing whole models: the function stays, rounding does less damage, and it is said whether it was worth it."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import qvis
from qvis.adapters.digits import load_digits_model, load_digits_samples
from qvis.cli import main
from qvis.errors import BadArgumentError, NotRunnableError, QvisError

SAMPLES = 16


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return load_digits_samples()[0][:SAMPLES]


@pytest.fixture(scope="module")
def equalized(pictures: np.ndarray) -> qvis.Equalization:
    return qvis.equalize(load_digits_model(), pictures, probes=1)


class Uneven(nn.Module):
    """Three convolutions, one of them depthwise, whose channels differ in size a hundredfold, and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.last = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 3)
        with torch.no_grad():
            self.norm.weight.copy_(torch.logspace(-1, 1, 8))
            self.norm.running_var.uniform_(0.5, 2)
            self.norm.bias.normal_()
            self.depthwise.weight.mul_(torch.logspace(1, -1, 8)[:, None, None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.depthwise(x))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


def uneven() -> nn.Module:
    return Uneven().eval()


def run(model: nn.Module, pictures: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor(pictures))


def test_the_equalized_model_computes_the_same(equalized: qvis.Equalization, pictures: np.ndarray) -> None:
    own, new = run(load_digits_model(), pictures), run(equalized.model, pictures)
    assert float((own - new).abs().max() / own.abs().max()) < 1e-5
    assert equalized.verification.relative < 1e-5


def test_rounding_it_does_far_less_damage_measured_by_hand(equalized: qvis.Equalization, pictures: np.ndarray) -> None:
    def damage(model: nn.Module) -> float:
        rounded = copy.deepcopy(model)
        with torch.no_grad():
            for module in rounded.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    step = module.weight.abs().max() / 127
                    module.weight.copy_((module.weight / step).round() * step)
        exact = run(model, pictures)
        return float((run(rounded, pictures) - exact).square().sum() / exact.square().sum())

    assert equalized.accepted
    assert damage(equalized.model) < damage(load_digits_model(folded=True)) / 30
    assert equalized.verification.gain_db(8, "tensor") > 15
    before, after = equalized.verification.sqnr_db(8, "tensor")
    assert after - before == pytest.approx(equalized.verification.gain_db(8, "tensor"))
    assert "worth it" in equalized.verdict


def test_channels_are_scaled_through_residual_additions_and_depthwise_convolutions(
    equalized: qvis.Equalization,
) -> None:
    names = [(pair.producers, pair.consumers) for pair in equalized.pairs]
    assert (("blocks.0.expand",), ("blocks.0.depthwise",)) in names
    assert any(len(producers) > 1 for producers, _ in names)
    assert all(pair.scales.min() > 0 for pair in equalized.pairs)


def test_the_given_model_stays_as_it_is(pictures: np.ndarray) -> None:
    model = Uneven().train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    qvis.equalize(model, pictures)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_in_place_the_given_model_itself_is_equalized(pictures: np.ndarray) -> None:
    model = uneven()
    own = run(model, pictures)
    weight = model.get_parameter("depthwise.weight").detach().clone()
    result = qvis.equalize(model, pictures, inplace=True)
    assert result.model is model
    assert not torch.equal(weight, model.get_parameter("depthwise.weight"))
    assert float((own - run(model, pictures)).abs().max() / own.abs().max()) < 1e-5


def test_the_rule_of_the_paper_helps_as_well_and_no_data_is_needed(pictures: np.ndarray) -> None:
    rule = qvis.equalize(uneven(), pictures, method="square root")
    assert rule.accepted
    made_up = qvis.equalize(uneven(), example_inputs=(1, 1, 8, 8), samples=16)
    assert made_up.verification.source == "made-up inputs"
    assert made_up.verification.gain_db() > 3
    assert rule.verification.gain_db() > 3


def test_a_model_without_a_place_to_scale_is_left_alone_and_told_why() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 3)).eval()
    result = qvis.equalize(model, np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32))
    assert not result.accepted
    assert result.pairs == []
    assert result.verdict.startswith("Nothing was equalized")
    assert [skipped.name for skipped in result.skipped] == ["0 -> 2"]
    assert "sigmoid" in result.skipped[0].reason


def test_what_would_make_it_worse_is_left_out(pictures: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    from qvis.equalization import work as module
    from qvis.equalization.scales import assess_scales

    def bad(count: int, layers, inputs, bits: int, granularity: str, **_: object):  # type: ignore[no-untyped-def]
        return assess_scales(anything(count), layers, inputs, bits, granularity)

    def anything(count: int, *_: object, **__: object) -> np.ndarray:
        return np.random.default_rng(0).normal(0, 3, count)

    monkeypatch.setattr(module, "optimal_scales", bad)
    monkeypatch.setattr(module, "square_root_scales", anything)
    result = qvis.equalize(uneven(), pictures, granularity="channel")
    assert not result.accepted
    assert result.verdict.startswith("Not worth it, and left out")
    assert torch.allclose(run(uneven(), pictures), run(result.model, pictures), atol=1e-5)


def test_an_onnx_file_is_equalized_and_saved(tmp_path: Path, pictures: np.ndarray) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    source, target = tmp_path / "net.onnx", tmp_path / "equalized.onnx"
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter's own
        example = (torch.tensor(pictures[:2]),)
        torch.onnx.export(uneven(), example, source, dynamo=True, dynamic_shapes=({0: "n"},), verbose=False)
    result = qvis.equalize(source, pictures)
    result.save(target)
    outputs = [onnxruntime.InferenceSession(path).run(None, {"x": pictures})[0] for path in (source, target)]
    assert np.abs(outputs[0] - outputs[1]).max() / np.abs(outputs[0]).max() < 1e-5
    assert result.verification.gain_db() > 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"granularity": "row"}, "granularity: got 'row'"),
        ({"method": "magic"}, "method: got 'magic'"),
        ({"bits": 1}, "bits"),
        ({"inputs": None}, "inputs: got none"),
    ],
)
def test_wrong_arguments_are_named(pictures: np.ndarray, arguments: dict, words: str) -> None:
    given = {"inputs": pictures[:2], **arguments}
    with pytest.raises(BadArgumentError, match=words):
        qvis.equalize(uneven(), **given)


def test_a_bare_checkpoint_is_refused_with_the_way_out(tmp_path: Path, pictures: np.ndarray) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "weights.safetensors"
    save_file(load_digits_model().state_dict(), path)
    with pytest.raises((NotRunnableError, QvisError), match=r"checkpoint|weights"):
        qvis.equalize(path, pictures[:2])


def test_the_report_shows_what_it_brought(equalized: qvis.Equalization, tmp_path: Path) -> None:
    report = equalized.write(tmp_path, ("html", "json"))
    document = report.to_dict()
    assert document["equalization"]["verdict"] == equalized.verdict
    assert len(document["equalization"]["pairs"]) == len(equalized.pairs)
    text = (tmp_path / "changes_after_optimization.html").read_text(encoding="utf-8")
    assert equalized.verdict in text
    assert "blocks.0.expand" in text


def test_the_command_writes_the_model_and_says_whether_it_was_worth_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pictures: np.ndarray
) -> None:
    data, output = tmp_path / "data.npz", tmp_path / "equalized.safetensors"
    np.savez(data, x=pictures)
    (tmp_path / "net.py").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    model = f"{tmp_path / 'net.py'}:uneven"
    assert main(["equalize", model, "--data", str(data), "--output", str(output), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accepted"] is True
    assert output.is_file()
    content = output.read_bytes()
    assert main(["equalize", str(output), "--data", str(data), "--output", str(output)]) == 2
    assert "is the model itself" in capsys.readouterr().err
    assert output.read_bytes() == content
    assert main(["equalize", model]) == 2
    assert "--data: needed" in capsys.readouterr().err


def test_the_command_takes_the_options_and_offers_multiplications(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.npz"
    np.savez(data, x=np.random.default_rng(0).standard_normal((32, 5, 6)).astype(np.float32))
    text = (Path(__file__).parent / "test_equalization_corrections.py").read_text(encoding="utf-8")
    (tmp_path / "net.py").write_text(f"{text}\n\ndef made():\n    return Block().eval()\n", encoding="utf-8")
    model = f"{tmp_path / 'net.py'}:made"
    report = ["--report", str(tmp_path / "review")]
    assert main(["equalize", model, "--data", str(data), *report]) == 0
    printed = capsys.readouterr().out
    assert "A multiplication inserted by --multiply would help:\n  down: " in printed
    page = (tmp_path / "review" / "changes_after_optimization.html").read_text(encoding="utf-8")
    assert 'data-test="equalization-offers"' in page
    options = ["--multiply", "offered", "--correct-biases", "inputs", "--replace-relu6", "--json"]
    assert main(["equalize", model, "--data", str(data), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [step["kind"] for step in found["steps"]] == ["ReLU6", "bias correction"]
    assert any(not pair["producers"] for pair in found["pairs"])
    assert main(["equalize", model, "--data", str(data), "--absorb-biases"]) == 2
    assert "absorb_biases" in capsys.readouterr().err


def test_the_command_scales_unseen_by_the_rule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.py").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    assert (
        main(["equalize", f"{tmp_path / 'net.py'}:uneven", "--method", "square-root", "--report", str(tmp_path)]) == 0
    )
    assert "unseen" in capsys.readouterr().out
    page = (tmp_path / "changes_after_optimization.html").read_text(encoding="utf-8")
    assert 'data-test="equalization"' in page
    assert 'data-test="equalization-kept"' not in page


def test_a_model_is_never_saved_over_the_file_that_it_came_from(tmp_path: Path, pictures: np.ndarray) -> None:
    from qvis.errors import OutputError

    path = tmp_path / "net.pt2"
    torch.export.save(
        torch.export.export(uneven(), (torch.tensor(pictures[:2]),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)),
        path,
    )
    found = qvis.equalize(path, pictures)
    with pytest.raises(OutputError, match="is the file that the model came from"):
        found.save(path)
    found.save(tmp_path / "new.pt2")
    new = torch.export.load(tmp_path / "new.pt2").module()(torch.tensor(pictures)).detach()
    assert torch.allclose(new, run(uneven(), pictures), atol=1e-4)
    module = qvis.equalize(uneven(), pictures)
    module.save(tmp_path / "module.pt2")  # exported with a sample that it was run on
    assert (tmp_path / "module.pt2").exists()
