"""What ``qvis.quantize`` checks before any quantizer is asked, and what it does around it."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qvis
from qvis.errors import BadArgumentError, OutputError, QvisError, UnknownLayerError, UnsupportedModelError
from qvis.quantization import quantize as module
from qvis.quantization.contents import Arithmetic, Contents, Operation
from qvis.quantization.methods import CELLS, FLOAT, METHODS, Epoch, Job, find_cell
from qvis.quantization.widths import read_widths

X = np.random.default_rng(0).normal(size=(12, 6)).astype(np.float32)
Y = np.arange(12) % 3
CONTENTS = Contents(
    (
        Operation("a", "linear", Arithmetic.INTEGER, "0"),
        Operation("b", "linear", Arithmetic.FLOAT, "2"),
        Operation("c", "reshape", Arithmetic.NONE),
    ),
    {"int8": 60, "float32": 20},
    100,
)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


@dataclass
class Fake:
    """A backend that writes down what it is asked."""

    refusal: Exception | None = None
    failure: Exception | None = None
    checked: list[Job] = field(default_factory=list)
    converted: list[Job] = field(default_factory=list)

    def check(self, job: Job) -> None:
        self.checked.append(job)
        if self.refusal:
            raise self.refusal

    def convert(self, job: Job, target: Path) -> tuple[Epoch, ...]:
        self.converted.append(job)
        target.write_bytes(b"half of it")
        if self.failure:
            raise self.failure
        target.with_name(f"{target.name}.data").write_bytes(b"beside")
        job.notes.append("something to know")
        return (Epoch(0, 2.0, 0.5), Epoch(1, 1.0, 0.75)) if job.training else ()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake()
    for cell in CELLS:
        monkeypatch.setitem(sys.modules, f"qvis.quantization.backends.{cell.backend}", made)  # type: ignore[arg-type]
    monkeypatch.setattr(module, "inspect", lambda _: CONTENTS)
    return made


def test_a_backend_gets_what_was_asked_for_and_its_file_takes_the_place(fake: Fake, tmp_path: Path) -> None:
    target = tmp_path / "net.pt2"
    target.write_bytes(b"older")
    made = qvis.quantize(net(), target, calibration_data=X, samples=10, batch_size=4, name="mine")
    (job,) = fake.converted
    assert fake.checked == [job]
    assert [batch.size for batch in job.calibration] == [4, 4, 2]
    assert job.bits == {"0": 8, "2": 8}
    assert (job.granularity, job.training, job.cell.backend) == ("channel", None, "pt2e")
    assert job.example is not None
    assert job.example.size == 2
    assert target.read_bytes() == b"half of it"
    assert (tmp_path / "net.pt2.data").read_bytes() == b"beside"
    assert len(list(tmp_path.iterdir())) == 2
    assert (made.path, made.name, made.samples) == (target, "mine", 10)
    assert made.notes == ("something to know",)
    assert made.float_bytes == 4 * (6 * 8 + 8 + 8 * 3 + 3)


@pytest.mark.usefixtures("fake")
def test_the_result_says_what_is_in_the_file(tmp_path: Path) -> None:
    made = qvis.quantize(net(), tmp_path / "net.pt2", calibration_data=X)
    assert made.contents.integer_operations == 1 / 2
    assert made.contents.integer_bytes == 60 / 80
    assert [one.layer for one in made.contents.leftovers] == ["2"]
    assert made.compression == 80 / made.float_bytes
    assert made.verdict == (
        "80 bytes of numbers, 24 % of the float model; 75 % of the bytes are integers, and 1 of 2 operations compute "
        "with integers. With floats: 2."
    )
    document = json.loads(json.dumps(made.to_dict()))
    assert document["integer_operations_share"] == 0.5
    assert document["operations"][1] == {"name": "b", "kind": "linear", "arithmetic": "float", "layer": "2"}


def test_training_gets_its_data_and_settings_and_tells_how_it_went(fake: Fake, tmp_path: Path) -> None:
    made = qvis.quantize(
        net(),
        tmp_path / "net.pt2",
        "quantization_aware",
        train_data=(X, Y),
        epochs=7,
        learning_rate=1e-3,
        batch_size=5,
        seed=3,
        loss="mse",
    )
    training = fake.converted[0].training
    assert training is not None
    assert (training.epochs, training.learning_rate, training.batch_size, training.seed) == (7, 1e-3, 5, 3)
    assert training.loss == "mse"
    np.testing.assert_array_equal(np.concatenate([batch.labels for batch in training.batches]), Y)
    assert [one.accuracy for one in made.epochs] == [0.5, 0.75]


def test_widths_come_by_number_by_name_and_out_of_a_file(fake: Fake, tmp_path: Path) -> None:
    def widths(bits: Any = None, exclude: Any = ()) -> Any:
        qvis.quantize(net(), tmp_path / "net.pt2", calibration_data=X, bits=bits, exclude=exclude)
        return fake.converted[-1].bits

    assert widths(4) == {"0": 4, "2": 4}
    assert widths({"2": 3}) == {"0": 8, "2": 3}
    assert widths({"*": 3, "2": 5}, exclude="0") == {"0": FLOAT, "2": 5}
    mixed = qvis.bit_widths(net(), X, average_bits=4, bits=(8, 4, 2), samples=8)
    mixed.export(tmp_path / "widths.json")
    assert widths(tmp_path / "widths.json") == mixed.bits
    (tmp_path / "plain.json").write_text('{"0": null, "2": 6}')
    assert widths(str(tmp_path / "plain.json")) == {"0": FLOAT, "2": 6}


def test_equalizing_comes_first_and_is_told(fake: Fake, tmp_path: Path) -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[::2] *= 40
        model[0].bias[::2] *= 40
        model[2].weight[:, ::2] /= 40
    made = qvis.quantize(model, tmp_path / "net.pt2", calibration_data=X, equalize=True, granularity="tensor")
    assert made.equalization is not None
    assert made.equalization.accepted
    assert fake.converted[0].model is made.equalization.model
    assert "equalized" in made.to_dict()


def test_the_model_itself_stays_where_equalizing_does_not_help(fake: Fake, tmp_path: Path) -> None:
    model = nn.Linear(6, 3)
    made = qvis.quantize(model, tmp_path / "net.pt2", calibration_data=X, equalize=True)
    assert made.equalization is not None
    assert not made.equalization.accepted
    assert fake.converted[0].model is model


REFUSED = [
    ({"method": "int9"}, "method: got 'int9', expected one of weight_only"),
    ({"method": "int16x8"}, "method: 'int16x8' is not for PyTorch models, which have weight_only, dynamic"),
    (
        {"output": "net.tflite"},
        "output: a PyTorch model is quantized to .safetensors or .pt2 or .onnx, not to .tflite",
    ),
    ({"output": "net"}, "output: a PyTorch model is quantized to .* not to a file without a suffix"),
    ({"output": "net.safetensors"}, "output: post_training of a PyTorch model is written as .pt2 or .onnx, not as"),
    ({"calibration_data": None}, "calibration_data: post_training finds the ranges .* without: weight_only, dynamic"),
    ({"method": "quantization_aware"}, "train_data: quantization_aware trains, and got none"),
    ({"train_data": (X, Y)}, "train_data: post_training trains nothing; leave it out"),
    ({"epochs": -1}, "epochs: got -1, expected a whole number of 0 or more"),
    ({"batch_size": True}, "batch_size: got True, expected a whole number of 1"),
    ({"learning_rate": 0}, "learning_rate: got 0, expected a number above 0"),
    ({"learning_rate": "fast"}, "learning_rate: got 'fast', expected a number"),
    ({"granularity": "row"}, "granularity: got 'row', and post_training to .pt2 has 'channel' or 'tensor'"),
    ({"bits": 16}, "bits: got 16, and post_training to .pt2 holds 2 or 3"),
    ({"bits": {"0": True}}, "bits: '0' has True"),
    ({"bits": {"0": 9}}, "bits: '0' has 9, and .* or 32 for float"),
    ({"bits": {"conv": 4}}, "bits: no layer matches 'conv'"),
    ({"exclude": "conv"}, "exclude: no layer matches 'conv'"),
    ({"exclude": "*"}, "bits: every layer would stay in float"),
    ({"bits": "nowhere.json"}, "bits: 'nowhere.json' cannot be read"),
    ({"calibration_data": np.full((4, 6), np.nan, np.float32)}, "calibration_data: sample 0 holds NaN"),
    ({"calibration_data": X[:0]}, "calibration_data: its shape is"),
    ({"calibration_data": "nowhere.npz"}, "calibration_data: there is no"),
    (
        {"method": "quantization_aware", "train_data": (X, np.full(12, np.nan)), "calibration_data": None},
        "train_data: labels hold NaN or infinite values",
    ),
    ({"method": "quantization_aware", "train_data": (X, Y[:5])}, "labels: it has 5 samples and train_data has 12"),
]


@pytest.mark.parametrize(("wrong", "message"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_cannot_be_done_is_refused_by_name_and_nothing_is_written(
    fake: Fake, tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    asked = {"output": "net.pt2", "method": "post_training", "calibration_data": X, **wrong}
    with pytest.raises(QvisError, match=message) as caught:
        qvis.quantize(net(), tmp_path / asked.pop("output"), **asked)
    assert isinstance(caught.value, (BadArgumentError, UnknownLayerError))
    assert "\n" not in str(caught.value)
    assert fake.converted == []
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_widths_are_refused(tmp_path: Path) -> None:
    for text, message in (
        ("no json", "is no JSON"),
        ("[1]", "holds no widths"),
        ('{"layers": 3, "format": "qvis bit widths"}', "holds no"),
    ):
        (tmp_path / "w.json").write_text(text)
        with pytest.raises(BadArgumentError, match=message):
            read_widths(tmp_path / "w.json")


def test_the_output_must_be_a_file_that_can_be_written(fake: Fake, tmp_path: Path) -> None:
    (tmp_path / "folder.pt2").mkdir()
    for output, message in (("folder.pt2", "is a folder"), ("missing/net.pt2", "a folder that does not exist")):
        with pytest.raises(OutputError, match=message):
            qvis.quantize(net(), tmp_path / output, calibration_data=X)
    program = torch.export.export(net(), (torch.from_numpy(X),))
    torch.export.save(program, tmp_path / "net.pt2")
    with pytest.raises(OutputError, match="is the model itself"):
        qvis.quantize(tmp_path / "net.pt2", tmp_path / "net.pt2", calibration_data=X)
    assert fake.checked == []


def test_models_that_cannot_be_run_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(net().state_dict(), tmp_path / "net.safetensors")
    with pytest.raises(QvisError, match="can be read, but not run; give the model itself"):
        qvis.quantize(tmp_path / "net.safetensors", tmp_path / "net.pt2", calibration_data=X)
    with pytest.raises(UnsupportedModelError, match="cannot read"):
        qvis.quantize(object(), tmp_path / "net.pt2", calibration_data=X)


@pytest.mark.usefixtures("fake")
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(QvisError, match=r'needs torchao; install what is missing with: pip install "qvis\[quantize\]"'):
        qvis.quantize(net(), tmp_path / "net.pt2", calibration_data=X)


def test_a_refusal_of_the_backend_comes_before_anything_is_written(fake: Fake, tmp_path: Path) -> None:
    fake.refusal = UnsupportedModelError("model: not this one")
    with pytest.raises(UnsupportedModelError, match="not this one"):
        qvis.quantize(net(), tmp_path / "net.pt2", calibration_data=X)
    assert fake.converted == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (RuntimeError("it broke\nhere"), "cannot be quantized by post_training to .pt2 .RuntimeError: it broke here."),
        (OSError(28, "No space left on device"), "cannot be written: No space left on device"),
    ],
)
def test_a_quantizer_that_fails_leaves_what_was_there(
    fake: Fake, tmp_path: Path, failure: Exception, message: str
) -> None:
    (tmp_path / "net.pt2").write_bytes(b"older")
    fake.failure = failure
    with pytest.raises(QvisError, match=message):
        qvis.quantize(net(), tmp_path / "net.pt2", calibration_data=X)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"older"]


def test_every_method_is_a_cell_of_some_framework_and_says_what_it_does() -> None:
    assert {cell.method for cell in CELLS} == set(METHODS)
    for cell in CELLS:
        assert find_cell(cell.framework, cell.method, cell.suffix) is cell


def test_names_in_the_public_namespace() -> None:
    assert qvis.QuantizedModel.__module__ == "qvis.quantization.result"
    assert SimpleNamespace(q=qvis.quantize).q is module.quantize
