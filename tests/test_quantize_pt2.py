"""PyTorch models to .pt2: weights alone, weights and activations, and training with rounding in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qvis
from qvis import adapters
from qvis.adapters.digits import load_digits_model
from qvis.errors import BadArgumentError, UnsupportedModelError
from qvis.quantization.backends.torch_training import trained_module
from qvis.quantization.contents import Arithmetic
from qvis.quantization.engines import open_engine
from qvis.quantization.methods import Job, Training, TrainingStep, find_cell
from qvis.running import Batch
from tests.quantized_digits import accuracy, digits, pictures

pytest.importorskip("torchao")


def numbers(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_post_training_makes_integers_of_all_layers_and_keeps_the_answers(granularity: str) -> None:
    made = digits("post_training", granularity=granularity)
    assert accuracy(made.path) >= accuracy(load_digits_model()) - 0.01
    assert made.compression <= 0.3
    layers = [one for one in made.contents.operations if one.layer]
    assert len(layers) == 18
    assert {one.arithmetic for one in layers} == {Arithmetic.INTEGER}
    assert not made.contents.leftovers
    assert [one.name for one in adapters.read(made.path).layers] == [
        one.name for one in adapters.read(load_digits_model()).layers
    ]


def test_weights_alone_become_integers_of_the_width_that_was_asked_for() -> None:
    made = digits("weight_only", 4)
    assert accuracy(made.path) >= accuracy(load_digits_model()) - 0.01
    held = torch.export.load(made.path).state_dict
    codes = [one for one in held.values() if one.dtype == torch.int8]
    assert len(codes) == 18
    assert max(int(one.abs().max()) for one in codes) == 7
    assert made.contents.integer_operations == 0
    assert {one.arithmetic for one in made.contents.operations if one.layer} == {Arithmetic.HYBRID}


def test_a_rounded_weight_is_the_folded_one_to_half_a_step() -> None:
    read = {one.name: one for one in adapters.read(digits("post_training").path).layers}
    for layer in adapters.read(load_digits_model(folded=True)).layers:
        exact, found = layer.weight, read[layer.name].weight
        step = np.abs(exact).max(axis=1, keepdims=True) / 127
        assert np.all(np.abs(exact - found) <= step * 0.501 + 1e-7)
        assert any("dequantized from int8" in note for note in read[layer.name].notes)


def test_layers_can_stay_in_float_and_have_widths_of_their_own(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(288, 4)).eval()
    data = numbers(8, 3, 8, 8)
    made = qvis.quantize(model, tmp_path / "q.pt2", calibration_data=data, bits={"0": 3, "2": 32})
    held = torch.export.load(made.path).state_dict
    assert int(held["0.weight"].abs().max()) == 3
    assert int(held["4.weight"].abs().max()) == 127
    assert torch.equal(held["2.weight"], model[2].weight)
    assert {one.layer: one.arithmetic.value for one in made.contents.operations if one.layer} == {
        "0": "integer",
        "2": "float",
        "4": "integer",
    }


class Mixed(nn.Module):
    """What real models have: several inputs by name, nests of outputs, tied weights, recurrence, attention, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.memory = nn.LSTM(8, 8, batch_first=True)
        self.up = nn.ConvTranspose1d(8, 8, 2, stride=2, groups=2)
        self.drop = nn.Dropout(0.2)
        self.out = nn.Linear(8, 20, bias=False)
        self.out.weight = self.table.weight
        self.project = nn.Parameter(torch.randn(8, 6))

    def forward(self, ids: Any, *, scale: Any) -> dict[str, Any]:
        found = self.table(ids)
        found = self.norm(found + self.attention(found, found, found, need_weights=False)[0])
        found = self.memory(self.drop(found))[0] * scale[:, None]
        found = self.up(found.transpose(1, 2)).transpose(1, 2)
        return {"scores": self.out(found), "more": (found @ self.project, ids + 1)}


@pytest.mark.parametrize("method", ["post_training", "quantization_aware"])
def test_what_real_models_have_is_quantized_and_nothing_of_the_model_is_changed(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Mixed().to(torch.bfloat16).train()
    ids = np.random.default_rng(0).integers(0, 20, (12, 5))
    batch = Batch((ids,), {"scale": np.abs(numbers(12, 8)) + 0.5}, size=12)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    key = "train_data" if method == "quantization_aware" else "calibration_data"
    more = {"epochs": 1, "learning_rate": 1e-5} if method == "quantization_aware" else {}
    made = qvis.quantize(model, tmp_path / "q.pt2", method, **{key: [batch]}, **more)
    assert model.training
    assert all(one.training for one in model.modules())
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])
    assert [one.name for one in adapters.read(made.path).layers] == list(made.bits)
    engine = open_engine(made.path)
    exact = open_engine(model.float()).run(batch)
    for one, other in zip(engine.run(batch), exact, strict=True):
        assert np.abs(one - other).max() < 0.1 * np.abs(other).max()
    some = Batch((ids[:1],), {"scale": batch.kwargs["scale"][:1]}, size=1)
    assert engine.fixed_batch is None
    assert engine.run(some)[0].shape == (1, 10, 20)
    assert any("'memory'" in note or "memory" in note for note in made.notes)


