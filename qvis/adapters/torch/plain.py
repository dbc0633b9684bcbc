"""Turns tensors that a PyTorch module computes, as by a parametrization, into ones that it holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def make_plain(module: nn.Module, name: str) -> None:
    """Turn a tensor that a module computes into one that it holds. The class of the original is left alone."""
    import torch

    from qvis.adapters.torch import _parametrizations, _sources

    with torch.no_grad():
        tensor = dict(_sources(module))[name].get().detach().clone()
    steps = _parametrizations(module).get(name)
    if steps is not None:
        learned = list(steps.parameters())
        del module._modules["parametrizations"]._modules[name]  # type: ignore[union-attr]
        cls = type(module)
        if _parametrizations(module):
            left = (name, "__dict__", "__weakref__")
            members = {key: value for key, value in cls.__dict__.items() if key not in left}
            object.__setattr__(module, "__class__", type(cls.__name__, cls.__bases__, members))
        else:
            del module._modules["parametrizations"]
            object.__setattr__(module, "__class__", cls.__bases__[0])
    else:
        hooks = [one for one in module._forward_pre_hooks.values() if _hook_name(one) == name]
        for held in (module._forward_pre_hooks, module._state_dict_hooks, module._load_state_dict_pre_hooks):
            for key in [key for key, one in held.items() if any(one is hook or _inner(one) is hook for hook in hooks)]:
                del held[key]
        learned = []
        for suffix in ("_g", "_v", "_orig", "_u", "_mask"):
            parameter = module._parameters.pop(name + suffix, None)
            learned += [] if parameter is None else [parameter]
            module._buffers.pop(name + suffix, None)
        module.__dict__.pop(name, None)
    if learned:
        module._parameters[name] = torch.nn.Parameter(tensor, any(one.requires_grad for one in learned))
    else:
        module._buffers[name] = tensor


def _hook_name(hook: Any) -> str | None:
    found = getattr(hook, "name", getattr(hook, "_tensor_name", None))
    return found if isinstance(found, str) else None


def _inner(hook: Any) -> Any:
    """The pre-hook that a hook of a state dict belongs to."""
    hook = getattr(hook, "hook", hook)
    return getattr(hook, "fn", None)
