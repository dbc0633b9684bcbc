"""What is read from live PyTorch modules."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qvis import adapters
from qvis.errors import UnsupportedModelError
from qvis.layers import Layer, Network
from tests import zoo


def layers(model: nn.Module) -> dict[str, Layer]:
    return {layer.name: layer for layer in adapters.read(model).layers}


def only(model: nn.Module) -> Layer:
    (layer,) = adapters.read(model).layers
    return layer


def rows_by_impulses(module: nn.Module, inputs: int, dims: int, size: int) -> list[np.ndarray[Any, Any]]:
    """The weights that reach each output channel, found by sending unit impulses through the layer, sorted."""
    found: list[list[float]] = []
    responses = []
    for channel in range(inputs):
        impulse = torch.zeros(1, inputs, *[size] * dims)
        impulse[(0, channel, *[size // 2] * dims)] = 1
        with torch.no_grad():
            responses.append(module(impulse)[0].flatten(1))
    for output in range(responses[0].shape[0]):
        row = torch.cat([response[output] for response in responses])
        found.append(sorted(row[row != 0].tolist()))
    return [np.array(row, np.float32) for row in found]


CONVOLUTIONS = [
    (cls, groups, dims)
    for dims, pair in enumerate(
        ((nn.Conv1d, nn.ConvTranspose1d), (nn.Conv2d, nn.ConvTranspose2d), (nn.Conv3d, nn.ConvTranspose3d)), start=1
    )
    for cls in pair
    for groups in (1, 2, 4)
]


@pytest.mark.parametrize(("cls", "groups", "dims"), CONVOLUTIONS)
def test_rows_of_a_convolution_are_what_reaches_its_output_channels(
    cls: type[nn.Module], groups: int, dims: int
) -> None:
    module = cls(4, 8, 3, groups=groups, bias=False)
    layer = only(module)
    expected = rows_by_impulses(module, 4, dims, size=7)
    assert layer.op == cls.__name__
    assert layer.shape == tuple(module.weight.shape)
    assert layer.weight.shape == (8, 4 // groups * 3**dims)
    for row, reached in zip(layer.weight, expected, strict=True):
        np.testing.assert_allclose(np.sort(row), reached)


def test_rows_of_a_linear_layer_are_its_output_features() -> None:
    module = nn.Linear(3, 5)
    np.testing.assert_array_equal(only(module).weight, module.weight.detach().numpy())


def test_rows_of_a_bilinear_layer_are_its_output_features() -> None:
    module = nn.Bilinear(2, 3, 4, bias=False)
    first, second = torch.randn(2), torch.randn(3)
    expected = module(first, second).detach().numpy()
    np.testing.assert_allclose(only(module).weight @ np.outer(first, second).ravel(), expected, rtol=1e-5)


@pytest.mark.parametrize("cls", [nn.Embedding, nn.EmbeddingBag])
def test_rows_of_an_embedding_are_its_entries(cls: Any) -> None:
    module = cls(6, 4)
    layer = only(module)
    assert layer.op == cls.__name__
    np.testing.assert_array_equal(layer.weight, module.weight.detach().numpy())


def test_attention_is_split_into_query_key_and_value() -> None:
    found = layers(nn.ModuleDict({"attn": nn.MultiheadAttention(6, 2, add_bias_kv=True)}))
    assert list(found) == ["attn.in_proj_weight.q", "attn.in_proj_weight.k", "attn.in_proj_weight.v", "attn.out_proj"]
    assert found["attn.in_proj_weight.k"].op == "MultiheadAttention"
    assert found["attn.in_proj_weight.k"].shape == (6, 6)
    assert found["attn.out_proj"].op == "Linear"


def test_the_parts_of_attention_make_its_queries_keys_and_values() -> None:
    module = nn.MultiheadAttention(4, 1, bias=False)
    found = layers(module)
    query, key, value = (torch.randn(5, 4) for _ in range(3))
    inputs = ((query, "q"), (key, "k"), (value, "v"))
    q, k, v = (x.numpy() @ found[f"in_proj_weight.{part}"].weight.T for x, part in inputs)
    scores = np.exp(q @ k.T / 2)
    expected = scores / scores.sum(1, keepdims=True) @ v @ found["out_proj"].weight.T
    with torch.no_grad():
        np.testing.assert_allclose(module(query, key, value)[0].numpy(), expected, rtol=1e-4, atol=1e-6)


def test_attention_with_separate_projections_lists_each() -> None:
    found = layers(nn.MultiheadAttention(4, 2, kdim=3, vdim=5))
    shapes = {name: layer.shape for name, layer in found.items()}
    assert shapes == {"q_proj_weight": (4, 4), "k_proj_weight": (4, 3), "v_proj_weight": (4, 5), "out_proj": (4, 4)}


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def test_the_gates_of_an_lstm_cell_are_named_as_they_act() -> None:
    cell = nn.LSTMCell(3, 2, bias=False)
    found = layers(cell)
    x, h, c = np.ones(3), np.full(2, 0.5), np.full(2, -0.3)
    gate = {g: found[f"weight_ih.{g}"].weight @ x + found[f"weight_hh.{g}"].weight @ h for g in "ifgo"}
    state = sigmoid(gate["f"]) * c + sigmoid(gate["i"]) * np.tanh(gate["g"])
    with torch.no_grad():
        tensors = [torch.tensor(value, dtype=torch.float32)[None] for value in (x, h, c)]
        new_h, new_c = cell(tensors[0], (tensors[1], tensors[2]))
    np.testing.assert_allclose(new_c[0].numpy(), state, rtol=1e-5)
    np.testing.assert_allclose(new_h[0].numpy(), sigmoid(gate["o"]) * np.tanh(state), rtol=1e-5)


def test_the_gates_of_a_gru_cell_are_named_as_they_act() -> None:
    cell = nn.GRUCell(3, 2, bias=False)
    found = layers(cell)
    x, h = np.ones(3), np.full(2, 0.5)
    inputs = {g: found[f"weight_ih.{g}"].weight @ x for g in "rzn"}
    hidden = {g: found[f"weight_hh.{g}"].weight @ h for g in "rzn"}
    update = sigmoid(inputs["z"] + hidden["z"])
    new = np.tanh(inputs["n"] + sigmoid(inputs["r"] + hidden["r"]) * hidden["n"])
    with torch.no_grad():
        got = cell(torch.ones(1, 3), torch.full((1, 2), 0.5))[0].numpy()
    np.testing.assert_allclose(got, (1 - update) * new + update * h, rtol=1e-5)


def test_every_layer_and_direction_of_an_lstm_is_listed_by_gate() -> None:
    found = layers(nn.ModuleDict({"lstm": nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2)}))
    assert len(found) == 2 * 2 * (4 + 4 + 1)
    assert found["lstm.weight_hh_l1_reverse.o"].shape == (4, 2)
    assert found["lstm.weight_hr_l0"].shape == (2, 4)
    assert {layer.op for layer in found.values()} == {"LSTM"}


def test_a_plain_recurrent_layer_has_no_gates() -> None:
    assert list(layers(nn.RNN(3, 4))) == ["weight_ih_l0", "weight_hh_l0"]
    assert list(layers(nn.RNNCell(3, 4))) == ["weight_ih", "weight_hh"]


def test_parameters_of_unknown_modules_are_listed_as_other() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(3, 4, 2))
            self.gain = nn.Parameter(torch.ones(3))
            self.extras = nn.ParameterList([nn.Parameter(torch.ones(2, 2))])
            self.named = nn.ParameterDict({"a": nn.Parameter(torch.ones(2, 5))})
            self.norm = nn.BatchNorm1d(3)

    found = layers(Scaled())
    assert list(found) == ["table", "extras.0", "named.a"]
    assert {layer.op for layer in found.values()} == {"other"}
    assert found["table"].weight.shape == (3, 8)


def test_a_subclass_counts_as_the_layer_it_extends_and_its_own_parameters_as_other() -> None:
    class Adapted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 4)
            self.low_rank = nn.Parameter(torch.zeros(2, 3))

    found = layers(nn.Sequential(Adapted()))
    assert {name: layer.op for name, layer in found.items()} == {"0": "Linear", "0.low_rank": "other"}


def test_the_outermost_module_is_called_root() -> None:
    assert only(nn.Linear(2, 2)).name == "(root)"


def test_the_transposed_linear_layer_of_transformers_has_its_outputs_along_axis_1() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 5))

    Conv1D.__module__ = "transformers.pytorch_utils"
    module = Conv1D()
    np.testing.assert_array_equal(only(module).weight, module.weight.detach().numpy().T)


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.float64, np.float64),
        (torch.float16, np.float32),
        (torch.bfloat16, np.float32),
        (torch.float8_e4m3fn, np.float32),
        (torch.float8_e5m2, np.float32),
    ],
)
def test_every_float_type_is_read_exactly(dtype: torch.dtype, kept: type) -> None:
    module = nn.Linear(3, 4)
    module.weight = nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)
    layer = only(module)
    assert layer.weight.dtype == kept
    assert layer.dtype == str(dtype).removeprefix("torch.")
    np.testing.assert_array_equal(layer.weight, module.weight.to(torch.float64).numpy())


def test_float32_weights_share_memory_with_the_model_and_cannot_be_written() -> None:
    module = nn.Conv2d(2, 3, 3)
    weight = only(module).weight
    assert np.shares_memory(weight, module.weight.detach().numpy())
    assert not weight.flags.writeable


def test_weights_in_channels_last_order_are_read_as_any_other() -> None:
    module = nn.Conv2d(2, 3, 3)
    expected = only(module).weight.copy()
    np.testing.assert_array_equal(only(module.to(memory_format=torch.channels_last)).weight, expected)


@pytest.mark.parametrize(
    "normalize",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.orthogonal,
        nn.utils.spectral_norm,
        pytest.param(nn.utils.weight_norm, marks=pytest.mark.filterwarnings("ignore::FutureWarning")),
    ],
)
def test_parametrized_weights_are_the_ones_that_evaluation_uses(normalize: Any) -> None:
    module = normalize(nn.Linear(4, 4, bias=False))
    network = adapters.read(nn.Sequential(module))
    (layer,) = network.layers
    assert (layer.name, layer.op) == ("0", "Linear")
    assert "computed from its parameters" in layer.notes[0]
    with torch.no_grad():
        expected = module.eval()(torch.eye(4)).T.numpy()
    np.testing.assert_allclose(layer.weight, expected, rtol=1e-5, atol=1e-7)


def test_a_stale_weight_is_computed_anew() -> None:
    module = nn.utils.spectral_norm(nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        module.weight_orig.mul_(-3)
    with torch.no_grad():
        expected = module.eval()(torch.eye(4)).T.numpy()
    np.testing.assert_allclose(only(module).weight, expected, rtol=1e-5)


def test_pruned_weights_are_read_with_their_mask() -> None:
    from torch.nn.utils import prune

    module = nn.Linear(4, 4)
    prune.l1_unstructured(module, "weight", amount=8)
    with torch.no_grad():
        module.weight_orig.mul_(2)
    layer = only(module)
    assert (layer.weight == 0).sum() == 8
    np.testing.assert_array_equal(layer.weight, (module.weight_orig * module.weight_mask).detach().numpy())


def test_parameters_are_counted_once() -> None:
    model = zoo.seeded(zoo.Sequences)
    assert adapters.read(model).parameters == sum(parameter.numel() for parameter in model.parameters())
    model = zoo.seeded(zoo.Unsettled)
    assert adapters.read(model).parameters == sum(parameter.numel() for parameter in model.parameters())


def test_tied_weights_appear_once_with_all_their_names() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False), "copy": nn.Linear(4, 6)})
    model["head"].weight = model["embed"].weight
    model["copy"].weight = nn.Parameter(model["embed"].weight.detach())  # another parameter, the same memory
    network = adapters.read(model)
    (layer,) = network.layers
    assert (layer.name, layer.op, layer.aliases) == ("embed", "Embedding", ("head", "copy"))
    assert network.parameters == 6 * 4 + 6


def test_equal_weights_in_different_memory_are_different_layers() -> None:
    first = nn.Linear(2, 2)
    assert list(layers(nn.Sequential(first, copy.deepcopy(first)))) == ["0", "1"]


def test_a_module_used_twice_appears_once() -> None:
    shared = nn.MultiheadAttention(4, 1)
    found = layers(nn.ModuleDict({"a": shared, "b": shared}))
    assert found["a.in_proj_weight.q"].aliases == ("b.in_proj_weight.q",)
    assert len(found) == 4


def test_a_tied_weight_with_other_output_channels_says_so() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 2), nn.ConvTranspose1d(4, 3, 2))
    model[1].weight = model[0].weight
    (note,) = only(model).notes
    assert "1 (ConvTranspose1d) uses the same tensor with its output channels along axis 1" in note


def test_a_module_that_contains_itself_is_read() -> None:
    model = nn.Module()
    model.inner = nn.Linear(2, 2)
    model.inner.parent = model
    assert list(layers(model)) == ["inner"]


def test_compiled_modules_have_the_names_of_what_they_compile() -> None:
    model = nn.Sequential(torch.compile(nn.Linear(2, 2)), nn.Linear(2, 2))
    network = adapters.read(torch.compile(model))
    assert network.name == "Sequential"
    assert [layer.name for layer in network.layers] == ["0", "1"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules_are_read_like_their_originals() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.LSTM(3, 2)).eval()
    original, scripted = adapters.read(model), adapters.read(torch.jit.script(model))
    assert scripted.name == "Sequential"
    assert_same(original, scripted)


def test_data_parallel_keeps_its_names() -> None:
    assert list(layers(nn.DataParallel(nn.Sequential(nn.Linear(2, 2))))) == ["module.0"]


def assert_same(first: Network, second: Network) -> None:
    assert [(one.name, one.op, one.shape, one.channels, one.aliases) for one in first.layers] == [
        (one.name, one.op, one.shape, one.channels, one.aliases) for one in second.layers
    ]
    for one, other in zip(first.layers, second.layers, strict=True):
        np.testing.assert_array_equal(one.weight, other.weight)


# What cannot be read


def test_an_uninitialized_layer_says_to_run_the_model() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'0' \(Linear\) is not initialized yet; run the model once"):
        adapters.read(nn.Sequential(nn.LazyLinear(3)))


def test_a_lazy_layer_is_read_once_it_has_run() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3))
    model(torch.zeros(1, 2, 5, 5))
    assert only(model).op == "Conv2d"


def test_meta_weights_say_to_load_them() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'0' \(Linear\) has a shape but no numbers.*load the weights"):
        adapters.read(nn.Sequential(nn.Linear(2, 2, device="meta")))


@pytest.mark.parametrize("to_sparse", [Tensor.to_sparse, Tensor.to_sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_sparse_weights_say_to_make_them_dense(to_sparse: Any) -> None:
    module = nn.Linear(2, 2)
    module.weight = nn.Parameter(to_sparse(module.weight.detach()))
    with pytest.raises(UnsupportedModelError, match=r"'\(root\)' \(Linear\) is sparse \(sparse_c.*to_dense"):
        adapters.read(module)


def test_what_cannot_be_reported_on_is_named_with_its_reason() -> None:
    model = nn.ModuleDict(
        {"fine": nn.Linear(2, 2), "complex": nn.Linear(2, 2), "packed": nn.Linear(2, 2), "flat": nn.Linear(2, 2)}
    )
    model["complex"].weight = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    model["packed"].weight = nn.Parameter(torch.ones(2, 2, dtype=torch.uint8), requires_grad=False)
    model["flat"].weight = nn.Parameter(torch.ones(4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about empty layers
        model["empty"] = nn.Linear(2, 0)
    network = adapters.read(model)
    assert [layer.name for layer in network.layers] == ["fine"]
    reasons = {skipped.name: skipped.reason for skipped in network.skipped}
    assert "complex64" in reasons["complex"]
    assert "integers (uint8)" in reasons["packed"]
    assert "1 axes" in reasons["flat"]
    assert "no elements" in reasons["empty"]


def test_a_property_that_raises_and_an_uncopyable_member_do_no_harm() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.library = np

        @property
        def weight(self) -> Tensor:
            raise RuntimeError("not to be asked")

        groups = parametrizations = original_name = weight

    assert only(Odd()).name == "linear"


# Quantized weights


@pytest.mark.filterwarnings("ignore")
def test_quantized_modules_are_dequantized_and_say_so() -> None:
    import torch.ao.nn.quantized as quantized

    module = quantized.Linear(3, 4)
    weight = torch.quantize_per_tensor(torch.randn(4, 3), 0.1, 0, torch.qint8)
    module.set_weight_bias(weight, None)
    layer = only(nn.Sequential(module))
    assert (layer.name, layer.op, layer.dtype) == ("0", "Linear", "qint8")
    assert layer.notes == ("dequantized from qint8",)
    np.testing.assert_array_equal(layer.weight, weight.dequantize().numpy())


@pytest.mark.filterwarnings("ignore")
def test_packed_recurrent_layers_are_named_as_skipped() -> None:
    model = nn.ModuleDict({"lstm": nn.LSTM(4, 3), "linear": nn.Linear(3, 2)})
    network = adapters.read(torch.ao.quantization.quantize_dynamic(model, {nn.LSTM, nn.Linear}))
    assert [layer.name for layer in network.layers] == ["linear"]
    assert [skipped.name for skipped in network.skipped] == ["lstm"]
    assert network.parameters == 6


class Eighths(Tensor):
    """A weight in steps of 1/8, in the manner of torchao's tensors: it claims to be float32 and holds int8."""

    steps: Tensor

    @staticmethod
    def __new__(cls, steps: Tensor) -> Eighths:
        return Tensor._make_wrapper_subclass(cls, steps.shape, dtype=torch.float32)  # type: ignore[attr-defined]

    def __init__(self, steps: Tensor) -> None:
        self.steps = steps

    def dequantize(self) -> Tensor:
        return self.steps / 8

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "detach" in str(func):
            return cls(args[0].steps)
        raise NotImplementedError(f"{func} is not to be called")


