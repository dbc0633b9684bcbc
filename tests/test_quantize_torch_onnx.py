"""PyTorch models become quantized .onnx files: exported, their layers found again, and quantized by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qvis
from qvis import adapters
from qvis.adapters.digits import load_digits_model
from qvis.errors import BadArgumentError, UnsupportedModelError
from qvis.layers import Layer, Network
from qvis.quantization.backends.torch_onnx import widths_of
from qvis.quantization.methods import FLOAT
from qvis.running import Batch
from tests.onnx_models import pictures, run, sqnr

RANDOM = np.random.default_rng(0)


def layer(name: str, weight: np.ndarray, *aliases: str) -> Layer:
    return Layer(name, "Linear", weight.shape, "float32", lambda: weight, aliases=aliases)


def network(*layers: Layer) -> Network:
    return Network("net", "PyTorch", layers)


# ---------------------------------------------------------------------------------------------------------------------
# Names


def test_layers_are_found_by_name_by_their_numbers_and_by_their_module() -> None:
    own, gates = RANDOM.normal(size=(3, 4)), RANDOM.normal(size=(4, 3))
    original = network(
        layer("fc", own, "tied"), layer("lstm.weight_ih.i", gates), layer("att.q", own * 2), layer("att.k", own * 3)
    )
    exported = network(
        layer("tied", own),
        layer("val_7.W.i", gates.T),
        layer("att", np.zeros((12, 4))),
        layer("rest", np.zeros((2, 2))),
    )
    bits = {"fc": 4, "lstm.weight_ih.i": FLOAT, "att.q": 8, "att.k": 8}
    with pytest.raises(UnsupportedModelError, match="'rest' is made of layers of the widths 4, 8, 32"):
        widths_of(exported, original, bits)
    found = widths_of(network(*exported.layers[:3]), original, bits)
    assert found == {"tied": 4, "val_7.W.i": FLOAT, "att": 8}


def test_a_module_of_several_widths_is_refused() -> None:
    own = RANDOM.normal(size=(3, 4))
    original = network(layer("att.q", own), layer("att.k", own + 1))
    with pytest.raises(UnsupportedModelError, match="give the layers of that module the same width"):
        widths_of(network(layer("att", np.zeros((6, 4)))), original, {"att.q": 8, "att.k": 4})


# ---------------------------------------------------------------------------------------------------------------------
# Files


def accuracy(path: Path) -> float:
    x, digit = pictures()
    return float((run(path, x)[0].argmax(axis=1) == digit).mean())


@pytest.mark.parametrize("method", ["post_training", "weight_only", "quantization_aware"])
def test_the_digits_are_read_as_before(method: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    net = load_digits_model()
    x, digit = pictures()
    before = {name: one.clone() for name, one in net.state_dict().items()}
    state = torch.get_rng_state()
    data: dict[str, Any] = {
        "post_training": {"calibration_data": x[::10]},
        "weight_only": {"example_inputs": (1, 1, 8, 8), "bits": {"*": 8, "stem.conv": 4}, "exclude": "classifier"},
        "quantization_aware": {"train_data": (x[::10], digit[::10]), "epochs": 1},
    }[method]
    made = qvis.quantize(net, tmp_path / "digits.onnx", method, **data)
    assert capfd.readouterr() == ("", "")
    assert torch.equal(torch.get_rng_state(), state)
    assert not net.training
    assert all(torch.equal(before[name], one) for name, one in net.state_dict().items())
    with torch.no_grad():
        exact = float((net(torch.from_numpy(x)).argmax(dim=1).numpy() == digit).mean())
    assert abs(accuracy(made.path) - exact) < 0.01
    held = {one.name: one.dtype for one in adapters.read(made.path).layers}
    assert set(held) == {one.name for one in adapters.read(net).layers}
    if method == "weight_only":
        assert (held["stem.conv"], held["classifier"], held["head.conv"]) == ("int4", "float32", "int8")
    else:
        assert set(held.values()) == {"int8"}
        assert made.contents.leftovers == ()
        assert made.compression < 0.30
    assert [one.number for one in made.epochs] == ([0, 1] if method == "quantization_aware" else [])


class Reader(nn.Module):
    """Takes a nest of inputs, one of them by name alone, and returns another."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 12)
        self.lstm = nn.LSTM(12, 16, batch_first=True)
        self.fc = nn.Linear(16, 6)

    def forward(self, texts: dict[str, Tensor], *, offset: Tensor) -> dict[str, Tensor]:
        """Scores and what they are made of."""
        states, _ = self.lstm(self.words(texts["ids"]))
        return {"scores": self.fc(states[:, -1]).relu() + offset, "states": states}


def test_nested_inputs_and_gates_find_their_way(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Reader().eval()
    ids, offset = torch.randint(0, 30, (8, 5)), torch.randn(8, 6)
    batch = Batch(({"ids": ids},), {"offset": offset}, size=8)
    with torch.no_grad():
        exact = net({"ids": ids}, offset=offset)["scores"].numpy()
    wanted = {"post_training": {"calibration_data": [batch]}, "dynamic": {"example_inputs": batch}}
    for method, data in wanted.items():
        made = qvis.quantize(net, tmp_path / "net.onnx", method, **data)  # type: ignore[arg-type]
        found = run(made.path, ids.numpy(), offset.numpy())
        assert sqnr(exact, found[0]) > 25
        assert found[1].shape == (8, 5, 16)
    made = qvis.quantize(net, tmp_path / "net.onnx", "weight_only", example_inputs=batch, exclude="lstm")
    kinds = {one.name.partition(".")[0]: one.dtype for one in adapters.read(made.path).layers}
    assert kinds == {"words": "int8", "lstm": "float32", "fc": "int8"}


def test_without_inputs_a_module_cannot_be_followed(tmp_path: Path) -> None:
    with pytest.raises(BadArgumentError, match="example_inputs"):
        qvis.quantize(load_digits_model(), tmp_path / "digits.onnx", "weight_only")


def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        net[2].weight[0, 0] = torch.nan  # type: ignore[index]
    with pytest.raises(UnsupportedModelError, match="'2' holds NaN or infinite numbers"):
        qvis.quantize(net, tmp_path / "net.onnx", "weight_only", example_inputs=(2, 4))
    assert not list(tmp_path.iterdir())
