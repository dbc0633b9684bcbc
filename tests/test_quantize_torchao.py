"""Quantizing with torchao: integers in ``.safetensors`` and ``.pt2``, and running them again."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from qvis import adapters
from qvis.adapters.digits import load_digits_model, load_digits_samples
from qvis.adapters.factories import load
from qvis.adapters.torch.integer_linear import IntegerLinear, multiplies_exactly
from qvis.adapters.torch.integers import dynamic_weight, load_quantized, weight_in_integers
from qvis.benchmarking.benchmark import benchmark
from qvis.errors import BadArgumentError, UnsupportedModelError
from qvis.quantization.backends import torchao
from qvis.quantization.engines import inspect, open_engine
from qvis.quantization.methods import Job, find_cell
from qvis.quantization.quantize import quantize
from qvis.running import Batch

HELD_OUT = 5


class Reader(nn.Module):
    """Reads digits out of an embedding of each of the 64 pixels, which are whole numbers up to 16."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 6)
        self.hidden = nn.Linear(6 * 64, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        scores: Tensor = self.head(torch.relu(self.hidden(self.embed(pixels).flatten(1))))
        return scores


class Words(nn.Module):
    """An encoder whose last layer shares the weight of its first; with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(1, 1, 16))
        self.embed = nn.Embedding(11, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words)
        x = torch.cat([self.start.expand(x.shape[0], -1, -1), x], dim=1)
        scores: Tensor = self.head(self.encoder(x)[:, 0])
        return scores


@cache
def pixels() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures and digits to train with, and held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.data).long(), torch.tensor(digits.target)
    held = torch.arange(len(y)) % HELD_OUT == 0
    return x[~held], y[~held], x[held], y[held]


@cache
def trained() -> Reader:
    x, y, _, _ = pixels()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Reader()
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(8):
            for rows in torch.randperm(len(y)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    return model.eval()


def made(model: nn.Module, method: str, target: Path, inputs: Any = None, **settings: Any) -> Job:
    """The job that wrote ``target``."""
    bits = settings.pop("bits", 8)
    network = adapters.read(model)
    widths = {layer.name: bits for layer in network.layers} if isinstance(bits, int) else bits
    example = None if inputs is None else Batch((np.asarray(inputs),), size=len(inputs))
    cell = find_cell("torch", method, target.suffix)
    job = Job(model, network, cell, widths, settings.pop("granularity", "channel"), example=example)
    torchao.check(job)
    assert torchao.convert(job, target) == ()
    return job


def reloaded(path: Path, factory: str) -> nn.Module:
    model = load(factory if ":" in factory else f"{__name__}:{factory}", path)
    assert isinstance(model, nn.Module)
    return model.eval()


def accuracy(model: Any) -> float:
    _, _, x, y = pixels()
    with torch.no_grad():
        return float((model(x).argmax(dim=1) == y).double().mean())


def numbers_in(path: Path) -> dict[str, int]:
    """Bytes by type of the tensors in a file."""
    found: dict[str, int] = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            kind = str(tensor.dtype).removeprefix("torch.")
            found[kind] = found.get(kind, 0) + tensor.nbytes
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Weights alone


def test_weights_of_8_bits_are_a_quarter_and_as_accurate(tmp_path: Path) -> None:
    model, path = trained(), tmp_path / "q.safetensors"
    before = accuracy(model)
    assert before > 0.9
    made(model, "weight_only", path, pixels()[2][:4])
    bytes_by_type = numbers_in(path)
    assert bytes_by_type["int8"] >= model.hidden.weight.numel()
    assert sum(bytes_by_type.values()) < 0.3 * sum(4 * one.numel() for one in model.parameters())
    again = reloaded(path, "Reader")
    assert type(again.hidden.weight).__name__ == "IntxUnpackedToInt8Tensor"
    assert abs(accuracy(again) - before) <= 0.01


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_weights_are_those_of_the_grid_that_covers_them(bits: int, granularity: str) -> None:
    weight = torch.randn(6, 3, 3, 5, generator=torch.Generator().manual_seed(1))
    found = weight_in_integers(weight, bits, granularity).dequantize()
    axes = (1, 2, 3) if granularity == "channel" else (0, 1, 2, 3)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    step = torch.maximum(weight.amin(axes, keepdim=True) / low, weight.amax(axes, keepdim=True) / high)
    assert torch.allclose(found, (weight / step).round().clamp(low, high) * step, atol=1e-5)


def test_weights_are_those_of_torchaos_quantize(tmp_path: Path) -> None:
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerAxis, quantize_

    path = tmp_path / "q.safetensors"
    made(trained(), "weight_only", path, bits=4)
    theirs = copy.deepcopy(trained())
    config = IntxWeightOnlyConfig(torch.int4, PerAxis(0), MappingType.SYMMETRIC_NO_CLIPPING_ERR)
    quantize_(theirs, config, filter_fn=lambda module, _: isinstance(module, (nn.Linear, nn.Embedding)))
    with torch.no_grad():
        assert torch.equal(reloaded(path, "Reader")(pixels()[2]), theirs(pixels()[2]))


def test_torchao_reads_the_file_by_itself(tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    path = tmp_path / "q.safetensors"
    made(trained(), "weight_only", path, bits=6)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    state, others = unflatten_tensor_state_dict(load_file(path), metadata)
    model = Reader()
    model.load_state_dict({**state, **others}, assign=True)
    with torch.no_grad():
        assert torch.equal(model(pixels()[2]), reloaded(path, "Reader")(pixels()[2]))


def test_each_layer_has_a_width_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    job = made(trained(), "weight_only", path, bits={"embed": 8, "hidden": 3, "head": 32})
    layers = {layer.name: layer for layer in adapters.read(path).layers}
    assert layers["embed"].dtype == layers["hidden"].dtype == "int8"
    assert layers["head"].dtype == "float32"
    assert max(len(np.unique(row)) for row in layers["hidden"].read()) <= 8
    assert max(len(np.unique(row)) for row in layers["embed"].read()) > 4
    assert any("stored in 8 bits each" in note for note in job.notes)


def test_a_report_on_the_file_sees_the_numbers_that_the_model_computes_with(tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    made(load_digits_model(), "weight_only", path)
    runs = {
        layer.name: layer for layer in adapters.read(reloaded(path, "qvis.adapters.digits:load_digits_model")).layers
    }
    seen = adapters.read(path)
    assert {layer.name for layer in seen.layers} == set(runs)
    assert not seen.skipped
    for layer in seen.layers:
        assert layer.dtype == "int8"
        assert any("dequantized from int8" in note for note in layer.notes)
        assert np.array_equal(layer.read(), runs[layer.name].read())


def test_convolutions_keep_their_accuracy(tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    pictures, digits = load_digits_samples()
    made(load_digits_model(), "weight_only", path, pictures[:4])
    model = reloaded(path, "qvis.adapters.digits:load_digits_model")
    with torch.no_grad():
        before, after = (one(torch.tensor(pictures)).argmax(1).numpy() for one in (load_digits_model(), model))
    assert abs((before == digits).mean() - (after == digits).mean()) <= 0.01


def test_tied_weights_stay_tied_and_are_stored_once(tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    torch.manual_seed(3)
    model = Words().eval()
    job = made(model, "weight_only", path, np.arange(8).reshape(2, 4))
    again = reloaded(path, "Words")
    assert again.head.weight is again.embed.weight
    (layer,) = (layer for layer in adapters.read(path).layers if layer.name == "embed")
    assert layer.aliases == ("head",)
    assert torch.equal(again.start, model.start)
    assert any("embed and head" in note for note in job.notes)
    notes = " ".join(job.notes)
    assert "encoder.layers.0.self_attn.out_proj is the out_proj of nn.MultiheadAttention" in notes
    assert "start is a parameter" in notes
    words = torch.arange(8).reshape(2, 4)
    with torch.no_grad():
        error = (again(words) - model(words)).square().sum() / model(words).square().sum()
    assert 0 < error < 1e-2


# ---------------------------------------------------------------------------------------------------------------------
# Dynamic


@pytest.mark.parametrize("suffix", [".safetensors", ".pt2"])
@pytest.mark.parametrize("bits", [8, 7])
def test_dynamic_keeps_the_accuracy(suffix: str, bits: int, tmp_path: Path) -> None:
    model, path = trained(), tmp_path / f"q{suffix}"
    job = made(model, "dynamic", path, pixels()[2][:2], bits=bits)
    assert any("embed is Embedding" in note for note in job.notes)
    assert any("VNNI" in note for note in job.notes) == (bits == 8)
    if bits == 8 and not multiplies_exactly():
        assert "this processor is one of those" in job.notes
        return
    found = torch.export.load(path).module() if suffix == ".pt2" else reloaded(path, "Reader")
    assert abs(accuracy(found) - accuracy(model)) <= 0.01


def test_a_program_computes_with_integers_in_operations_of_pytorch_alone(tmp_path: Path) -> None:
    path = tmp_path / "q.pt2"
    made(trained(), "dynamic", path, pixels()[2][:2], bits=7)
    program = torch.export.load(path)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called.count("aten._int_mm.default") == 2
    assert "aten.linear.default" not in called
    assert not any("torchao" in name for name in called)
    assert program.module()(pixels()[2][:7]).shape == (7, 10)
    layers = {layer.name: layer for layer in adapters.read(path).layers}
    assert list(layers) == ["embed", "hidden", "head"]
    weight = dynamic_weight(trained().head.weight, 7)
    assert (layers["head"].op, layers["head"].dtype) == ("Linear", "int8")
    assert np.array_equal(layers["head"].read(), weight.dequantize().numpy())


def test_a_program_is_run_and_looked_into(tmp_path: Path) -> None:
    x, made_of = pixels()[2][:32].numpy(), tmp_path / "q.pt2"
    made(trained(), "dynamic", made_of, x[:2], bits=7)
    kinds = {one.layer: (one.kind, one.arithmetic.value) for one in inspect(made_of).computing if one.layer}
    assert kinds["hidden"] == kinds["head"] == ("aten._int_mm", "hybrid")
    assert {one.kind for one in inspect(made_of).computing} == {"aten.embedding", "aten._int_mm", "aten.relu"}
    engine = open_engine(made_of)
    assert "int8 products" in engine.name
    assert not engine.simulated
    (scores,) = engine.run(Batch((x,), size=32))
    looked = engine.look(Batch((x,), size=32))  # type: ignore[attr-defined]
    assert np.array_equal(looked["head"].values, scores)
    with torch.no_grad():
        hidden = trained().hidden(trained().embed(torch.tensor(x)).flatten(1)).numpy()
    assert np.square(looked["hidden"].values - hidden).sum() < 1e-2 * np.square(hidden).sum()


def test_quantizing_and_measuring_go_through_files(tmp_path: Path) -> None:
    path, x = tmp_path / "q.safetensors", pixels()[2].numpy()
    found = quantize(trained(), path, "weight_only", bits={"hidden": 4}, example_inputs=x[:2])
    assert found.contents.bytes_by_type["int8"] > 0.9 * found.contents.parameter_bytes
    assert found.compression < 0.3
    measured = benchmark(
        reloaded(path, "Reader"), trained(), data=x, labels=pixels()[3].numpy(), batch_sizes=(4,), calls=3
    )
    before, after = measured.variants
    assert 0.25 < after.parameter_bytes / before.parameter_bytes < 0.3
    assert before.answers is not None
    assert after.answers is not None
    assert before.answers.top1 is not None
    assert after.answers.top1 is not None
    assert abs(before.answers.top1 - after.answers.top1) <= 0.02


def test_both_files_of_dynamic_compute_the_same(tmp_path: Path) -> None:
    x = pixels()[2]
    for suffix in (".safetensors", ".pt2"):
        made(trained(), "dynamic", tmp_path / f"q{suffix}", x[:2], bits=7)
    with torch.no_grad():
        one = reloaded(tmp_path / "q.safetensors", "Reader")(x)
        two = torch.export.load(tmp_path / "q.pt2").module()(x)
    # the two round halves differently, which moves single codes
    assert (one - two).square().sum() < 1e-5 * one.square().sum()


def test_an_integer_linear_rounds_each_row_by_its_own_range() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-64, 64, (5, 12), generator=generator, dtype=torch.int8)
    scale, bias = torch.rand(5, generator=generator), torch.randn(5, generator=generator)
    x = torch.randn(3, 2, 12, generator=generator) * torch.tensor([1.0, 10.0, 0.0])[:, None, None]
    found = IntegerLinear(codes, scale, bias, 7)(x)
    for row, output in zip(x.reshape(-1, 12).numpy(), found.reshape(-1, 5).numpy(), strict=True):
        step = max(np.abs(row).max() / np.float32(63.5), np.float32(2.0**-23))
        rounded = np.clip(np.rint(row / step), -64, 63).astype(int)
        wanted = [sum(int(a) * int(b) for a, b in zip(one, rounded, strict=True)) for one in codes.tolist()]
        assert np.allclose(output, np.array(wanted) * step * scale.numpy() + bias.numpy(), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# What is left alone, and what is refused


def test_the_model_and_the_generators_stay_as_they_were(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = copy.deepcopy(trained()).train()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    torch.manual_seed(5)
    np.random.seed(5)
    state, drawn = torch.get_rng_state(), np.random.get_state()[1]
    for suffix in (".safetensors", ".pt2"):
        made(model, "dynamic", tmp_path / f"q{suffix}", pixels()[2][:2])
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert all(one.grad is None and one.requires_grad for one in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], drawn)
    assert capfd.readouterr() == ("", "")


def test_a_model_without_layers_for_it_is_refused_with_what_would_work(tmp_path: Path) -> None:
    convnet = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    with pytest.raises(UnsupportedModelError, match=r"no layer for torchao.*0 is Conv2d.*post_training to .pt2"):
        made(convnet, "dynamic", tmp_path / "q.safetensors")
    recurrent = nn.Sequential(nn.LSTM(3, 4))
    with pytest.raises(UnsupportedModelError, match=r"is LSTM.*post_training to .pt2 or .onnx would work"):
        made(recurrent, "weight_only", tmp_path / "q.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"wrap it in nn.Sequential"):
        made(nn.Linear(2, 3), "weight_only", tmp_path / "q.safetensors")
    with pytest.raises(UnsupportedModelError, match="all layers were left out"):
        made(trained(), "weight_only", tmp_path / "q.safetensors", bits={"head": 32})
    assert not list(tmp_path.iterdir())


def test_a_program_needs_something_to_call_the_model_with(tmp_path: Path) -> None:
    with pytest.raises(BadArgumentError, match=r"example_inputs: a .pt2 file"):
        made(trained(), "dynamic", tmp_path / "q.pt2")


def test_an_exported_program_is_refused() -> None:
    program = torch.export.export(trained(), (pixels()[2][:2],))
    job = Job(program, adapters.read(program), find_cell("torch", "dynamic", ".pt2"), {}, example=Batch(()))
    with pytest.raises(UnsupportedModelError, match="give the module that it was exported from"):
        torchao.check(job)


def test_weights_that_the_model_uses_itself_are_told_before_anything_is_written(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.linalg.inv(self.inner.weight)

    with pytest.raises(UnsupportedModelError, match=r"does not run with torchao's weights.*exclude"):
        made(Own(), "weight_only", tmp_path / "q.safetensors", np.ones((2, 3), np.float32))
    assert not list(tmp_path.iterdir())


def test_other_files_of_weights_are_none_of_torchaos(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "plain.safetensors")
    assert load_quantized(tmp_path / "plain.safetensors") is None


def test_weights_for_another_model_are_refused(tmp_path: Path) -> None:
    made(trained(), "weight_only", tmp_path / "q.safetensors")
    with pytest.raises(BadArgumentError, match=r"is for another model|does not fit the model"):
        reloaded(tmp_path / "q.safetensors", "Words")