def test_tensors_that_know_how_to_dequantize_themselves_are_asked() -> None:
    module = nn.Linear(2, 2)
    steps = torch.tensor([[1, 2], [3, -4]], dtype=torch.int8)
    module.weight = nn.Parameter(Eighths(steps), requires_grad=False)
    layer = only(module)
    assert layer.notes == ("dequantized from Eighths",)
    np.testing.assert_array_equal(layer.weight, steps.numpy() / 8)


# The model afterwards


def snapshot(model: nn.Module) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    modules = dict(model.named_modules())
    return {
        "state": buffer.getvalue(),
        "identities": {name: id(value) for name, value in model.state_dict(keep_vars=True).items()},
        "training": {name: module.training for name, module in modules.items()},
        "gradients": {name: id(parameter.grad) for name, parameter in model.named_parameters()},
        "requires": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "hooks": {
            name: [list(getattr(module, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
            for name, module in modules.items()
        },
        "attributes": {
            name: {key: id(value) for key, value in vars(module).items()} for name, module in modules.items()
        },
        "versions": {name: value._version for name, value in model.state_dict(keep_vars=True).items()},
        "random": torch.get_rng_state().numpy().tobytes(),
        "grad mode": torch.is_grad_enabled(),
    }


def test_reading_leaves_the_model_and_the_random_state_as_they_were() -> None:
    model = zoo.seeded(zoo.Unsettled).train()
    model(torch.randn(2, 3, 6, 6)).sum().backward()
    before = snapshot(model)
    for layer in adapters.read(model).layers:
        assert np.isfinite(layer.weight).all()
        assert np.isfinite(layer.weight).all()
    after = snapshot(model)
    assert {key for key in before if before[key] != after[key]} == set()


def test_a_random_parametrization_does_not_move_the_generator() -> None:
    class Noise(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + torch.randn_like(weight)

    module = nn.Linear(2, 2)
    nn.utils.parametrize.register_parametrization(module, "weight", Noise())
    before = torch.get_rng_state()
    _ = only(module).weight
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_weights_on_a_gpu_are_read_and_stay_there() -> None:
    model = zoo.seeded(zoo.Unsettled)
    expected = adapters.read(copy.deepcopy(model))
    on_gpu = model.cuda()
    found = adapters.read(on_gpu)
    for one, other in zip(expected.layers, found.layers, strict=True):
        np.testing.assert_allclose(one.weight, other.weight, rtol=1e-5, atol=1e-7)
    assert {parameter.device.type for parameter in on_gpu.parameters()} == {"cuda"}
