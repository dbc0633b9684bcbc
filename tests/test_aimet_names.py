"""AIMET's names and arguments lead to the reports of qvis."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import qvis
from qvis import aimet

OPTIONAL = ["selected_layers"]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Linear(8, 4))


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (aimet.visualize_weight_ranges, ["model", "results_dir", *OPTIONAL]),
        (
            aimet.visualize_relative_weight_ranges_to_identify_problematic_layers,
            ["model", "results_dir", *OPTIONAL],
        ),
        (aimet.visualize_changes_after_optimization, ["old_model", "new_model", "results_dir", *OPTIONAL]),
    ],
)
def test_arguments_have_the_names_and_order_of_aimet(function: Callable[..., object], arguments: list[str]) -> None:
    parameters = inspect.signature(function).parameters
    assert list(parameters) == arguments
    assert parameters["selected_layers"].default is None
    assert all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters.values())


def test_each_writes_the_page_of_its_namesake_into_a_folder_it_makes(model: nn.Module, tmp_path: Path) -> None:
    reports = {
        "weight_ranges": (
            aimet.visualize_weight_ranges(model, str(tmp_path / "a" / "b")),
            qvis.visualize_weight_ranges(model, tmp_path / "c"),
        ),
        "relative_weight_ranges": (
            aimet.visualize_relative_weight_ranges_to_identify_problematic_layers(model, str(tmp_path / "a" / "b")),
            qvis.visualize_relative_weight_ranges(model, tmp_path / "c"),
        ),
        "changes_after_optimization": (
            aimet.visualize_changes_after_optimization(model, model, str(tmp_path / "a" / "b")),
            qvis.visualize_changes_after_optimization(model, model, tmp_path / "c"),
        ),
    }
    for name, (ours, theirs) in reports.items():
        assert ours.path == tmp_path / "a" / "b" / f"{name}.html"
        assert theirs.path is not None
        assert ours.path.read_bytes() == theirs.path.read_bytes()


def test_selected_layers_are_names_of_modules_and_an_empty_list_means_all(model: nn.Module, tmp_path: Path) -> None:
    some = aimet.visualize_weight_ranges(model, tmp_path, ["2", "0"])
    assert [layer.name for layer in some.layers] == ["0", "2"]
    all_of_them = aimet.visualize_relative_weight_ranges_to_identify_problematic_layers(model, tmp_path, [])
    assert [layer.name for layer in all_of_them.layers] == ["0", "2", "3"]
    changes = aimet.visualize_changes_after_optimization(model, model, tmp_path, selected_layers=["3"])
    assert [layer.name for layer in changes.layers] == ["3"]


def test_a_misspelt_layer_is_an_error_and_not_an_empty_page(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(qvis.UnknownLayerError, match="'conv9'"):
        aimet.visualize_weight_ranges(model, tmp_path / "new", ["conv9"])
    assert not (tmp_path / "new").exists()
