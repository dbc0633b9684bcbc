"""Train the model that comes with qvis on the handwritten digits of scikit-learn, in about a minute.

    python examples/train_digits.py --output digits.safetensors

Every fifth picture is held out: those whose index is divisible by 5. They are never trained on, and the weights that
are kept are those after the last step. The settings below were chosen by trainings that held out another fifth. The
same people wrote the held-out digits and the others: expect less on the digits of strangers.

The same machine with the same versions of PyTorch and scikit-learn writes the same file every time. Needs
``pip install "qvis[torch]" scikit-learn``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors.torch import save
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from qvis.adapters.digits import DigitsNet

SEED = 0
EPOCHS = 60
BATCH = 64
LEARNING_RATE = 1e-2
WEIGHT_DECAY = 5e-2
EVERY = 5


def load_pictures() -> tuple[Tensor, Tensor]:
    """All pictures (1797, 1, 8, 8) with values from 0 to 1, and the digits they show (1797,)."""
    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)


def shift(pictures: Tensor) -> Tensor:
    """Move each picture by at most one pixel across and one down, filling up with background."""
    count, _, height, width = pictures.shape
    padded = F.pad(pictures, (1, 1, 1, 1))
    down, right = torch.randint(0, 3, (2, count))
    rows = down[:, None] + torch.arange(height)
    columns = right[:, None] + torch.arange(width)
    picture = torch.arange(count)[:, None, None]
    return padded[picture, 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def train(pictures: Tensor, digits: Tensor) -> nn.Module:
    """A network trained on the pictures, in evaluation mode."""
    model: nn.Module = DigitsNet()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * (len(pictures) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for epoch in range(EPOCHS):
        total = 0.0
        order = torch.randperm(len(pictures))
        # The last few pictures of an epoch wait for the next one: a small batch would disturb BatchNorm's statistics.
        batches = order.split(BATCH)[: len(pictures) // BATCH]
        for batch in batches:
            loss = F.cross_entropy(model(shift(pictures[batch])), digits[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        if (epoch + 1) % 10 == 0:
            print(f"epoch {epoch + 1} of {EPOCHS}: mean loss {total / len(batches):.4f}")
    return model.eval()


@torch.no_grad()
def count_correct(model: nn.Module, pictures: Tensor, digits: Tensor) -> int:
    """How many of the pictures the model reads rightly."""
    return int((model(pictures).argmax(dim=1) == digits).sum())


def sort_metadata(file: bytes) -> bytes:
    """The same safetensors file with its metadata in alphabetical order; it comes in another order each time."""
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # the tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + file[8 + size :]


def main() -> None:
    """Train, measure on the held-out pictures, save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the safetensors file to write")
    output: Path = parser.parse_args().output

    # One thread, because how a sum is divided among threads decides how it is rounded.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    pictures, digits = load_pictures()
    held_out = torch.arange(len(pictures)) % EVERY == 0

    began = time.perf_counter()
    model = train(pictures[~held_out], digits[~held_out])
    print(f"trained in {time.perf_counter() - began:.0f} s")

    correct, total = count_correct(model, pictures[held_out], digits[held_out]), int(held_out.sum())
    print(f"held-out accuracy: {correct / total:.2%} ({correct} of {total})")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    metadata = {
        "format": "pt",
        "accuracy": f"{correct / total:.4f}",
        "held_out": f"{correct} of {total} right, pictures of sklearn.datasets.load_digits with index % {EVERY} == 0",
        "input": "(batch, 1, 8, 8), values divided by 16",
        "script": "examples/train_digits.py",
        "seed": str(SEED),
        "torch": torch.__version__,
    }
    output.write_bytes(sort_metadata(save(state, metadata)))
    print(f"wrote {output}, {output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
