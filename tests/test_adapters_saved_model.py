"""What is read from what TensorFlow saves, without TensorFlow."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qvis
from qvis import adapters
from qvis.errors import BadArgumentError, QvisError
from tests import keras_models

keras = keras_models.require()
import tensorflow as tf  # noqa: E402

pytestmark = [*keras_models.QUIET, pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorflow.*")]


class Small(tf.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(name="small")
        rng = np.random.default_rng(0)
        self.matrix = tf.Variable(rng.normal(size=(3, 4)).astype(np.float32), name="weight")
        self.other = tf.Variable(rng.normal(size=(4, 4)).astype(np.float32), name="weight")
        self.half = tf.Variable(tf.cast(rng.normal(size=(4, 2)), tf.bfloat16), name="half")
        self.depthwise_kernel = tf.Variable(
            rng.normal(size=(3, 3, 4, 2)).astype(np.float32), name="block/depthwise_kernel"
        )
        self.bias = tf.Variable(np.zeros(4, np.float32), name="bias")
        self.tied = self.matrix

    @tf.function(input_signature=[tf.TensorSpec((None, 3))])  # type: ignore[untyped-decorator]
    def __call__(self, x: Any) -> Any:
        return x @ self.matrix @ self.other + self.bias


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    keras_models.digits().export(folder / "digits", verbose=False)
    tf.saved_model.save(Small(), folder / "small")
    return folder


def test_a_trained_model_has_the_same_statistics_as_in_memory(folder: Path) -> None:
    live, stored = qvis.analyze(keras_models.digits(), fold=False), qvis.analyze(folder / "digits")
    assert [(one.name, one.op, one.shape, one.channels) for one in stored.layers] == [
        (one.name, one.op, one.shape, one.channels) for one in live.layers
    ]
    assert stored.parameters == live.parameters
    for one, other in zip(live.layers, stored.layers, strict=True):
        np.testing.assert_allclose(other.statistics.q25, one.statistics.q25, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(other.statistics.range, one.statistics.range, rtol=1e-6, atol=1e-6)


def test_variables_are_read_by_name_and_shape(folder: Path) -> None:
    model = Small()
    found = {one.name: one for one in adapters.read(folder / "small").layers}
    assert {name: (one.op, one.dtype, one.channels) for name, one in found.items()} == {
        "weight": ("other", "float32", "axis 1"),
        "other": ("other", "float32", "axis 1"),  # two variables have one name: this one has that of its attribute
        "half": ("other", "bfloat16", "axis 1"),
        "block": ("DepthwiseConv2D", "float32", "axes 2 x 3"),
    }
    np.testing.assert_array_equal(found["weight"].weight, model.matrix.numpy().T)
    np.testing.assert_array_equal(found["other"].weight, model.other.numpy().T)
    np.testing.assert_array_equal(found["half"].weight, model.half.numpy().astype(np.float32).T)
    np.testing.assert_array_equal(found["block"].weight, model.depthwise_kernel.numpy().reshape(9, 8).T)


def test_a_module_in_memory_is_read_by_its_attributes() -> None:
    model = Small()
    found = {one.name: one for one in adapters.read(model).layers}
    assert set(found) == {"(root)", "matrix", "other", "half"}
    assert found["(root)"].op == "DepthwiseConv2D"
    assert found["matrix"].aliases == ("tied",)
    assert adapters.read(model).name == "Small"
    np.testing.assert_array_equal(found["matrix"].weight, model.matrix.numpy().T)


def test_the_optimizer_is_left_out(tmp_path: Path) -> None:
    layer = tf.Variable(np.ones((3, 2), np.float32), name="dense/kernel")
    slot = tf.Variable(np.ones((3, 2), np.float32), name="m")
    inner = tf.train.Checkpoint(kernel=slot, step=tf.Variable(1))
    tf.train.Checkpoint(layer=layer, optimizer=inner).write(str(tmp_path / "ckpt"))
    network = adapters.read(tmp_path / "ckpt.index")
    assert [(one.name, one.op) for one in network.layers] == [("dense", "Dense")]
    assert (network.name, network.parameters) == ("ckpt", 6)


def test_checkpoints_of_early_tensorflow_have_names_and_slots(tmp_path: Path) -> None:
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        for name in ("conv/kernel", "conv/kernel/Adam", "conv/kernel/Adam_1"):
            v1.get_variable(name, (3, 3, 2, 4))
        v1.get_variable("conv/biases", (4,))
        session.run(v1.global_variables_initializer())
        v1.train.Saver(write_version=2).save(session, str(tmp_path / "old"), write_meta_graph=False)
    network = adapters.read(tmp_path / "old.index")
    assert [(one.name, one.channels) for one in network.layers] == [("conv", "axis 3")]
    assert network.parameters == 72 + 4


BLOCKED = """
import sys
for name in ("tensorflow", "keras", "torch", "h5py"):
    sys.modules[name] = None
import qvis
assert len(qvis.analyze(sys.argv[1]).layers) == 5
"""


def test_a_folder_is_read_where_no_framework_is_installed(folder: Path) -> None:
    subprocess.run([sys.executable, "-c", BLOCKED, str(folder / "digits")], check=True)


def test_a_model_without_variables_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "small" / "saved_model.pb", tmp_path)
    with pytest.raises(BadArgumentError, match="SavedModel without variables"):
        adapters.read(tmp_path)


def test_missing_cut_and_altered_files_give_one_line(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "model"
    shutil.copytree(folder / "digits", target)
    data = target / "variables" / "variables.data-00000-of-00001"
    index = target / "variables" / "variables.index"
    whole, listed = data.read_bytes(), index.read_bytes()
    data.unlink()
    assert "cannot be read" in outcome(target)
    rng = random.Random(0)
    for turn in range(60):
        altered = bytearray(listed)
        for _ in range(turn % 4):
            altered[rng.randrange(len(listed))] = rng.randrange(256)
        index.write_bytes(bytes(altered) if turn % 3 else listed[: rng.randrange(len(listed))])
        data.write_bytes(whole if turn % 5 else whole[: rng.randrange(len(whole))])
        assert "\n" not in outcome(target)


def outcome(path: Path) -> str:
    """Why a folder is refused; nothing where it is read."""
    try:
        for layer in adapters.read(path).layers:
            assert layer.weight.ndim == 2
    except QvisError as error:
        return str(error)
    return ""
