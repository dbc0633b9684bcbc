"""What users call data, as batches."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from qvis import data
from qvis.data import Images, example_batch, load_batches, parse_shapes, split
from qvis.errors import BadArgumentError
from qvis.running import Batch

X = np.arange(20, dtype=np.float32).reshape(10, 2)
Y = np.arange(10)


def joined(batches: list[Batch]) -> np.ndarray:
    return np.concatenate([np.asarray(batch.args[0]) for batch in batches])


def joined_labels(batches: list[Batch]) -> list[Any]:
    return [label for batch in batches for label in np.asarray(batch.labels).tolist()]


def sizes(batches: list[Batch]) -> list[int]:
    return [batch.size for batch in batches]


# ---------------------------------------------------------------------------------------------------------------------
# Arrays of all samples


def test_an_array_is_cut_into_batches() -> None:
    batches = load_batches(X, batch_size=4)
    assert sizes(batches) == [4, 4, 2]
    assert [len(batch.args[0]) for batch in batches] == [4, 4, 2]
    assert np.array_equal(joined(batches), X)
    assert all(batch.labels is None and batch.kwargs == {} for batch in batches)


def test_what_is_kept_is_a_copy() -> None:
    array = X.copy()
    batches = load_batches(array)
    array[:] = 0
    assert np.array_equal(joined(batches), X)


def test_tensors_stay_tensors_without_gradients() -> None:
    tensor = torch.from_numpy(X).to(torch.bfloat16).requires_grad_()
    (batch,) = load_batches(tensor, labels=torch.from_numpy(Y), samples=4)
    assert batch.args[0].dtype == torch.bfloat16
    assert not batch.args[0].requires_grad
    assert isinstance(batch.labels, torch.Tensor)
    assert np.array_equal(batch.args[0].float().numpy(), X[batch.labels.numpy()])


def test_a_tuple_is_several_positional_inputs() -> None:
    (batch,) = load_batches((X, X.astype(np.int32)), samples=3)
    assert [array.dtype for array in batch.args] == [np.float32, np.int32]
    assert np.array_equal(*batch.args)
    assert batch.labels is None


def test_the_last_of_a_tuple_is_labels_when_asked_for() -> None:
    (batch,) = load_batches((X, Y), labelled=True)
    assert len(batch.args) == 1
    assert np.array_equal(batch.labels, Y)


def test_a_mapping_is_inputs_by_name_and_labels() -> None:
    (batch,) = load_batches({"input_ids": Y, "attention_mask": np.ones(10), "labels": Y}, samples=5)
    assert batch.args == ()
    assert list(batch.kwargs) == ["input_ids", "attention_mask"]
    assert np.array_equal(batch.kwargs["input_ids"], batch.labels)


def test_a_mapping_without_labels_keeps_an_input_of_that_name() -> None:
    (batch,) = load_batches({"x": X, "y": X}, labelled=False)
    assert list(batch.kwargs) == ["x", "y"]
    assert batch.labels is None


def test_labels_are_taken_with_their_samples() -> None:
    (batch,) = load_batches(X, labels=Y.tolist(), samples=3)
    assert np.array_equal(batch.args[0], X[batch.labels])


def test_tables_of_pandas_are_taken_by_row() -> None:
    import pandas as pd

    table = pd.DataFrame(X, columns=["a", "b"], index=range(100, 110))
    (batch,) = load_batches(table, labels=pd.Series(Y, index=range(100, 110)), samples=3)
    assert np.array_equal(batch.args[0], X[batch.labels])


def test_bytes_are_not_scaled() -> None:
    pixels = np.full((2, 4, 4, 3), 200, dtype=np.uint8)
    assert load_batches(pixels)[0].args[0].dtype == np.uint8
    assert (load_batches(pixels)[0].args[0] == 200).all()


def test_flags_among_inputs_by_name_are_handed_on() -> None:
    (batch,) = load_batches({"x": X, "cache": None, "fast": False})
    assert batch.kwargs["cache"] is None
    assert batch.kwargs["fast"] is False


# ---------------------------------------------------------------------------------------------------------------------
# Which samples


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_one_sample_comes_from_each_stretch(numbers: tuple[int, int]) -> None:
    available, number = numbers
    chosen = data.spread(available, number)
    assert len(chosen) == number
    for place, one in enumerate(chosen):
        assert place * available // number <= one < (place + 1) * available // number


def test_all_samples_are_taken_in_order_where_there_are_no_more() -> None:
    assert data.spread(7, 7).tolist() == list(range(7))


@pytest.mark.parametrize("order", [np.repeat, np.tile])
def test_every_class_comes_out_of_data_sorted_or_in_turns(order: Callable[..., np.ndarray]) -> None:
    labels = order(np.arange(10), 128)
    taken = joined_labels(load_batches(labels, labels=labels, samples=128))
    assert len(taken) == 128
    assert min(np.bincount(taken, minlength=10)) >= 8


@given(
    st.integers(1, 40),
    st.integers(1, 50),
    st.integers(1, 12),
    st.sampled_from(["array", "list", "generator", "tuple"]),
)
def test_never_more_samples_than_asked_and_never_more_in_a_batch(n: int, samples: int, size: int, form: str) -> None:
    array = np.arange(n)
    parts = [array[start : start + 5] for start in range(0, n, 5)]
    given: Any = {"array": array, "list": parts, "generator": (part for part in parts), "tuple": (array, array)}[form]
    batches = load_batches(given, samples=samples, batch_size=size)
    assert sum(sizes(batches)) == min(n, samples)
    assert max(sizes(batches)) <= size
    assert [len(batch.args[0]) for batch in batches] == sizes(batches)
    assert (np.diff(joined(batches)) > 0).all()


def test_no_more_is_read_than_needed() -> None:
    read = []

    def endless() -> Iterator[np.ndarray]:
        while True:
            read.append(len(read))
            yield np.zeros((8, 2))

    assert sizes(load_batches(endless(), samples=20, batch_size=8)) == [8, 8, 4]
    assert len(read) == 3


def test_a_loader_that_uses_its_memory_again_is_copied() -> None:
    def reusing() -> Iterator[np.ndarray]:
        memory = np.zeros((2, 1))
        for number in range(3):
            memory[:] = number
            yield memory

    assert joined(load_batches(reusing())).ravel().tolist() == [0, 0, 1, 1, 2, 2]


def test_fewer_samples_are_taken_where_memory_ends_and_a_note_says_so() -> None:
    notes: list[str] = []
    batches = load_batches(X, max_bytes=7 * 8, notes=notes)
    assert sum(sizes(batches)) == 7
    assert notes == ["inputs: 7 samples were taken instead of 10, since more would need too much memory"]
    streamed: list[str] = []
    assert sum(sizes(load_batches([X, X], max_bytes=12 * 8, notes=streamed))) == 12
    assert "12 samples" in streamed[0]
    with pytest.raises(BadArgumentError, match="one sample takes 8 bytes, more than max_bytes=7"):
        load_batches(X, max_bytes=7)


# ---------------------------------------------------------------------------------------------------------------------
# Iterables of batches


@pytest.mark.parametrize(
    ("item", "inputs", "labels"),
    [
        (X, 1, False),
        ([X], 1, False),
        ((X,), 1, False),
        ((X, Y), 1, True),
        ([X, Y], 1, True),
        (((X, X), Y), 2, True),
        ([[X, X], Y], 2, True),
        (({"a": X, "b": X}, Y), 2, True),
        ({"a": X, "labels": Y}, 1, True),
        ({"a": X, "label": Y}, 1, True),
        ({"a": X}, 1, False),
    ],
)
def test_batches_come_in_the_forms_of_torch_and_keras(item: Any, inputs: int, labels: bool) -> None:
    (batch,) = load_batches([item])
    assert len(batch.args) + len(batch.kwargs) == inputs
    assert (batch.labels is not None) == labels
    assert batch.size == 10


@pytest.mark.parametrize(("labelled", "inputs"), [(True, 2), (False, 3)])
def test_longer_batches_need_a_word_on_labels(labelled: bool, inputs: int) -> None:
    with pytest.raises(BadArgumentError, match="has 3 parts; say labelled=True"):
        load_batches([(X, X, Y)])
    (batch,) = load_batches([(X, X, Y)], labelled=labelled)
    assert len(batch.args) == inputs


def test_a_data_loader_is_read_and_random_numbers_stay_as_they_were() -> None:
    dataset = TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    states = torch.get_rng_state(), random.getstate()
    batches = load_batches(DataLoader(dataset, batch_size=3, shuffle=True), samples=8)
    assert sizes(batches) == [3, 3, 2]
    assert all(np.array_equal(batch.args[0], X[batch.labels]) for batch in batches)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    again = load_batches(DataLoader(dataset, batch_size=3, shuffle=True), samples=8)
    assert joined_labels(again) == joined_labels(batches)


def test_a_dataset_of_tensorflow_gives_its_tensors() -> None:
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices(({"a": X}, Y)).batch(4)
    batches = load_batches(dataset, samples=6, batch_size=3)
    assert sizes(batches) == [3, 1, 2]
    assert all(tf.is_tensor(batch.kwargs["a"]) for batch in batches)
    assert np.array_equal(np.concatenate([batch.kwargs["a"] for batch in batches]), X[:6])
    (whole,) = load_batches(tf.constant(X), samples=3, labels=Y)
    assert np.array_equal(whole.args[0].numpy(), X[whole.labels])


def test_a_sequence_of_keras_gives_its_batches() -> None:
    import keras

    class Sequence(keras.utils.PyDataset):  # type: ignore[misc]
        def __len__(self) -> int:
            return 3

        def __getitem__(self, place: int) -> tuple[np.ndarray, np.ndarray]:
            return X[place : place + 2], Y[place : place + 2]

    assert joined_labels(load_batches(Sequence(workers=0))) == [0, 1, 1, 2, 2, 3]


def test_a_sequence_that_cannot_be_iterated_is_read_by_place() -> None:
    class Places:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, place: int) -> np.ndarray:
            return X[5 * place : 5 * place + 5]

    assert np.array_equal(joined(load_batches(Places())), X)


def test_batches_made_before_are_taken() -> None:
    (batch,) = load_batches(Batch((X,), {"flag": True}, Y, 10), samples=4)
    assert batch.size == 4
    assert batch.kwargs == {"flag": True}
    assert len(load_batches([Batch((X,), size=10)] * 2)) == 2


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be taken


def with_value(value: float) -> np.ndarray:
    array = X.copy()
    array[7, 1] = value
    return array


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("form", [np.asarray, torch.from_numpy, lambda array: torch.from_numpy(array).bfloat16()])
def test_a_sample_that_is_not_finite_is_named(value: float, form: Callable[[np.ndarray], Any]) -> None:
    for number, inputs in ((7, form(with_value(value))), (16, [form(X[1:]), form(with_value(value))])):
        with pytest.raises(BadArgumentError, match=f"^inputs: sample {number} holds NaN or infinite values"):
            load_batches(inputs, batch_size=3)
    with pytest.raises(BadArgumentError, match=r"inputs\['mask'\]: sample 7 holds"):
        load_batches({"x": form(X), "mask": form(with_value(value))})


def test_labels_may_be_missing_numbers() -> None:
    assert np.isnan(load_batches(X, labels=with_value(np.nan)[:, 1])[0].labels[7])


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (np.zeros((0, 3)), {}, r"its shape is \(0, 3\), which has no samples"),
        (np.float32(3), {}, r"its shape is \(\), which has no axis of samples"),
        (np.array([{}, []], dtype=object), {}, "got an array of type object; give numbers"),
        (np.array(["a", "b"]), {}, "got an array of type <U1; give numbers"),
        ((X, X[:4]), {}, r"inputs\[1\]: it has 4 samples and inputs\[0\] has 10; expected the same number"),
        ({"a": X, "b": X[:4]}, {}, r"inputs\['b'\]: it has 4 samples and inputs\['a'\] has 10"),
        ([X, (X, Y[:3])], {}, "labels: batch 1: it has 3 samples and inputs has 10"),
        (X, {"labels": Y[:4]}, "labels: it has 4 samples and inputs has 10"),
        (X, {"labelled": True}, "labelled=True, and there are no labels"),
        ({"a": X, "y": Y}, {"labels": Y}, "labels: the data hold labels already"),
        ((X, Y), {"labels": Y, "labelled": True}, "labels: the data hold labels already"),
        ({"a": X, "y": Y, "labels": Y}, {}, "labels are among 'labels' and 'y'"),
        ([(X, Y)], {"labels": Y}, "labels: an iterable brings its labels itself"),
        ([X, (X, Y)], {}, "some batches have labels and some have none"),
        ([(X, 3)], {}, "labels: expected an array or a tensor, not the int 3; make it one with numpy.asarray"),
        ([[1.0, 2.0]], {}, "inputs: expected an array or a tensor, not the float 1.0"),
        ({"text": ["a", "b"]}, {}, r"inputs\['text'\]\[0\]: expected an array or a tensor, not the str 'a'"),
        ({1: X}, {}, r"inputs by name need texts as names, not \[1\]"),
        ([], {}, "there is not one batch in it"),
        (iter(()), {}, "there is not one batch in it"),
        ((), {}, "there are no inputs in it"),
        ({}, {}, "there are no inputs in it"),
        ({"labels": Y}, {}, "there are no inputs in it"),
        (None, {}, "got an object of type NoneType; give an array"),
        (3, {}, "got an object of type int; give an array"),
        (b"x", {}, "got an object of type bytes"),
        (X, {"samples": 0}, "samples: got 0, expected a whole number of 1 or more"),
        (X, {"batch_size": True}, "batch_size: got True"),
        (X, {"max_bytes": 1.5}, "max_bytes: got 1.5"),
        (torch.zeros(3, 2, device="meta"), {}, "the device 'meta', which has no values"),
        (torch.eye(3).to_sparse(), {}, "inputs: got a sparse_coo tensor; give a dense"),
        (TensorDataset(torch.zeros(3, 2)), {}, "wrap it in torch.utils.data.DataLoader"),
    ],
)
def test_what_is_no_data_is_refused_in_one_line(inputs: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadArgumentError, match=message) as caught:
        load_batches(inputs, **options)
    assert "\n" not in str(caught.value)


def test_ragged_and_text_tensors_of_tensorflow_are_refused() -> None:
    import tensorflow as tf

    with pytest.raises(BadArgumentError, match="got a ragged tensor"):
        load_batches(tf.ragged.constant([[1.0], [2.0, 3.0]]))
    with pytest.raises(BadArgumentError, match="got an array of type object; give numbers"):
        load_batches(tf.constant(["a", "b"]))
    with pytest.raises(BadArgumentError, match="no axis of samples"):
        load_batches(tf.data.Dataset.from_tensor_slices((X, Y)))


def test_a_loader_that_fails_is_named_with_its_batch() -> None:
    def failing() -> Iterator[np.ndarray]:
        yield X
        raise KeyError("a long\nstory")

    with pytest.raises(BadArgumentError, match=r"reading batch 1 failed with KeyError: 'a long\\nstory'") as caught:
        load_batches(failing(), batch_size=2)
    assert isinstance(caught.value.__cause__, KeyError)


# ---------------------------------------------------------------------------------------------------------------------
# Files and functions


def test_npy_gives_inputs(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", X)
    assert np.array_equal(joined(load_batches(tmp_path / "data.npy", batch_size=3)), X)
    assert type(load_batches(str(tmp_path / "data.npy"))[0].args[0]) is np.ndarray


@pytest.mark.parametrize(
    ("arrays", "args", "names", "labelled"),
    [
        ({"x": X, "y": Y}, 1, [], True),
        ({"x": X}, 1, [], False),
        ({"arr_0": X, "arr_1": X}, 2, [], False),
        ({"ids": Y, "mask": Y}, 0, ["ids", "mask"], False),
        ({"x": X, "mask": Y, "labels": Y}, 0, ["x", "mask"], True),
    ],
)
def test_npz_gives_inputs_by_its_names(
    tmp_path: Path, arrays: dict[str, np.ndarray], args: int, names: list[str], labelled: bool
) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    (batch,) = load_batches(tmp_path / "data.npz", samples=4)
    assert len(batch.args) == args
    assert list(batch.kwargs) == names
    assert (batch.labels is not None) == labelled
    if "x" in arrays and labelled and not names:
        assert np.array_equal(batch.args[0], X[batch.labels])
        assert load_batches(tmp_path / "data.npz", labelled=True)[0].labels is not None
        with pytest.raises(BadArgumentError, match="hold labels already"):
            load_batches(tmp_path / "data.npz", labels=Y)


def test_npz_of_training_and_test_data_is_refused_with_the_way_out(tmp_path: Path) -> None:
    np.savez(tmp_path / "mnist.npz", x_train=X, y_train=Y, x_test=X[:3], y_test=Y[:3])
    with pytest.raises(BadArgumentError, match="do not belong together; call the inputs 'x' and the labels 'y'"):
        load_batches(tmp_path / "mnist.npz")


def test_files_that_could_run_code_or_are_damaged_are_refused(tmp_path: Path) -> None:
    objects = np.array([{}, []], dtype=object)
    np.savez(tmp_path / "objects.npz", x=objects)
    np.save(tmp_path / "objects.npy", objects)
    (tmp_path / "broken.npz").write_bytes(b"nothing")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04nothing")
    (tmp_path / "empty.npy").write_bytes(b"")
    np.savez(tmp_path / "none.npz")
    for name in ("objects.npz", "objects.npy", "broken.npz"):
        with pytest.raises(BadArgumentError, match=r"damaged or holds objects, and reading them could run code"):
            load_batches(tmp_path / name)
    for name in ("cut.npz", "empty.npy"):
        with pytest.raises(BadArgumentError, match="cannot be read"):
            load_batches(tmp_path / name)
    with pytest.raises(BadArgumentError, match="holds no arrays"):
        load_batches(tmp_path / "none.npz")
    with pytest.raises(BadArgumentError, match="there is no file"):
        load_batches(tmp_path / "absent.npz")
    with pytest.raises(BadArgumentError, match=r"there is no 'somewhere'; give a .npz"):
        load_batches("somewhere")
    (tmp_path / "table.csv").write_text("1")
    with pytest.raises(BadArgumentError, match=r"cannot read '.*table.csv'; give a .npz"):
        load_batches(str(tmp_path / "table.csv"))


def test_a_function_gives_data(tmp_path: Path) -> None:
    path = tmp_path / "loader.py"
    path.write_text(
        "import numpy as np\n"
        "def batches():\n    while True:\n        yield np.ones((2, 3)), np.zeros(2)\n"
        "def broken():\n    raise OSError('no disk')\n"
        "def elsewhere():\n    return 'data.npz'\n"
        "ready = np.ones((5, 3))\n"
    )
    assert sizes(load_batches(f"{path}:batches", samples=5)) == [2, 2, 1]
    assert sizes(load_batches(f"{path}:ready")) == [5]
    for what, message in (
        ("broken", "^inputs: calling it, .* failed with OSError: no disk"),
        ("absent", "^inputs: there is no 'absent' in"),
        ("elsewhere", "gave the path 'data.npz'"),
    ):
        with pytest.raises(BadArgumentError, match=message):
            load_batches(f"{path}:{what}")


# ---------------------------------------------------------------------------------------------------------------------
# Folders of images


def paint(path: Path, color: Any, size: tuple[int, int] = (40, 30), mode: str = "RGB", **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)


def test_folders_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    paint(tmp_path / "b" / "1.png", (0, 255, 0))
    paint(tmp_path / "b" / "deeper" / "2.PNG", (0, 255, 0))
    paint(tmp_path / "a" / "1.webp", (255, 0, 0), lossless=True)
    paint(tmp_path / "c" / "1.jpg", (0, 0, 255), quality=100)
    paint(tmp_path / ".hidden" / "1.png", (9, 9, 9))
    (tmp_path / "empty").mkdir()
    paint(tmp_path / "f" / "1.png", (255, 255, 255))
    (tmp_path / "a" / "notes.txt").write_text("")
    notes: list[str] = []
    (batch,) = load_batches(tmp_path, images=Images(size=8), notes=notes)
    assert batch.labels.tolist() == [0, 1, 1, 2, 4]
    assert batch.args[0].shape == (5, 3, 8, 8)
    assert batch.args[0].dtype == np.float32
    colors = [[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]]
    np.testing.assert_allclose(batch.args[0].mean(axis=(2, 3)), colors, atol=0.01)
    assert len(notes) == 1
    assert "1 files" in notes[0]


def test_images_of_a_folder_without_classes_have_no_labels(tmp_path: Path) -> None:
    for number in range(4):
        paint(tmp_path / f"{number}.png", (number, 0, 0))
    (batch,) = load_batches(tmp_path, samples=2, images=Images(size=4, scale=1))
    assert batch.labels is None
    assert batch.args[0].shape == (2, 3, 4, 4)
    assert len(set(batch.args[0][:, 0, 0, 0].tolist())) == 2


def test_images_are_scaled_and_normalized(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", (51, 102, 255))
    options = Images(size=(2, 3), mean=(0.1, 0.2, 0.5), std=(0.5, 0.25, 2.0), channels_last=True)
    (batch,) = load_batches(tmp_path, images=options)
    assert batch.args[0].shape == (1, 2, 3, 3)
    np.testing.assert_allclose(batch.args[0][0, 0, 0], [(0.2 - 0.1) / 0.5, (0.4 - 0.2) / 0.25, 0.25], rtol=1e-5)
    (grey,) = load_batches(tmp_path, images=Images(size=2, grey=True, scale=1))
    assert grey.args[0].shape == (1, 1, 2, 2)
    assert grey.args[0][0, 0, 0, 0] == pytest.approx(0.299 * 51 + 0.587 * 102 + 0.114 * 255, abs=1)


def test_the_centre_is_kept(tmp_path: Path) -> None:
    pixels = np.zeros((4, 12, 3), dtype=np.uint8)
    pixels[:, 4:8] = 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (batch,) = load_batches(tmp_path, images=Images(size=4, margin=1, scale=1))
    assert (batch.args[0] == 200).all()
    (tall,) = load_batches(tmp_path, images=Images(size=(4, 6), margin=1, scale=1))
    assert tall.args[0][0, 0, 0].tolist() == [0, 200, 200, 200, 200, 0]


def test_images_are_turned_as_their_camera_says(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[:4] = 255  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise: above becomes right
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    (batch,) = load_batches(tmp_path, images=Images(size=8, margin=1))
    assert (batch.args[0][..., 4:] == 1).all()
    assert (batch.args[0][..., :4] == 0).all()


@pytest.mark.parametrize(("mode", "color"), [("L", 8), ("RGBA", (8, 8, 8, 255)), ("P", 0), ("1", 1), ("LA", (1, 9))])
def test_images_of_other_modes_are_converted(tmp_path: Path, mode: str, color: Any) -> None:
    paint(tmp_path / "a.png", color, mode=mode, **({"transparency": b"\0\1"} if mode == "P" else {}))
    assert load_batches(tmp_path, images=Images(size=2))[0].args[0].shape == (1, 3, 2, 2)


def test_folders_without_usable_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadArgumentError, match=r"holds no .png, .jpg, .jpeg or .webp files"):
        load_batches(tmp_path)
    (tmp_path / "deep").mkdir()
    Image.fromarray(np.full((4, 4), 70, dtype=np.uint16)).save(tmp_path / "deep" / "a.png")
    with pytest.raises(BadArgumentError, match="has more than 8 bits"):
        load_batches(tmp_path)
    (tmp_path / "deep" / "a.png").write_bytes(b"no image")
    with pytest.raises(BadArgumentError, match=r"cannot read '.*a.png': UnidentifiedImageError"):
        load_batches(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(BadArgumentError, match=r"pip install 'qvis\[images\]'"):
        load_batches(tmp_path)
    monkeypatch.undo()
    paint(tmp_path / "a.png", (0, 0, 0))
    with pytest.raises(BadArgumentError, match=r"images .* and folders of images"):
        load_batches(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"size": 0},
        {"size": (2, 3, 4)},
        {"margin": 0.5},
        {"std": 0},
        {"mean": (0.5, 0.5)},
        {"mean": np.nan},
        {"grey": True, "std": (1, 1, 1)},
        {"scale": (1, 1, 1)},
    ],
)
def test_options_for_images_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(BadArgumentError, match=f"^{next(name for name in options if name != 'grey')}: got"):
        Images(**options)


# ---------------------------------------------------------------------------------------------------------------------
# Splitting


def test_split_slices_all_that_has_the_size_of_the_batch() -> None:
    inner = {"a": [X, (Y, "text")], "scale": np.ones(3)}
    batch = Batch((inner, torch.from_numpy(X)), {"flag": True, "number": np.float32(2)}, Y, 10)
    parts = split(batch, 4)
    assert sizes(parts) == [4, 4, 2]
    assert np.array_equal(np.concatenate([part.args[0]["a"][0] for part in parts]), X)
    assert np.array_equal(np.concatenate([part.labels for part in parts]), Y)
    assert torch.equal(torch.cat([part.args[1] for part in parts]), batch.args[1])
    for part in parts:
        assert part.args[0]["a"][1][1] == "text"
        assert len(part.args[0]["scale"]) == 3
        assert part.kwargs == {"flag": True, "number": np.float32(2)}
        assert isinstance(part.args[0]["a"][1], tuple)
    assert split(batch, 100)[0].size == 10
    with pytest.raises(BadArgumentError, match="size: got 0"):
        split(batch, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Example inputs


def test_shapes_are_read_from_text() -> None:
    image = parse_shapes("1x3x224x224")
    assert image.args[0].shape == (1, 3, 224, 224)
    assert image.args[0].dtype == np.float32
    assert image.size == 1
    text = parse_shapes("input_ids=2x128:int64, serving:0=2x4:bool")
    assert {name: (array.shape, str(array.dtype)) for name, array in text.kwargs.items()} == {
        "input_ids": ((2, 128), "int64"),
        "serving:0": ((2, 4), "bool"),
    }
    assert text.size == 2
    assert not text.kwargs["input_ids"].any()
    mixed = parse_shapes("4x2,4:int32,mask=4x1:float16")
    assert [array.shape for array in mixed.args] == [(4, 2), (4,)]
    assert list(mixed.kwargs) == ["mask"]


@given(st.text(max_size=12) | st.text(alphabet="0123456789x:=,int a", max_size=30))
def test_any_text_gives_shapes_or_the_error_of_a_bad_argument(text: str) -> None:
    with suppress(BadArgumentError):
        assert parse_shapes(text).size >= 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "cannot read ''"),
        ("1x3x", "cannot read '1x3x'"),
        ("3×4", "cannot read"),
        ("=1x2", "cannot read '=1x2'"),
        ("a=1x2,3", "'3' has no name and comes after names"),
        ("a=1,a=2", "'a' comes twice"),
        ("1x2:float8", "is of type 'float8'; give one of bool"),
        ("0x2", "axis shorter than 1"),
        ("99999x99999", "more than 1 GiB"),
        ((), "got an empty tuple"),
        ({}, "got an empty dict"),
        (3, "got the number 3"),
        (None, "an object of type NoneType"),
        ((1, 0), "axis shorter than 1"),
        ({"flag": True}, "got an object of type dict"),
    ],
)
def test_what_is_no_example_is_refused(given: Any, message: str) -> None:
    with pytest.raises(BadArgumentError, match=message):
        example_batch(given)


def test_example_inputs_are_taken_as_they_are() -> None:
    tensor = torch.zeros(2, 3, device="meta")
    assert example_batch(tensor).args[0] is tensor
    assert example_batch((tensor, X)).args[1] is X
    assert example_batch([tensor, 3]).args == (tensor, 3)
    named = example_batch({"flag": True, "x": tensor})
    assert named.kwargs == {"flag": True, "x": tensor}
    assert named.size == 2
    assert example_batch((1, 3, 8, 8)).args[0].shape == (1, 3, 8, 8)
    assert example_batch("2x3").size == 2
    assert example_batch(named) is named


def test_a_function_that_gives_a_pair_gives_inputs_and_labels(tmp_path: Path) -> None:
    code = "import numpy as np\n\ndef pictures():\n    return np.ones((6, 1, 2, 2), np.float32), np.arange(6)\n"
    (tmp_path / "samples.py").write_text(code, encoding="utf-8")
    (batch,) = load_batches(f"{tmp_path / 'samples.py'}:pictures")
    assert batch.args[0].shape == (6, 1, 2, 2)
    assert list(batch.labels) == list(range(6))
