"""What is read from programs that torch exported, and from their files."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qvis import adapters
from qvis.adapters.torch import archive
from qvis.errors import BadArgumentError, QvisError
from qvis.layers import Network
from tests import zoo

# What torch says about its own workings when it exports.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The tensor attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]

EXAMPLES: dict[type[nn.Module], Tensor] = {
    zoo.Sequences: torch.randint(0, 10, (2, 7)),
    zoo.Images: torch.zeros(2, 3, 8, 8),
}


@cache
def exported(make: type[nn.Module]) -> Any:
    return torch.export.export(zoo.seeded(make).eval(), (EXAMPLES[make],))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "images.pt2"
    torch.export.save(exported(zoo.Images), path)
    return path


def assert_same(first: Network, second: Network) -> None:
    assert (first.name, first.framework, first.parameters) == (second.name, second.framework, second.parameters)
    assert [(one.name, one.op, one.shape, one.dtype, one.channels, one.aliases) for one in first.layers] == [
        (one.name, one.op, one.shape, one.dtype, one.channels, one.aliases) for one in second.layers
    ]
    for one, other in zip(first.layers, second.layers, strict=True):
        np.testing.assert_array_equal(one.weight, other.weight)


@pytest.mark.parametrize("make", list(EXAMPLES))
@pytest.mark.parametrize(
    "form",
    [lambda p: p, lambda p: p.module(), lambda p: p.run_decompositions()],
    ids=["program", "graph", "decomposed"],
)
def test_a_program_is_read_like_the_module_it_was_made_from(make: type[nn.Module], form: Callable[[Any], Any]) -> None:
    assert_same(adapters.read(zoo.seeded(make)), adapters.read(form(exported(make))))


@pytest.mark.parametrize("make", list(EXAMPLES))
def test_a_file_is_read_like_the_module_it_was_made_from(make: type[nn.Module], tmp_path: Path) -> None:
    torch.export.save(exported(make), tmp_path / "model.pt2")
    assert_same(adapters.read(zoo.seeded(make)), adapters.read(str(tmp_path / "model.pt2")))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_file_keeps_the_type_of_the_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    model = nn.Linear(3, 4).to(dtype)
    torch.export.save(torch.export.export(model, (torch.zeros(1, 3, dtype=dtype),)), tmp_path / "m.pt2")
    assert_same(adapters.read(model), adapters.read(tmp_path / "m.pt2"))


def test_the_numbers_of_types_are_those_of_torch() -> None:
    from torch._export.serde.serialize import _TORCH_TO_SERIALIZE_DTYPE

    assert {int(number): str(dtype) for dtype, number in _TORCH_TO_SERIALIZE_DTYPE.items()} == {
        number: f"torch.{name}" for number, name in archive._DTYPES.items()
    }


class Functional(nn.Module):
    """Weights used by functions, whose roles only the graph shows."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 2, 3))
        self.matrix = nn.Parameter(torch.randn(4, 5))
        self.transposed = nn.Parameter(torch.randn(6, 5))
        self.scale = nn.Parameter(torch.randn(1, 6))
        self.register_buffer("constant", torch.randn(3, 6))
        self.register_buffer("mask", torch.ones(1, 6))

    def forward(self, signal: Tensor) -> Tensor:
        hidden = nn.functional.conv1d(signal, self.kernel).mean(2) @ self.matrix
        return nn.functional.linear(torch.mm(hidden, self.transposed.t()) * self.scale * self.mask, self.constant)


def test_the_graph_tells_what_bare_parameters_are_for() -> None:
    model = Functional()
    program = torch.export.export(model, (torch.zeros(1, 2, 5),))
    found = {layer.name: layer for layer in adapters.read(program).layers}
    assert {name: (layer.op, layer.channels) for name, layer in found.items()} == {
        "kernel": ("Conv1d", "axis 0"),
        "matrix": ("MatMul", "axis 1"),
        "transposed": ("Linear", "axis 0"),
        "scale": ("other", "axis 0"),
        "constant": ("Linear", "axis 0"),
    }
    np.testing.assert_array_equal(found["matrix"].weight, model.matrix.detach().numpy().T)


