"""Trains modules of PyTorch, and keeps their weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from trained import Subject, describe
from trained.pictures import Pictures, augmented

BATCH = 64
FEW = 2000
"""Of so few pictures, each is shown more often."""


def trained(
    name: str, make: Callable[[], nn.Module], pictures: Pictures, cache: Path, *, rate: float, epochs: int
) -> Subject:
    """The model that is made, with its weights from the cache, or trained and put there."""
    torch.manual_seed(0)
    model = make()
    file = cache / f"{name}-{pictures.name}.pt"
    if file.exists():
        saved = torch.load(file, weights_only=True)
        model.load_state_dict(saved["weights"])
        accuracy = saved["accuracy"]
    else:
        began = time.perf_counter()
        train(model, pictures, rate, epochs if len(pictures.train) > FEW else 2 * epochs)
        accuracy = accuracy_of(model, pictures.test, pictures.test_labels)
        print(f"trained {name} in {time.perf_counter() - began:.0f} s: {describe(accuracy, pictures)}", flush=True)
        cache.mkdir(parents=True, exist_ok=True)
        torch.save({"weights": model.state_dict(), "accuracy": accuracy}, file)
    return Subject(name, model.eval(), pictures.test, pictures.test_labels, describe(accuracy, pictures))


def train(model: nn.Module, pictures: Pictures, rate: float, epochs: int) -> None:
    """Train with AdamW on a schedule of one cycle (Smith and Topin, arXiv 1708.07120)."""
    generator = np.random.default_rng(0)
    steps = len(pictures.train) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=5e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps)
    model.train()
    for _ in range(epochs):
        order = generator.permutation(len(pictures.train))
        for index in order[: steps * BATCH].reshape(steps, BATCH):
            batch = augmented(pictures.train[index], generator, mirror=pictures.name != "digits")
            scores = model(torch.from_numpy(batch))
            loss = F.cross_entropy(scores, torch.from_numpy(pictures.train_labels[index]), label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy_of(model: nn.Module, pictures: np.ndarray, labels: np.ndarray) -> float:
    """The share of pictures that the model gets right."""
    parts = [model(part).argmax(dim=1) for part in torch.from_numpy(pictures).split(100)]
    return float((torch.cat(parts).numpy() == labels).mean())


def export(model: nn.Module, example: Any, file: Path) -> Path:
    """Write a model as an ONNX file that takes batches of any size; ``example`` has two samples or more."""
    named = {name: torch.from_numpy(one) for name, one in example.items()} if isinstance(example, dict) else {}
    inputs = () if named else (torch.from_numpy(example),)
    axes = {0: torch.export.Dim.DYNAMIC}
    shapes = dict.fromkeys(named, axes) or (axes,)
    program = torch.onnx.export(model, inputs, kwargs=named or None, dynamo=True, verbose=False, dynamic_shapes=shapes)
    program.save(str(file), external_data=False)
    return file


def exported(subject: Subject, cache: Path) -> Subject:
    """The model as an ONNX file that takes batches of any size."""
    cache.mkdir(parents=True, exist_ok=True)
    file = export(subject.model, subject.inputs[:2], cache / f"{subject.name}.onnx")
    return Subject(f"{subject.name}_onnx", file, subject.inputs, subject.labels, subject.note)
