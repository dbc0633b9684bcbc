"""Equalizes a model with AIMET, in AIMET's own environment, and runs it with rounded weights.

``equalization.py`` starts it with a folder that holds the model, inputs and draws, and reads what it leaves there.
"""

from __future__ import annotations

import json
import logging
import pickle
import sys
import time
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure_call import _let_torchvision_load
from rounding import Setting, TorchModel, draw_all, run_all
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where the class of the digits model is


def main(folder: Path) -> None:
    """Equalize the model of the folder in both ways."""
    _let_torchvision_load()
    warnings.simplefilter("ignore")
    with open(folder / "task.pkl", "rb") as file:
        task = pickle.load(file)
    model = torch.load(folder / "model.pt", weights_only=False).eval()
    example = tuple(torch.from_numpy(one) for one in task["example"])
    notes = []
    started = model
    try:
        from aimet_torch.model_preparer import prepare_model

        started = prepare_model(deepcopy(model)).eval()
    except Exception as error:
        notes.append(f"its prepare_model fails ({type(error).__name__}), so that it is given the model as it is")
    report: dict[str, Any] = {"rows": {}, "sets": []}
    outputs: dict[str, np.ndarray] = {}
    as_it_is = len(scale(deepcopy(model), example)[1])
    for row, equalize in (("scaling", scale), ("equalize_model", equalize_all)):
        copy = deepcopy(started)
        began = time.perf_counter()
        equalized, sets = equalize(copy, example)
        seconds = time.perf_counter() - began
        wrapped = TorchModel(equalized)
        outputs[f"{row} exact"] = run_all(wrapped, task["judged"])
        ranges = wrapped.ranges(task["given"]) if any(one[2] for one in task["settings"]) else {}
        for setting in (Setting(*one) for one in task["settings"]):
            outputs[f"{row} {setting}"] = draw_all(wrapped, setting, task["draws"], task["judged"], ranges)
        report["rows"][row] = {"seconds": seconds}
        if row == "scaling":
            report["sets"] = sets
    found = len(report["sets"])
    if started is not model and as_it_is != found:
        notes.append(f"{found} pairs after its prepare_model, {as_it_is} in the model as it is")
    report["notes"] = [*notes, f"{found} pairs of layers scaled" if found else "it finds nothing to scale"]
    (folder / "report.json").write_text(json.dumps(report))
    np.savez(folder / "outputs.npz", **outputs)


def scale(model: nn.Module, example: tuple[Tensor, ...]) -> tuple[nn.Module, list[Any]]:
    """The scaling alone; returns the model and, of each pair of layers, their names and the scales of the first."""
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.cross_layer_equalization import CrossLayerScaling

    fold_all_batch_norms(model, None, dummy_input=example)
    sets = CrossLayerScaling.scale_model(model, dummy_input=example)
    names = {module: name for name, module in model.named_modules()}
    pairs = [pair for one in sets for pair in one.cls_pair_info_list]
    return model, [(names[one.layer1], names[one.layer2], (1 / one.scale_factor).tolist()) for one in pairs]


def equalize_all(model: nn.Module, example: tuple[Tensor, ...]) -> tuple[nn.Module, list[Any]]:
    """All that AIMET does: it folds, scales, and moves high biases."""
    from aimet_torch.cross_layer_equalization import equalize_model

    equalize_model(model, dummy_input=example)
    return model, []


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main(Path(sys.argv[1]))