def test_training_at_eight_bits_keeps_the_answers() -> None:
    made = digits("quantization_aware", epochs=1)
    assert accuracy(made.path) >= accuracy(load_digits_model()) - 0.01
    assert made.compression <= 0.3
    assert [one.number for one in made.epochs] == [0, 1]
    assert not made.contents.leftovers


def test_training_at_two_bits_gains_a_lot_over_post_training() -> None:
    without, trained = digits("quantization_aware", 2, 0), digits("quantization_aware", 2)
    assert [one.number for one in without.epochs] == [0]
    assert without.epochs[0] == trained.epochs[0]
    assert accuracy(trained.path) >= accuracy(without.path) + 0.2
    assert trained.epochs[-1].loss < trained.epochs[0].loss
    assert trained.epochs[-1].accuracy is not None
    assert without.epochs[0].accuracy is not None
    codes = [one for one in torch.export.load(trained.path).state_dict.values() if one.dtype == torch.int8]
    assert max(int(one.abs().max()) for one in codes) == 1


def job(model: nn.Module, data: Any, labels: Any = None, bits: int = 8, **training: Any) -> Job:
    """A job of training."""
    network = adapters.read(model)
    batches = [Batch((data,), labels=labels, size=len(data))]
    return Job(
        model,
        network,
        find_cell("torch", "quantization_aware", ".pt2"),
        {one.name: bits for one in network.layers},
        training=Training(batches, **training),
        example=Batch((data[:2],), size=2),
    )


def test_a_trained_module_is_a_float_copy_that_rounds_better() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(4, 8, 3, bias=False), nn.BatchNorm1d(8, affine=False), nn.Flatten(), nn.Linear(48, 3)
    )
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    data = numbers(64, 4, 8)
    module, epochs, steps = trained_module(
        job(model.double(), data, bits=2, epochs=4, learning_rate=3e-3, batch_size=16)
    )
    assert epochs[-1].loss < 0.7 * epochs[0].loss
    assert not module.training
    assert list(module.state_dict()) == list(model.state_dict())
    assert torch.equal(module[1].running_mean, model[1].running_mean.float())
    assert not torch.equal(module[0].weight, model[0].weight.float())
    assert model[0].weight.grad is None
    assert model[0].weight.requires_grad
    assert {name: step.shape for name, step in steps.items()} == {"0": (8,), "3": (3,)}


def test_training_is_watched_and_takes_the_same_steps_each_time() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3)).eval()
    data, labels = numbers(20, 6), np.arange(20) % 3
    seen: list[TrainingStep] = []
    settings: dict[str, Any] = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-2}
    first = trained_module(job(model, data, labels, watch=seen.append, **settings))
    second = trained_module(job(model, data, labels, **settings))
    other = trained_module(job(model, data, labels, seed=1, **settings))
    assert [(one.epoch, one.step, one.steps) for one in seen] == [(e, s, 3) for e in (1, 2) for s in (1, 2, 3)]
    assert first.epochs[-1].loss != seen[-1].loss  # which is of the way there, with dropout
    assert 0 <= (seen[0].accuracy or 0) <= 1
    assert first[1] == second[1]
    assert all(torch.equal(one, two) for one, two in zip(first[0].parameters(), second[0].parameters(), strict=True))
    assert not torch.equal(first[0][0].weight, other[0][0].weight)


def test_losses_are_what_they_are_called() -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.Softmax(-1)).eval()
    data, labels = numbers(20, 6), np.arange(20) % 3
    exact = model(torch.tensor(data)).detach()
    (likelihood,) = trained_module(job(model, data, labels, epochs=0))[1]
    assert likelihood.loss == pytest.approx(float(-exact.log()[torch.arange(20), labels].mean()), abs=0.02)
    assert likelihood.accuracy == pytest.approx(float((exact.argmax(1).numpy() == labels).mean()), abs=0.11)
    (squared,) = trained_module(job(model, data, numbers(20, 3), epochs=0))[1]
    assert squared.loss == pytest.approx(float((exact - torch.tensor(numbers(20, 3))).square().mean()), abs=0.02)
    assert squared.accuracy is None
    own = trained_module(job(model, data, labels, epochs=0, loss=lambda outputs, _: outputs[:, 0] * 0 + 7))[1]
    assert own[0].loss == pytest.approx(7)


