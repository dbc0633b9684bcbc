"""The engine that runs PyTorch modules and .pt2 files, and what it finds in files."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qvis
from qvis import adapters
from qvis.adapters.digits import load_digits_model
from qvis.errors import NotRunnableError, UnsupportedModelError
from qvis.quantization.engines import inspect, open_engine, torch_lowering
from qvis.running import Batch
from tests.quantized_digits import digits, pictures

pytest.importorskip("torchao")

x86 = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="oneDNN's kernels are for x86")


def images(count: int = 64) -> Batch:
    return Batch((pictures()[0][:count],), size=count)


@x86
def test_the_integers_that_are_timed_say_what_the_file_says() -> None:
    engine = open_engine(digits("post_training").path)
    assert not engine.simulated
    assert engine.name.endswith("int8 by oneDNN")
    (expected,) = engine.run(images())
    found: Any = engine.prepare(images())()
    assert np.abs(found.numpy() - expected).max() < 0.05 * np.abs(expected).max()
    assert (found.numpy().argmax(1) == expected.argmax(1)).mean() >= 0.98
    targets = [str(node.target) for node in engine._lower((torch.tensor(images().args[0]),), {}).graph.nodes]  # type: ignore[attr-defined]
    assert sum(one.startswith("onednn.q") and "prepack" not in one for one in targets) == 18
    assert not any("aten.conv" in one or "aten.addmm" in one for one in targets)


def test_integers_that_are_imitated_are_never_timed_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    path = digits("post_training").path
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    engine = open_engine(path)
    assert "for x86 processors, and this one is riscv64" in engine.simulated
    assert "oneDNN" not in engine.name
    assert engine.prepare(images())() is not None
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")

    def fail(*_: Any) -> Any:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(torch_lowering, "_lowered", fail)
    assert open_engine(path).simulated == (
        "the program cannot be lowered to integer kernels: RuntimeError: no such kernel"
    )
    monkeypatch.setattr(torch_lowering, "_lowered", lambda module, _: module)
    assert "kernels take 0 of 18 layers here" in open_engine(path).simulated


def test_weights_alone_are_timed_as_the_float_arithmetic_that_they_are() -> None:
    engine = open_engine(digits("weight_only", 4).path)
    assert not engine.simulated
    assert engine.name.endswith("float arithmetic on weights that are dequantized at each call")
    found: Any = engine.prepare(images())()
    assert np.array_equal(found.numpy(), engine.run(images())[0])


def test_a_module_runs_as_it_is_and_stays_as_it_was() -> None:
    model = load_digits_model().train()
    expected = load_digits_model()(torch.tensor(images().args[0])).detach().numpy()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    threads = torch.get_num_threads()
    engine = open_engine(model, threads=2)
    assert engine.name == f"PyTorch {torch.__version__.partition('+')[0]}, eager"
    assert not engine.simulated
    assert engine.fixed_batch is None
    np.testing.assert_allclose(engine.run(images())[0], expected, atol=1e-4)
    found: Any = engine.prepare(images())()
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)
    assert model.training
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert torch.get_num_threads() == threads


def test_one_looks_at_what_each_layer_of_a_module_puts_out() -> None:
    model = load_digits_model()
    expected: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda _, __, out, name=name: expected.update({name: out.detach().numpy()}))
    model(torch.tensor(images().args[0]))
    found = open_engine(load_digits_model()).look(images())  # type: ignore[attr-defined]
    assert found.keys() == expected.keys()
    for name, one in found.items():
        np.testing.assert_allclose(one.values, expected[name], atol=1e-4)
        assert one.axis == (-1 if name == "classifier" else 1)


def test_one_looks_at_what_each_layer_of_a_file_puts_out() -> None:
    path = digits("post_training").path
    found = open_engine(path).look(images())  # type: ignore[attr-defined]
    exact = open_engine(load_digits_model(folded=True)).look(images())  # type: ignore[attr-defined]
    assert list(found) == [one.name for one in adapters.read(path).layers]
    for name, one in found.items():
        values = exact[name].values
        assert one.axis == exact[name].axis
        assert np.square(one.values - values).sum() < 0.02 * np.square(values).sum()


def test_parts_of_a_tensor_are_looked_at_one_by_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0).eval()
    data = np.random.default_rng(0).standard_normal((4, 3, 8)).astype(np.float32)
    made = qvis.quantize(model, tmp_path / "q.pt2", calibration_data=data)
    found = open_engine(made.path).look(Batch((data,), size=4))  # type: ignore[attr-defined]
    weight, bias = model.self_attn.in_proj_weight.detach().numpy(), model.self_attn.in_proj_bias.detach().numpy()
    for index, part in enumerate("qkv"):
        rows = slice(8 * index, 8 * index + 8)
        expected = data @ weight[rows].T + bias[rows]
        values = found[f"self_attn.in_proj_weight.{part}"].values
        values = values if values.shape == expected.shape else values.swapaxes(0, 1)
        np.testing.assert_allclose(values, expected, atol=0.05 * np.abs(expected).max())


@x86
def test_one_step_for_a_whole_weight_is_lowered_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)).eval()
    batch = Batch((np.random.default_rng(0).standard_normal((4, 3, 6, 6)).astype(np.float32),), size=4)
    made = qvis.quantize(model, tmp_path / "q.pt2", calibration_data=batch.args[0], granularity="tensor")
    engine = open_engine(made.path)
    assert not engine.simulated
    found: Any = engine.prepare(batch)()
    expected = engine.run(batch)[0]
    np.testing.assert_allclose(found.numpy(), expected, atol=0.03 * np.abs(expected).max())


@x86
def test_layers_without_integer_kernels_compute_with_floats_and_are_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.ConvTranspose2d(8, 8, 2, stride=2), nn.Conv2d(8, 2, 1)
    ).eval()
    data = np.random.default_rng(0).standard_normal((4, 3, 10, 10)).astype(np.float32)
    made = qvis.quantize(model, tmp_path / "q.pt2", calibration_data=data)
    assert any("weights alone are integers" in note and "3" in note for note in made.notes)
    assert [one.layer for one in made.contents.leftovers] == ["3"]
    engine = open_engine(made.path)
    assert not engine.simulated
    found: Any = engine.prepare(Batch((data,), size=4))()
    expected = engine.run(Batch((data,), size=4))[0]
    np.testing.assert_allclose(found.numpy(), expected, atol=0.03 * np.abs(expected).max())


def test_what_is_in_a_file_is_what_was_stored() -> None:
    path = digits("post_training").path
    contents = inspect(path)
    held = torch.export.load(path).state_dict
    expected: dict[str, int] = {}
    for one in held.values():
        kind = str(one.dtype).removeprefix("torch.")
        expected[kind] = expected.get(kind, 0) + one.numel() * one.element_size()
    assert contents.bytes_by_type == expected
    assert contents.file_bytes == path.stat().st_size
    assert contents.integer_operations == 1
    float_file = [one.kind for one in contents.computing if one.layer]
    assert sorted(set(float_file)) == ["aten.conv2d", "aten.linear"]


def test_a_float_program_is_found_to_be_float(tmp_path: Path) -> None:
    path = tmp_path / "float.pt2"
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU()).eval()
    torch.export.save(torch.export.export(model, (torch.zeros(3, 6),)), path)
    contents = inspect(path)
    assert contents.bytes_by_type == {"float32": 4 * 56}
    assert [(one.kind, one.arithmetic.value, one.layer) for one in contents.operations] == [
        ("aten.linear", "float", "0"),
        ("aten.relu", "float", ""),
    ]
    engine = open_engine(path)
    assert engine.fixed_batch == 3
    assert engine.name.endswith("eager")
    batch = Batch((np.ones((3, 6), np.float32),), size=3)
    np.testing.assert_allclose(engine.run(batch)[0], model(torch.ones(3, 6)).detach().numpy(), atol=1e-6)


def test_numbers_without_a_program_are_counted_and_not_run(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "q.safetensors"
    save_file({"a": torch.zeros(3, 5, dtype=torch.int8), "b": torch.zeros(4), "c": torch.zeros(2)}, path)
    contents = inspect(path)
    assert contents.bytes_by_type == {"int8": 15, "float32": 24}
    assert contents.operations == ()
    with pytest.raises(UnsupportedModelError, match="holds numbers without what is computed with them"):
        open_engine(path)
    with pytest.raises(NotRunnableError, match="no numbers"):
        open_engine(nn.Linear(3, 3, device="meta"))
