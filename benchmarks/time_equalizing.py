"""Times one equalization of MobileNetV2, with ReLU in place of ReLU6, in the process it is started in.

``equalization.py`` starts it, a fresh process for each measurement: what a tool imports only when called counts.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure_call import _let_torchvision_load
from models import build
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, wherever it runs

SHAPE = (1, 3, 224, 224)
SAMPLES = 32


def aimet(model: nn.Module) -> Callable[[], Any]:
    """AIMET's folding, scaling and moving of biases."""
    _let_torchvision_load()
    from aimet_torch.cross_layer_equalization import equalize_model

    return lambda: equalize_model(model, SHAPE)


def square_root(model: nn.Module) -> Callable[[], Any]:
    """The square-root rule of qvis, which needs no data."""
    import qvis

    return lambda: qvis.equalize(model, method="square root")


def noise(model: nn.Module) -> Callable[[], Any]:
    """All that qvis does, with some pictures."""
    import qvis

    pictures = torch.randn((SAMPLES, *SHAPE[1:]), generator=torch.Generator().manual_seed(0)).numpy()
    return lambda: qvis.equalize(model, pictures)


TOOLS = {"aimet": aimet, "square root": square_root, "noise": noise}


def with_relu(model: nn.Module) -> nn.Module:
    """The model with each ReLU6 replaced."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(module, name, nn.ReLU())
    return model


@torch.no_grad()
def normalized(model: nn.Module) -> nn.Module:
    """The model with statistics in its normalizations, without which its random weights let nothing through."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.train().momentum = None
        nn.init.uniform_(norm.weight, 0.2, 2.0)
    model(torch.randn((4, *SHAPE[1:]), generator=torch.Generator().manual_seed(0)))
    return model.eval()


def main() -> None:
    """Time what the argument names; the last line on stdout is the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("tool", choices=TOOLS)
    chosen = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    call = TOOLS[chosen.tool](normalized(with_relu(build("mobilenet_v2"))))
    began, used = time.perf_counter(), time.process_time()
    call()
    print(json.dumps({"wall_s": time.perf_counter() - began, "cpu_s": time.process_time() - used}))


if __name__ == "__main__":
    main()