@pytest.mark.parametrize(
    ("labels", "settings", "message"),
    [
        (np.full(20, 3), {}, "labels: they go from 3 to 3, and the model has 3 classes"),
        (np.zeros((20, 2), int), {}, r"labels: their shape is \(2, 2\)"),
        (numbers(20, 5), {}, r"labels: their shape is \(2, 5\)"),
        (None, {"loss": "mse"}, "loss: the training data have no labels"),
        (np.zeros(20, int), {"loss": "hinge"}, "loss: got 'hinge', expected one of"),
        (np.zeros(20, int), {"loss": lambda *_: 1 / 0}, "loss: it failed with ZeroDivisionError"),
    ],
)
def test_labels_that_do_not_fit_are_refused_before_training(
    labels: Any, settings: dict[str, Any], message: str
) -> None:
    from qvis.quantization.backends import pt2e

    with pytest.raises(BadArgumentError, match=message):
        pt2e.check(job(nn.Linear(6, 3), numbers(20, 6), labels, **settings))


def test_a_learning_rate_at_which_numbers_overflow_is_named() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    with pytest.raises(BadArgumentError, match=r"learning_rate: got 1e\+30, and the loss is"):
        trained_module(job(model, numbers(20, 6), numbers(20, 3), learning_rate=1e30, batch_size=4))


def test_parts_of_one_tensor_have_one_width(tmp_path: Path) -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Any) -> Any:
            return self.attention(x, x, x)[0]

    with pytest.raises(BadArgumentError, match="parts of one tensor, and have widths 4, 8, 8; give them the same"):
        qvis.quantize(
            Attending(), tmp_path / "q.pt2", calibration_data=numbers(4, 3, 8), bits={"attention.in_proj_weight.q": 4}
        )
    assert not (tmp_path / "q.pt2").exists()


def test_what_cannot_be_followed_is_refused_with_a_way_out(tmp_path: Path) -> None:
    class Choosing(nn.Linear):
        def forward(self, x: Any) -> Any:
            return super().forward(x) if float(x.detach().sum()) > 0 else x

    with pytest.raises(UnsupportedModelError, match=r"torch.export cannot follow it .* or write .safetensors"):
        qvis.quantize(Choosing(4, 4), tmp_path / "q.pt2", calibration_data=numbers(4, 4))
    with pytest.raises(UnsupportedModelError, match="has a shape but no numbers"):
        qvis.quantize(nn.Linear(4, 4, device="meta"), tmp_path / "q.pt2", calibration_data=numbers(4, 4))
    with pytest.raises(BadArgumentError, match="example_inputs"):
        qvis.quantize(nn.Linear(4, 4), tmp_path / "q.pt2", "weight_only")


def test_a_model_of_one_batch_size_gives_a_file_of_that_size(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: Any) -> Any:
            return self.inner(x.reshape(4, 6)).sum(0, keepdim=True).expand(4, 6) + x

    batches = [Batch((numbers(4, 6),), size=4), Batch((numbers(4, 6) * 2,), size=4)]
    made = qvis.quantize(Fixed(), tmp_path / "q.pt2", calibration_data=batches)
    assert any("takes 4 at once" in note for note in made.notes)
    assert open_engine(made.path).fixed_batch == 4


def test_an_exported_program_is_quantized_as_its_module_is(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    data = numbers(16, 6)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (torch.tensor(data[:2]),), dynamic_shapes=shapes)
    first = qvis.quantize(model, tmp_path / "a.pt2", calibration_data=data)
    second = qvis.quantize(program, tmp_path / "b.pt2", calibration_data=data)
    batch = Batch((data,), size=16)
    assert np.array_equal(open_engine(first.path).run(batch)[0], open_engine(second.path).run(batch)[0])
    assert torch.equal(program.state_dict["0.weight"], model[0].weight)


def test_the_report_of_a_quantized_file_shows_its_weights() -> None:
    analysis = qvis.analyze(digits("post_training").path)
    assert len(analysis.layers) == 18
    assert all(one.rounded for one in analysis.layers)
    assert analysis.parameters == sum(layer.weights for layer in analysis.layers) + sum(
        one.numel() for name, one in load_digits_model(folded=True).named_parameters() if name.endswith("bias")
    )
    assert pictures()[0].shape == (1797, 1, 8, 8)


def test_inputs_that_the_model_cannot_take_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        BadArgumentError, match="calibration_data: the model fails on inputs of 2x5 float32 with Runtime"
    ):
        qvis.quantize(nn.Linear(6, 3), tmp_path / "net.pt2", calibration_data=numbers(8, 5))
    with pytest.raises(BadArgumentError, match="train_data: the model fails on inputs of x=2x6 float32 with TypeError"):
        qvis.quantize(
            nn.Linear(6, 3),
            tmp_path / "net.onnx",
            "quantization_aware",
            train_data={"x": numbers(8, 6), "y": np.arange(8) % 3},
        )
    assert list(tmp_path.iterdir()) == []
