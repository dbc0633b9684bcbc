"""Models from a place in code and a file of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qvis import adapters
from qvis.adapters.factories import load
from qvis.errors import BadArgumentError

CODE = """
import helper
from torch import nn

class Net(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.head = nn.Linear(3, 2)

class Zoo:
    small = Net

ready = Net(width=4)

def make():
    return Net()

def needs(width):
    return Net(width)

def broken():
    raise ZeroDivisionError("a long\\nstory")

def leaves():
    raise SystemExit(3)

def tied():
    net = nn.ModuleDict({"embed": nn.Embedding(4, 2), "head": nn.Linear(2, 4, bias=False)})
    net["head"].weight = net["embed"].weight
    return net

def on_meta():
    return nn.Linear(2, 2, device="meta")

number = 3
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "models.py"
    path.write_text(CODE)
    (tmp_path / "helper.py").write_text("")
    monkeypatch.chdir(tmp_path)
    return path


def names(model: object) -> list[str]:
    return [layer.name for layer in adapters.read(model).layers]


@pytest.mark.parametrize("what", ["make", "Net", "Zoo.small", "ready"])
def test_a_file_gives_a_model_from_a_function_a_class_or_an_object(code: Path, what: str) -> None:
    assert names(load(f"{code}:{what}")) == ["conv", "head"]


def test_a_module_in_the_current_folder_is_found(code: Path) -> None:  # noqa: ARG001
    assert names(load("models:make")) == ["conv", "head"]


def test_a_module_that_is_installed_is_found() -> None:
    assert isinstance(load("torch.nn:Identity"), nn.Identity)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("models", "expected 'package.module:factory' or 'path/to/file.py:factory', not 'models'"),
        (":make", "expected"),
        ("models:", "expected"),
        ("nothing.py:make", "there is no file 'nothing.py'"),
        ("nothing_here.models:make", "there is no module 'nothing_here'"),
        ("models:mak", "there is no 'mak' in 'models:mak'; there is 'make'"),
        ("models:Zoo.big", "there is no 'big' in 'models:Zoo.big'; there is 'small'"),
        ("models:needs", "cannot be called without arguments .*'width'"),
        ("models:broken", "calling it, 'models:broken' failed with ZeroDivisionError: a long story"),
        ("models:leaves", "failed with SystemExit: 3"),
        ("wrong.py:make", "importing it, 'wrong.py:make' failed with SyntaxError"),
        ("lacking:make", "importing it, 'lacking:make' failed with ModuleNotFoundError: No module named 'not_there'"),
    ],
)
def test_code_that_gives_no_model_is_explained_in_one_line(code: Path, spec: str, message: str) -> None:
    (code.parent / "wrong.py").write_text("def")
    (code.parent / "lacking.py").write_text("import not_there")
    with pytest.raises(BadArgumentError, match=message) as caught:
        load(spec)
    assert "\n" not in str(caught.value)


def test_the_error_of_the_users_code_is_kept_as_the_cause(code: Path) -> None:
    with pytest.raises(BadArgumentError) as caught:
        load(f"{code}:broken")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.fixture
def state(code: Path) -> dict[str, Tensor]:
    model: Any = load(f"{code}:make")
    return {name: torch.full_like(tensor, 0.5) for name, tensor in model.state_dict().items()}


def assert_loaded(model: object) -> None:
    for layer in adapters.read(model).layers:
        np.testing.assert_array_equal(layer.weight, np.float32(0.5))


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth", "w.bin", "w.th"])
def test_weights_come_from_every_type_of_file(code: Path, state: dict[str, Tensor], name: str) -> None:
    save_file(state, name) if name.endswith(".safetensors") else torch.save(state, name)
    assert_loaded(load(f"{code}:make", name))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_checkpoints_of_training_are_unpacked(
    code: Path, state: dict[str, Tensor], key: str | None, prefix: str
) -> None:
    inner: dict[str, Any] = {prefix + name: tensor for name, tensor in state.items()}
    torch.save({"epoch": 3, key: inner} if key else inner, "w.pt")
    assert_loaded(load(f"{code}:make", Path("w.pt")))


def test_tied_weights_may_be_stored_once(code: Path) -> None:
    save_file({"embed.weight": torch.full((4, 2), 0.5)}, "w.safetensors")
    model = load(f"{code}:tied", "w.safetensors")
    assert_loaded(model)
    assert adapters.read(model).layers[0].aliases == ("head",)


def test_a_model_on_the_meta_device_takes_the_weights_of_the_file(code: Path) -> None:
    save_file({"weight": torch.full((2, 2), 0.5), "bias": torch.zeros(2)}, "w.safetensors")
    assert_loaded(load(f"{code}:on_meta", "w.safetensors"))


def test_weights_of_another_shape_are_named(code: Path, state: dict[str, Tensor]) -> None:
    state["conv.weight"] = torch.zeros(5, 1, 3, 3)
    torch.save(state, "w.pt")
    with pytest.raises(BadArgumentError, match=r"conv.weight is \(5, 1, 3, 3\), in the model \(3, 1, 3, 3\)"):
        load(f"{code}:make", "w.pt")


def test_missing_and_unexpected_weights_are_named(code: Path, state: dict[str, Tensor]) -> None:
    del state["head.bias"]
    state |= {f"extra{i}": torch.zeros(2) for i in range(6)}
    torch.save(state, "w.pt")
    message = "it lacks head.bias; the model has no extra0, extra1, extra2, extra3 and 2 more"
    with pytest.raises(BadArgumentError, match=message):
        load(f"{code}:make", "w.pt")


def test_a_whole_pickled_model_is_refused_with_the_way_out(code: Path) -> None:
    torch.save(nn.Linear(2, 2), "w.pt")
    with pytest.raises(BadArgumentError, match=r"reading that could run code.*save model.state_dict\(\)"):
        load(f"{code}:make", "w.pt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.pt", b"", "damaged"),
        ("w.pt", b"PK\x03\x04 nothing", "damaged"),
        ("w.pt", b"random text", "damaged"),
        ("w.safetensors", b"", "damaged"),
        ("w.safetensors", b"random text, long enough", "damaged"),
        ("w.npz", b"", "is of no type known here; give a file of type .safetensors"),
    ],
)
def test_a_file_that_holds_no_weights_is_explained(code: Path, name: str, content: bytes, message: str) -> None:
    Path(name).write_bytes(content)
    with pytest.raises(BadArgumentError, match=message) as caught:
        load(f"{code}:make", name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("held", "message"), [([1, 2], "holds a list"), ({"epoch": 3}, "no tensors, only 'epoch'")])
def test_a_file_of_something_else_is_explained(code: Path, held: object, message: str) -> None:
    torch.save(held, "w.pt")
    with pytest.raises(BadArgumentError, match=message):
        load(f"{code}:make", "w.pt")


def test_weights_need_a_file_and_a_module_to_go_to(code: Path, state: dict[str, Tensor]) -> None:
    with pytest.raises(BadArgumentError, match=r"'none\.pt' is no file"):
        load(f"{code}:make", "none.pt")
    torch.save(state, "w.pt")
    with pytest.raises(BadArgumentError, match="the model is a int"):
        load(f"{code}:number", "w.pt")
