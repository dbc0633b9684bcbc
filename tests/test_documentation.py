"""The documentation keeps up with what it describes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer

import qvis
from qvis.adapters.digits import load_digits_model
from qvis.analysis import analyze_network
from qvis.analysis.comparison import compare
from qvis.layers import Layer, LayerAnalysis, Network, Severity, Skipped, Thresholds
from qvis.quantization.grids import Scheme
from qvis.report.benchmark import summarize_benchmark
from qvis.report.bit_widths import summarize_widths
from qvis.report.document import Document, jsonable, summarize, summarize_changes
from qvis.report.grids import compare_grids
from tests.measured import make_benchmark
from tests.widths import make_widths

DOCS = Path(__file__).resolve().parent.parent / "docs"
pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="the documentation is not in this tree")


def page(name: str) -> str:
    return (DOCS / f"{name}.rst").read_text(encoding="utf-8")


def network(seed: int) -> Network:
    """Layers that give every kind of finding."""
    random = np.random.default_rng(seed)
    wide = random.normal(size=(16, 8)) * np.geomspace(1e-3, 1, 16)[:, None]
    dead = random.normal(size=(16, 8))
    dead[0], dead[1] = 0, dead[1] * 1e-4
    broken = random.normal(size=(4, 8))
    broken[2, 3] = np.nan
    arrays = {
        "wide": wide,
        "dead": dead,
        "broken": broken,
        "zero": np.zeros((4, 8)),
        "single": random.normal(size=(8, 1)),
        f"only_in_{seed}": wide,
    }
    layers = tuple(
        Layer(name, "Linear", array.shape, "float64", lambda array=array: array) for name, array in arrays.items()
    )
    return Network("net", "NumPy", layers, (Skipped("packed", "cannot be read"),))


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> list[Document]:
    folder = tmp_path_factory.mktemp("grids")
    one, two = (analyze_network(network(seed)) for seed in (0, 1))
    inputs = np.random.default_rng(2).random((4, 1, 8, 8), dtype=np.float32)
    run = qvis.analyze(load_digits_model(), inputs=inputs)
    torch.manual_seed(0)
    linear = (torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 5), torch.nn.Sigmoid(), torch.nn.Linear(5, 3))
    found = qvis.equalize(torch.nn.Sequential(*linear), inputs.reshape(-1, 4))
    equalized = summarize_changes(compare(found.before, found.after), found)
    schemes = (Scheme(bits=4, granularity="tensor"), Scheme("kmeans", 2))
    grids = compare_grids({"wide": np.eye(4)}, folder, schemes=schemes, formats="json").document
    return [
        grids,
        summarize(one, "weight_ranges"),
        summarize_changes(compare(one, two)),
        summarize(run, "sensitivity"),
        equalized,
        summarize_widths(make_widths(corrected=("Others were tried.",))),
        summarize_benchmark(make_benchmark()),
    ]


BY_LAYER = ("items", "missing", "codebooks", "bytes_by_type")
"""Objects that have a field for each layer or type, or for some schemes."""


def keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
        for key, item in value.items():
            if key not in BY_LAYER:
                yield from keys(item)
    elif isinstance(value, list):
        for item in value:
            yield from keys(item)


def values_of(value: Any, wanted: str) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from (item for key, item in value.items() if key == wanted)
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from values_of(item, wanted)


def test_every_field_of_the_json_report_is_described(documents: list[Document]) -> None:
    described = set(re.findall(r"``([^`\n]+)``", page("json")))
    assert set(keys(jsonable(documents))) - described == set()


def test_every_field_that_the_description_lists_exists(documents: list[Document]) -> None:
    first_cells = re.findall(r"^   \* - (``.*)$", page("json"), re.MULTILINE)
    listed = {name for cell in first_cells for name in re.findall(r"``(\w+)``", cell)}
    assert listed - set(keys(jsonable(documents))) == set()


def test_every_kind_of_finding_is_described(documents: list[Document]) -> None:
    kinds = set(values_of(jsonable(documents), "kind"))
    assert {"nonfinite", "zero", "noise", "starved", "near_dead", "dead", "single", "weight_ranges", "damage"} <= kinds
    assert {kind for kind in kinds if f"``{kind}``" not in page("json")} == set()


def test_every_severity_and_threshold_is_explained() -> None:
    text = page("reading")
    assert {str(level) for level in Severity if f"``{level}``" not in text} == set()
    assert {field.name for field in fields(Thresholds) if f"``{field.name}``" not in text} == set()


def test_the_defaults_that_the_explanation_names_are_those_of_the_code() -> None:
    text = " ".join(page("reading").split())
    defaults = Thresholds()
    for phrase in (
        f"``problem_db``, {defaults.problem_db:g} dB",
        f"``watch_db``, {defaults.watch_db:g} dB",
        f"``starved_levels``, {defaults.starved_levels}",
        f"``outlier_iqr``, {defaults.outlier_iqr:g}",
    ):
        assert phrase in text
    assert (defaults.dead, defaults.near_dead) == (1e-6, 1e-3)
    assert (defaults.watch_starved, defaults.problem_starved) == (0.25, 0.5)


def test_every_public_name_is_in_the_reference() -> None:
    described = set(re.findall(r"auto\w+:: ([\w.]+)", page("api")))
    public = {f"qvis.{name}" for name in qvis.__all__ if not name.startswith("__")}
    assert public - described == set()
    assert LayerAnalysis.__module__ + ".LayerAnalysis" in described


def test_every_command_is_described() -> None:
    from qvis.cli import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    described = set(re.findall(r"command-help:: (\w+)", page("command_line")))
    assert set(commands) == described


def test_every_page_is_reached_from_the_first_one() -> None:
    listed = set(re.findall(r"^   (\w+)$", page("index"), re.MULTILINE))
    assert {path.stem for path in DOCS.glob("*.rst")} - {"index"} == listed
