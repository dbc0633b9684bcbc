"""The shipped model: that it is what its file and its training script say."""

import copy
import pickle
import subprocess
import sys
from importlib.resources import as_file, files

import pytest

from qvis.adapters import digits, factories
from qvis.errors import QvisError

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def held_out():
    """The pictures whose index is divisible by 5, and what they show."""
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_digits()
    pictures = torch.tensor(data.images[::5], dtype=torch.float32).unsqueeze(1) / 16
    return pictures, torch.tensor(data.target[::5])


@pytest.fixture
def metadata():
    with as_file(files("qvis") / digits.WEIGHTS) as path, safetensors.safe_open(path, "pt") as file:
        return file.metadata()


def accuracy(model, held_out):
    pictures, shown = held_out
    with torch.no_grad():
        return float((model(pictures).argmax(dim=1) == shown).float().mean())


def test_reads_more_than_97_percent_of_the_held_out_digits(held_out):
    assert accuracy(digits.load_digits_model(), held_out) > 0.97


def test_the_file_states_the_accuracy_that_the_model_has(held_out, metadata):
    assert float(metadata["accuracy"]) == pytest.approx(accuracy(digits.load_digits_model(), held_out), abs=0.006)
    assert "index % 5 == 0" in metadata["held_out"]
    assert metadata["script"] == "examples/train_digits.py"
    assert metadata["seed"].isdecimal()


def test_the_file_has_at_most_400_kb():
    assert len((files("qvis") / digits.WEIGHTS).read_bytes()) <= 400_000


def test_the_file_holds_just_the_tensors_of_the_network():
    from safetensors.torch import load

    stored = load((files("qvis") / digits.WEIGHTS).read_bytes())
    own = digits.DigitsNet().state_dict()
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in stored.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in own.items()
    }
    assert {tensor.dtype for name, tensor in stored.items() if name.endswith(".weight")} == {torch.float32}


@pytest.mark.parametrize("folded", [False, True])
def test_loads_for_evaluation_and_draws_no_random_numbers(folded):
    before = torch.get_rng_state()
    model = digits.load_digits_model(folded=folded)
    assert torch.equal(before, torch.get_rng_state())
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in model.parameters())


def test_each_call_loads_weights_of_its_own():
    first, second = digits.load_digits_model(), digits.load_digits_model()
    with torch.no_grad():
        first.classifier.weight.zero_()
    assert second.classifier.weight.abs().sum() > 0


def test_folding_keeps_the_outputs(held_out):
    with torch.no_grad():
        before = digits.load_digits_model()(held_out[0])
        after = digits.load_digits_model(folded=True)(held_out[0])
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()


def test_folding_leaves_no_batch_norm_and_keeps_the_names_of_layers():
    plain, folded = digits.load_digits_model(), digits.load_digits_model(folded=True)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    assert [name for name, _ in folded.named_modules()] == [name for name, _ in plain.named_modules()]
    assert not torch.equal(folded.stem.conv.weight, plain.stem.conv.weight)


def test_a_command_line_can_name_it():
    model = factories.load("qvis.adapters.digits:load_digits_model")
    assert isinstance(model, digits.DigitsNet)


def test_the_model_can_be_copied_pickled_traced_and_exported():
    model = digits.load_digits_model()
    pictures = torch.rand(2, 1, 8, 8)
    expected = model(pictures)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.fx.symbolic_trace(model)):
        assert torch.equal(other(pictures), expected)
    torch.testing.assert_close(torch.export.export(model, (pictures,)).module()(pictures), expected)


def test_importing_the_module_does_not_import_torch():
    code = "import sys, qvis.adapters.digits; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("use", [digits.load_digits_model, lambda: digits.DigitsNet])
def test_without_torch_the_error_says_what_to_install(use, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(QvisError, match=r'pip install "qvis\[torch\]"'):
        use()