def test_a_traced_graph_that_calls_modules_is_read_as_modules() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ConvTranspose2d(2, 4, 3, groups=2))
    traced = torch.fx.symbolic_trace(model)
    assert [layer.op for layer in adapters.read(traced).layers] == ["Conv2d", "ConvTranspose2d"]


def test_weights_are_taken_from_the_file_only_when_they_are_asked_for(file: Path) -> None:
    layer = adapters.read(file).layers[0]
    stored = layer.weight.tobytes()
    content = file.read_bytes()
    assert content.count(stored) == 1
    file.write_bytes(content.replace(stored, bytes(len(stored))))
    assert not layer.weight.any()


# Files that are not what they should be


def rewrite(source: Path, target: Path, change: Callable[[str, bytes], bytes | None], compress: bool = False) -> Path:
    how = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", how) as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target


def test_a_compressed_file_is_read_too(file: Path, tmp_path: Path) -> None:
    packed = rewrite(file, tmp_path / "packed.pt2", lambda _, content: content, compress=True)
    assert_same(adapters.read(file), adapters.read(packed))


def test_reading_a_file_runs_nothing_that_is_pickled_in_it(file: Path, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"

    class Trap:
        def __reduce__(self) -> Any:
            return open, (str(trap), "w")

    def plant(name: str, content: bytes) -> bytes:
        if "weights_config" in name:
            config = json.loads(content)
            config["config"]["stem.weight"]["use_pickle"] = True
            return json.dumps(config).encode()
        path = "data/weights/weight_0"
        return pickle.dumps(Trap()) if name.endswith((path, ".pt")) else content

    trapped = rewrite(file, tmp_path / "trapped.pt2", plant)
    with pytest.raises(BadArgumentError, match="pickled objects, which could run code"):
        adapters.read(trapped)
    assert not trap.exists()


def test_a_file_that_is_no_archive_is_named(tmp_path: Path) -> None:
    for name, content in {"empty.pt2": b"", "text.pt2": b"hello" * 100}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadArgumentError, match=rf"{name}' is no .pt2 file, or was cut short"):
            adapters.read(tmp_path / name)


def test_an_archive_without_a_program_is_named(tmp_path: Path, file: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "state.pt2")
    with pytest.raises(BadArgumentError, match="holds no exported program"):
        adapters.read(tmp_path / "state.pt2")
    compiled = rewrite(file, tmp_path / "c.pt2", lambda name, content: None if "models/" in name else content)
    with zipfile.ZipFile(compiled, "a") as added:
        added.writestr("images/data/aotinductor/model/model.so", b"")
    with pytest.raises(BadArgumentError, match="compiled model"):
        adapters.read(compiled)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.999])
def test_a_truncated_file_gives_one_clear_error(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(BadArgumentError, match=r"images\.pt2"):
        adapters.read(file)


def test_damaged_descriptions_give_an_error_of_qvis(file: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for number in range(60):

        def damage(name: str, content: bytes, number: int = number) -> bytes | None:
            if not name.endswith(".json"):
                return content
            spots = random.integers(0, len(content), 1 + number % 8)
            changed = bytearray(content)
            for spot in spots:
                changed[spot] = random.choice(list(b'0123456789"{}[]-,:a'))
            return bytes(changed)

        damaged = rewrite(file, tmp_path / f"{number}.pt2", damage)
        assert "\n" not in complaint(damaged)


def complaint(file: Path) -> str:
    """What qvis says against a file, nothing when it can be read; any other error goes through."""
    try:
        assert all(layer.weight.ndim == 2 for layer in adapters.read(file).layers)
    except QvisError as error:
        return str(error)
    return ""
