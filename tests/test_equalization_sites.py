"""Which channels can be scaled, and that scaling them leaves the function as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from qvis.equalization.sites import Sites, find_sites, scaled
from qvis.folding import Folded, fold_network
from tests.convnets import IMAGE_MODELS, image_model, images, settled
from tests.test_folding import network_of, tensor_of


class Flow(nn.Module):
    """Modules in a flow that the test gives."""

    def __init__(self, flow: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.flow = flow

    def forward(self, *inputs: Tensor) -> Any:
        return self.flow(self, *inputs)


def made(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model with random weights, the same at every call, whose normalizations do something."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = settled(make())
        for module in model.modules():
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)) and module.weight is not None:
                module.weight.normal_(1, 0.3)
                if getattr(module, "bias", None) is not None:
                    module.bias.normal_()
    return model


def sites_of(
    model: nn.Module, *inputs: Tensor, relu6_as_relu: bool = False, shapes: bool = True
) -> tuple[Sites, Folded]:
    network = network_of(model, *(inputs if shapes else ()))
    assert network.graph is not None
    folded = fold_network(network)
    return find_sites(network.graph, folded.network, set(folded.norms), relu6_as_relu), folded


def affine_of(model: nn.Module, name: str) -> tuple[Any, Any]:
    module = model.get_submodule(name)
    bias = getattr(module, "bias", None)
    return module.weight.detach().numpy(), None if bias is None else bias.detach().numpy()  # type: ignore[operator]


def rewritten(model: nn.Module, sites: Sites, folded: Folded, scales: Any) -> dict[str, Tensor]:
    """The parameters and buffers of the model, folded and scaled."""
    affines = {name: affine_of(model, name) for name in sites.affines}
    new = scaled(sites, scales, folded.network.layers, folded.norms, affines)
    weights, norms = {**folded.weights, **new.weights}, {**folded.norms, **new.norms}
    tensors: dict[str, Any] = {}
    for layer in folded.network.layers:
        if layer.name in weights:
            module = model.get_submodule(layer.name)
            whole = layer.__class__(layer.name, layer.op, layer.shape, layer.dtype, lambda n=layer.name: weights[n])
            tensors[f"{layer.name}.weight"] = tensor_of(whole, module)
    for name, bias in new.biases.items():
        tensors[f"{name}.bias"] = bias
    for name, norm in norms.items():
        module = model.get_submodule(name)
        numbers = {"running_mean": norm.mean, "running_var": norm.variance, "weight": norm.scale, "bias": norm.shift}
        tensors |= {f"{name}.{what}": one for what, one in numbers.items() if getattr(module, what) is not None}
    for name, (scale, shift) in new.affines.items():
        tensors[f"{name}.weight"] = scale
        if shift is not None:
            tensors[f"{name}.bias"] = shift
    return {
        name: (one if isinstance(one, Tensor) else torch.from_numpy(np.array(one))).float()
        for name, one in tensors.items()
    }


def check(model: nn.Module, *inputs: Tensor, seed: int = 0, **options: Any) -> Sites:
    """Scale a model by random numbers: its outputs must stay as they are."""
    sites, folded = sites_of(model, *inputs, **options)
    scales = np.exp2(np.random.default_rng(seed).uniform(-2, 2, sites.count))
    tensors = rewritten(model, sites, folded, scales)
    with torch.no_grad():
        own = pytree.tree_leaves(model(*inputs))
        other = pytree.tree_leaves(functional_call(model, tensors, inputs))
    worst = max(float((one - two).abs().max()) for one, two in zip(own, other, strict=True))
    assert worst <= 1e-5 * max(float(one.abs().max()) for one in own)
    return sites


def pairs(sites: Sites) -> list[tuple[tuple[str, ...], tuple[str, ...], int]]:
    return [(site.producers, site.consumers, site.channels) for site in sites.sites]


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


# ---------------------------------------------------------------------------------------------------------------------
# Models of images


@pytest.mark.parametrize("name", IMAGE_MODELS)
@pytest.mark.parametrize("shapes", [True, False], ids=["export", "fx"])
def test_scaling_changes_no_image_model(name: str, shapes: bool) -> None:
    check(image_model(name), images(), shapes=shapes)
