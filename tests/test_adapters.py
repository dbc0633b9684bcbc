"""How a model finds its adapter, and how layers are selected."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from qvis import adapters
from qvis.errors import BadArgumentError, UnknownLayerError, UnsupportedModelError
from qvis.layers import Layer, Network


@pytest.fixture
def model() -> nn.Module:
    attention = nn.MultiheadAttention(4, 1)
    model = nn.ModuleDict(
        {
            "conv1": nn.Conv2d(1, 2, 3),
            "Conv2": nn.Conv2d(2, 2, 3),
            "block": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
            "attn": attention,
            "embed": nn.Embedding(5, 2),
            "head": nn.Linear(2, 5, bias=False),
        }
    )
    model["head"].weight = model["embed"].weight
    return model


ATTENTION = ["attn.in_proj_weight.q", "attn.in_proj_weight.k", "attn.in_proj_weight.v", "attn.out_proj"]


@pytest.mark.parametrize(
    ("selected", "expected"),
    [
        (["conv1"], ["conv1"]),
        ("conv1", ["conv1"]),
        (["head"], ["embed"]),
        (["attn"], ATTENTION),
        (["attn.in_proj_weight"], ATTENTION[:3]),
        (["block"], ["block.0", "block.1"]),
        (["conv*"], ["conv1"]),
        (["[cC]onv?"], ["conv1", "Conv2"]),
        (["*.0"], ["block.0"]),
        (["h*"], ["embed"]),
        (["embed", "block.1", "conv1", "conv1"], ["conv1", "block.1", "embed"]),
        (("*",), ["conv1", "Conv2", "block.0", "block.1", *ATTENTION, "embed"]),
    ],
)
def test_selected_layers_are_names_modules_or_patterns(model: nn.Module, selected: Any, expected: list[str]) -> None:
    assert [layer.name for layer in adapters.read(model, selected).layers] == expected


def test_a_name_with_brackets_is_taken_as_it_is() -> None:
    model = nn.ModuleDict({"layer[0]": nn.Linear(2, 2), "layer0": nn.Linear(2, 2)})
    assert [layer.name for layer in adapters.read(model, ["layer[0]"]).layers] == ["layer[0]"]
    assert [layer.name for layer in adapters.read(model, ["layer[1-9]", "layer0"][1:]).layers] == ["layer0"]


def test_an_unknown_layer_is_answered_with_near_names(model: nn.Module) -> None:
    with pytest.raises(UnknownLayerError, match=r"selected_layers: no layer matches 'con1'; did you mean 'conv1'"):
        adapters.read(model, ["conv1", "con1"])
    with pytest.raises(UnknownLayerError, match="CONV"):
        adapters.read(model, "CONV*")


def test_selecting_a_skipped_layer_says_why_it_was_skipped() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = nn.Parameter(model[1].weight.detach().char(), requires_grad=False)
    with pytest.raises(UnknownLayerError, match="'1': it was skipped because it holds integers"):
        adapters.read(model, ["1"])


@pytest.mark.parametrize("selected", [[], [3], [nn.ReLU()]])
def test_selected_layers_that_are_no_names_are_refused(model: nn.Module, selected: Any) -> None:
    with pytest.raises(BadArgumentError, match="selected_layers: expected names of layers"):
        adapters.read(model, selected)


def test_a_network_can_be_given_a_name(model: nn.Module) -> None:
    assert adapters.read(model).name == "ModuleDict"
    assert adapters.read(model, name="mine").name == "mine"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (3, "cannot read an object of type int; give a torch.nn.Module"),
        (None, "object of type NoneType"),
        (nn.Linear, r"cannot read the class torch.nn.modules.linear.Linear, only an instance of it"),
        ({"weight": np.ones(3)}, "object of type dict"),
    ],
)
def test_what_is_no_model_is_named(wrong: object, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        adapters.read(wrong)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(BadArgumentError, match=r"model: there is no file 'nowhere/model.pt2'"):
        adapters.read("nowhere/model.pt2")


def test_a_file_of_an_unknown_type_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.xyz").write_text("?")
    with pytest.raises(UnsupportedModelError, match=r"cannot read the file '.*model.xyz'; give"):
        adapters.read(tmp_path / "model.xyz")
    with pytest.raises(UnsupportedModelError, match="cannot read the folder"):
        adapters.read(tmp_path)


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Sequential holds no weights"):
        adapters.read(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)))


class Lists:
    """An adapter for plain lists, as another package might offer it."""

    @staticmethod
    def handles(model: object) -> bool:
        return isinstance(model, list)

    @staticmethod
    def read(model: Any) -> Network:
        layers = [Layer(str(i), "list", (1, 1), "float64", lambda: np.ones((1, 1))) for i in range(len(model))]
        return Network("list", "Python", tuple(layers))


def test_other_packages_can_add_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EntryPoint("broken", "no_such_package_at_all:Adapter", adapters.PLUGINS)
    lists = EntryPoint("lists", f"{__name__}:Lists", adapters.PLUGINS)
    monkeypatch.setattr(adapters, "entry_points", lambda group: [broken, lists] if group == "qvis.adapters" else [])
    assert [layer.name for layer in adapters.read([1, 2], ["1"]).layers] == ["1"]
    with pytest.raises(UnsupportedModelError, match="the plugin 'broken' failed with ModuleNotFoundError"):
        adapters.read({1, 2})


def test_no_framework_is_imported_to_refuse_an_object() -> None:
    code = (
        "import sys; from qvis import adapters, errors\n"
        "try: adapters.read(object())\n"
        "except errors.UnsupportedModelError: print(sorted({'torch', 'bokeh'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
