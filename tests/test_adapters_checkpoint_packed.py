"""How weights of few bits are unpacked: against implementations that go number by number, straight from the formats.

GPTQ is laid out as AutoGPTQ's ``QuantLinear.pack`` does it, AWQ as AutoAWQ's ``WQLinear_GEMM.from_linear``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from qvis import adapters
from qvis.layers import Layer, Network

Array = NDArray[Any]
INPUTS, OUTPUTS, GROUP = 64, 48, 16


def as_int32(value: int) -> int:
    return value - 2**32 if value >= 2**31 else value


def codes_of(bits: int, seed: int = 0) -> tuple[Array, Array, Array]:
    """Codes (in, out), zero points (groups, out) and scales (groups, out) at random."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (INPUTS, OUTPUTS))
    zeros = rng.integers(1, 2**bits, (INPUTS // GROUP, OUTPUTS))
    return codes, zeros, rng.uniform(0.01, 0.1, zeros.shape).astype(np.float16)


def naive_weight(codes: Array, zeros: Array, scales: Array, group: Any) -> Array:
    weight = np.empty((OUTPUTS, INPUTS), np.float32)
    for i in range(INPUTS):
        for o in range(OUTPUTS):
            g = group(i)
            weight[o, i] = float(scales[g, o]) * (int(codes[i, o]) - int(zeros[g, o]))
    return weight


def pack(numbers: Array, bits: int, axis: int, order: tuple[int, ...] | None = None) -> Array:
    """Integer after integer, each of 32 / bits numbers along an axis; number ``order[k]`` in its k-th lowest bits."""
    count = 32 // bits
    order = order or tuple(range(count))
    if axis == 0:
        return pack(numbers.T, bits, 1, order).T.copy()
    packed = np.zeros((numbers.shape[0], numbers.shape[1] // count), np.int32)
    for row in range(packed.shape[0]):
        for column in range(packed.shape[1]):
            value = 0
            for place in range(count):
                value |= int(numbers[row, column * count + order[place]]) << (bits * place)
            packed[row, column] = as_int32(value)
    return packed


def gptq(bits: int, stored_less: int = 1, shuffled: bool = False) -> tuple[dict[str, Array], Array]:
    codes, zeros, scales = codes_of(bits)
    g_idx = np.arange(INPUTS, dtype=np.int32) // GROUP
    if shuffled:
        np.random.default_rng(1).shuffle(g_idx)
    tensors = {
        "fc.qweight": pack(codes, bits, axis=0),
        "fc.qzeros": pack(zeros - stored_less, bits, axis=1),
        "fc.scales": scales,
        "fc.g_idx": g_idx,
        "fc.bias": np.zeros(OUTPUTS, np.float16),
        "norm.weight": np.ones(3, np.float16),
    }
    return tensors, naive_weight(codes, zeros, scales, lambda i: g_idx[i])


def awq() -> tuple[dict[str, Array], Array]:
    codes, zeros, scales = codes_of(4)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {
        "fc.qweight": pack(codes, 4, axis=1, order=order),
        "fc.qzeros": pack(zeros, 4, axis=1, order=order),
        "fc.scales": scales,
    }
    return tensors, naive_weight(codes, zeros, scales, lambda i: i // GROUP)


def read(tensors: dict[str, Array], folder: Path, config: dict[str, Any] | None = None) -> Network:
    """What is read of a folder with these tensors, and one plain layer."""
    tensors = {**tensors, "other.weight": np.ones((2, 2), np.float32)}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return adapters.read(folder)


def the_layer(network: Network) -> Layer:
    assert [layer.name for layer in network.layers] == ["fc", "other"]
    assert not network.skipped
    return network.layers[0]


def the_reason(network: Network) -> str:
    assert [layer.name for layer in network.layers] == ["other"]
    ((name, reason),) = ((one.name, one.reason) for one in network.skipped)
    assert name == "fc"
    return reason


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(("form", "stored_less"), [("gptq", 1), ("gptq_v2", 0)])
def test_gptq_is_dequantized_exactly(bits: int, shuffled: bool, form: str, stored_less: int, tmp_path: Path) -> None:
    tensors, expected = gptq(bits, stored_less, shuffled)
    config = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "checkpoint_format": form}
    network = read(tensors, tmp_path, config)
    layer = the_layer(network)
    np.testing.assert_array_equal(layer.weight, expected)
    assert (layer.shape, layer.dtype, layer.op) == ((OUTPUTS, INPUTS), f"int{bits}", "Linear")
    assert layer.notes == (f"dequantized from GPTQ, {bits} bits in groups of 16 inputs",)
    assert network.parameters == INPUTS * OUTPUTS + OUTPUTS + 3 + 4


def test_gptq_without_an_index_of_groups_has_them_in_order(tmp_path: Path) -> None:
    tensors, expected = gptq(4)
    del tensors["fc.g_idx"]
    np.testing.assert_array_equal(the_layer(read(tensors, tmp_path, {"quant_method": "gptq"})).weight, expected)


def test_an_older_configuration_file_of_gptq_is_found(tmp_path: Path) -> None:
    tensors, expected = gptq(4)
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": 16, "desc_act": false}')
    np.testing.assert_array_equal(the_layer(read(tensors, tmp_path)).weight, expected)


@pytest.mark.parametrize("stored", [7, 8])
def test_without_a_configuration_symmetric_zero_points_tell_the_format(stored: int, tmp_path: Path) -> None:
    tensors, _ = gptq(4)
    codes, zeros, scales = codes_of(4)
    tensors["fc.qzeros"] = pack(np.full_like(zeros, stored), 4, axis=1)
    expected = naive_weight(codes, np.full_like(zeros, 8), scales, lambda i: i // GROUP)
    np.testing.assert_array_equal(the_layer(read(tensors, tmp_path)).weight, expected)


def test_a_zero_point_of_zero_stored_less_one_is_zero(tmp_path: Path) -> None:
    tensors, _ = gptq(4)
    codes, zeros, scales = codes_of(4)
    tensors["fc.qzeros"] = np.full_like(tensors["fc.qzeros"], -1)
    expected = naive_weight(codes, np.zeros_like(zeros), scales, lambda i: i // GROUP)
    np.testing.assert_array_equal(the_layer(read(tensors, tmp_path, {"quant_method": "gptq"})).weight, expected)


@pytest.mark.parametrize("config", [None, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}])
def test_awq_is_dequantized_exactly(config: dict[str, Any] | None, tmp_path: Path) -> None:
    tensors, expected = awq()
    layer = the_layer(read(tensors, tmp_path, config))
    np.testing.assert_array_equal(layer.weight, expected)
    assert layer.notes == ("dequantized from AWQ, 4 bits in groups of 16 inputs",)


@pytest.mark.parametrize(
    ("config", "change", "reason"),
    [
        (None, {}, "without a quantization_config in a config.json beside it nothing says whether"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, {}, "in the format 'marlin'"),
        ({"quant_method": "gptq", "bits": 3}, {}, "in a way that qvis does not know"),
        ({"quant_method": "bitblas"}, {}, "in a way that qvis does not know"),
        ({"quant_method": "gptq"}, {"fc.g_idx": np.full(INPUTS, 4, np.int32)}, "its g_idx does not give the group"),
        ({"quant_method": "gptq"}, {"fc.g_idx": np.zeros(3, np.int32)}, "its g_idx does not give the group"),
        ({"quant_method": "gptq"}, {"fc.scales": None}, "has no 'qzeros' or no 'scales' beside it"),
        ({"quant_method": "gptq"}, {"fc.scales": np.ones((5, OUTPUTS), np.float16)}, "does not know"),
        ({"quant_method": "gptq"}, {"fc.scales": np.ones(OUTPUTS, np.float16)}, "its parts are no matrices"),
        ({"quant_method": "gptq"}, {"fc.qzeros": np.ones((4, 5), np.int32)}, "does not know"),
    ],
)
def test_a_scheme_that_is_not_certain_is_skipped_with_the_reason(
    config: dict[str, Any] | None, change: dict[str, Array | None], reason: str, tmp_path: Path
) -> None:
    changed = {**gptq(4)[0], **change}
    tensors = {name: tensor for name, tensor in changed.items() if tensor is not None}
    found = the_reason(read(tensors, tmp_path, config))
    assert found.startswith("is packed")
    assert reason in found


def test_another_version_of_awq_is_skipped_with_the_reason(tmp_path: Path) -> None:
    assert "AWQ for 'gemv'" in the_reason(read(awq()[0], tmp_path, {"quant_method": "awq", "version": "gemv"}))


# ---------------------------------------------------------------------------------------------------------------------
# Eight bits with a scale


def ints(shape: tuple[int, ...], dtype: str = "int8") -> Array:
    info = np.iinfo(dtype)
    return np.random.default_rng(0).integers(info.min, info.max + 1, shape).astype(dtype)


def float8s(shape: tuple[int, ...]) -> Array:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)


def scales_of(*shape: int) -> Array:
    return np.random.default_rng(1).uniform(0.5, 2, shape).astype(np.float32)


@pytest.mark.parametrize("make", [ints, float8s])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (6,), (6, 1)])
def test_a_scale_for_all_or_for_each_output_is_taken_in(make: Any, shape: tuple[int, ...], tmp_path: Path) -> None:
    weight, scale = make((6, 10)), scales_of(*shape)
    layer = the_layer(read({"fc.weight": weight, "fc.weight_scale": scale}, tmp_path))
    expected = weight.astype(np.float32) * (scale.reshape(-1, 1) if scale.size > 1 else scale.reshape(()))
    np.testing.assert_array_equal(layer.weight, expected)
    assert layer.notes[0].startswith(f"dequantized from {layer.dtype} with weight_scale, one scale for ")


@pytest.mark.parametrize(("shape", "block"), [((300, 260), None), ((256, 128), None), ((30, 26), [10, 10])])
def test_scales_of_blocks_are_taken_in(shape: tuple[int, int], block: list[int] | None, tmp_path: Path) -> None:
    weight = float8s(shape)
    rows, columns = block or (128, 128)
    scale = scales_of(-(-shape[0] // rows), -(-shape[1] // columns))
    config = {"quant_method": "fp8", **({"weight_block_size": block} if block else {})}
    layer = the_layer(read({"fc.weight": weight, "fc.weight_scale_inv": scale}, tmp_path, config))
    expected = np.empty(shape, np.float32)
    for row in range(shape[0]):
        for column in range(shape[1]):
            expected[row, column] = np.float32(weight[row, column]) * scale[row // rows, column // columns]
    np.testing.assert_array_equal(layer.weight, expected)
    assert "for each" in layer.notes[0]


def test_groups_along_the_inputs_zero_points_and_stacked_experts_are_taken_in(tmp_path: Path) -> None:
    weight, scale, zero = ints((6, 12), "uint8"), scales_of(6, 3), ints((6, 3), "uint8")
    tensors = {"fc.weight": weight, "fc.weight_scale": scale, "fc.weight_zero_point": zero}
    spread = [np.repeat(one.astype(np.float32), 4, axis=1) for one in (scale, zero)]
    np.testing.assert_array_equal(the_layer(read(tensors, tmp_path)).weight, (weight - spread[1]) * spread[0])
    experts, scale = ints((3, 4, 5)), scales_of(3, 4, 1)
    layer = the_layer(read({"fc": experts, "fc_scale": scale}, tmp_path))
    np.testing.assert_array_equal(layer.weight, (experts * scale).reshape(3, -1))


def test_the_scales_of_bitsandbytes_are_127_times_as_large(tmp_path: Path) -> None:
    weight, scale = ints((6, 10)), scales_of(6)
    layer = the_layer(read({"fc.weight": weight, "fc.SCB": scale}, tmp_path))
    np.testing.assert_allclose(layer.weight, weight * scale[:, None] / 127, rtol=1e-6)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"fc.weight_scale": scales_of(7)}, r"whose scale is not certain: 'fc.weight_scale' has shape \[7\]"),
        ({"fc.weight_scale": scales_of(4, 4)}, "whose scale is not certain"),
        ({"fc.weight_scale": scales_of(6), "fc.weight_zero_point": ints((5,))}, "whose scale is not certain"),
        ({"fc.scale": scales_of(1), "fc.zero_point": ints((1,))}, "how 'fc.scale' and 'fc.zero_point' beside it apply"),
        ({}, "do not say how to turn them back"),
    ],
)
def test_integers_whose_scale_is_not_certain_are_skipped(
    tensors: dict[str, Array], reason: str, tmp_path: Path
) -> None:
    import re

    assert re.search(reason, the_reason(read({"fc.weight": ints((6, 10)), **tensors}, tmp_path)))


def test_packed_bytes_of_bitsandbytes_are_skipped(tmp_path: Path) -> None:
    tensors = {"fc.weight": ints((30, 1), "uint8"), "fc.weight.absmax": scales_of(1)}
    assert "of bitsandbytes beside it apply" in the_reason(read(tensors, tmp_path))


def test_float8_with_a_scale_that_does_not_fit_is_shown_as_stored(tmp_path: Path) -> None:
    weight = float8s((6, 10))
    layer = the_layer(read({"fc.weight": weight, "fc.weight_scale": scales_of(7)}, tmp_path))
    np.testing.assert_array_equal(layer.weight, weight.astype(np.float32))
    assert "shown as stored, without its scale" in layer.notes[0]
