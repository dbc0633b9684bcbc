"""Makes a PyTorch model from what can be typed on a command line: where its code is, and a file of weights."""

from __future__ import annotations

import inspect
import pickle
import sys
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from qvis.adapters import find
from qvis.adapters.checkpoint.pickled import NESTED, WRAPPERS
from qvis.adapters.torch.tensors import identity, unpickle
from qvis.errors import BadArgumentError

if TYPE_CHECKING:
    from torch import Tensor, nn

_FORM = "expected 'package.module:factory' or 'path/to/file.py:factory'"
_PICKLED = (".pt", ".pth", ".bin", ".th", ".ckpt")


def load(spec: str, weights: str | Path | None = None) -> object:
    """Make the model that ``spec`` names.

    Parameters
    ----------
    spec
        ``package.module:factory`` or ``path/to/file.py:factory``. What stands after the colon may have
        dots. It is a model, or a function or class that is called without arguments and gives one. This runs the code.
    weights
        A file of weights for it, ``.safetensors`` or ``.pt .pth .bin .th .ckpt``; the latter are read without running
        what may be pickled in them. Weights of torchao, as :func:`qvis.quantize` writes them, become its integers. A
        dictionary inside under ``state_dict`` or ``model`` is found, and the prefix ``module.`` of a model trained in
        parallel dropped. Default: the weights it is made with.

    Raises
    ------
    BadArgumentError
        There is no such code, it fails, or the weights do not fit the model. The first error is its ``__cause__``.
    """
    model = make(spec)
    if weights is not None:
        put_weights(_read(Path(weights)), model, f"weights: {str(weights)!r}")
    return model


# ---------------------------------------------------------------------------------------------------------------------
# The code


def make(spec: str) -> object:
    """What ``spec`` names, called if it is a function or a class; see :func:`load`."""
    where, colon, what = spec.rpartition(":")
    if not (where and colon and what):
        raise BadArgumentError(f"model: {_FORM}, not {spec!r}")
    with _failing(spec, "importing it"):
        found: Any = _import_file(where) if where.endswith(".py") else _import_module(where)
    for name in what.split("."):
        found = _attribute(found, name, spec)
    # A model is callable too, but calling it would run it.
    if not callable(found) or (not isinstance(found, type) and find(found) is not None):
        return found
    _check_needs_nothing(found, spec)
    with _failing(spec, "calling it"):
        return found()


def _attribute(owner: object, name: str, spec: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError as error:
        known = {one: value for one, value in getattr(owner, "__dict__", {}).items() if not one.startswith("_")}
        home = getattr(owner, "__module__", getattr(owner, "__name__", None))  # of a class, of a module
        own = [one for one, value in known.items() if getattr(value, "__module__", None) == home]
        near = get_close_matches(name, known) or own[:5]
        hint = f"; there is {' or '.join(map(repr, near))}" if near else ""
        raise BadArgumentError(f"model: there is no {name!r} in {spec!r}{hint}") from error


def _import_file(where: str) -> ModuleType:
    path = Path(where)
    if not path.is_file():
        raise BadArgumentError(f"model: there is no file {where!r}; {_FORM}")
    name = f"_qvis_model_{path.stem}"
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise BadArgumentError(f"model: {where!r} cannot be imported; {_FORM}")
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up here
    with _searched_first(path.resolve().parent):
        spec.loader.exec_module(module)
    return module


def _import_module(where: str) -> ModuleType:
    # A command that pip installed does not search the current folder, as `python -m` does.
    with _searched_first(Path.cwd()):
        try:
            return import_module(where)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{where}.".startswith(f"{error.name}."):
                raise BadArgumentError(
                    f"model: there is no module {error.name!r}; {_FORM}, seen from the folder {str(Path.cwd())!r}"
                ) from error
            raise


@contextmanager
def _searched_first(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


@contextmanager
def _failing(spec: str, doing: str) -> Iterator[None]:
    """Turn whatever the user's code raises, even a call of exit, into one line that keeps it as the cause."""
    try:
        yield
    except BadArgumentError:
        raise
    except (Exception, SystemExit) as error:
        raise BadArgumentError(f"model: {doing}, {spec!r} failed with {_in_one_line(error)}") from error


def _check_needs_nothing(factory: Any, spec: str) -> None:
    try:
        signature = inspect.signature(factory)
    except ValueError:  # made in C, says nothing about itself
        return
    try:
        signature.bind()
    except TypeError as error:
        raise BadArgumentError(
            f"model: {spec!r} cannot be called without arguments ({error}); give a function that makes it by itself"
        ) from error


def _in_one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}" if text else type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# The weights


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors in a file of weights, by name."""
    what = f"weights: {str(path)!r}"
    if not path.is_file():
        raise BadArgumentError(f"{what} is no file; give one of type .safetensors or {' '.join(_PICKLED)}")
    suffix = path.suffix.lower()
    try:
        if suffix == ".safetensors":
            from safetensors.torch import load_file

            from qvis.adapters.torch.integers import load_quantized

            return load_quantized(path) or load_file(path)
        if suffix in _PICKLED:
            return _tensors(_unpickle(path, what), what)
    except BadArgumentError:
        raise
    except ImportError as error:
        raise BadArgumentError(f"{what} cannot be read without the package {error.name!r}; install it") from error
    except Exception as error:  # each library has its own ways to say that a file is damaged
        raise BadArgumentError(f"{what} is damaged, or not of the type its name says: {_in_one_line(error)}") from error
    raise BadArgumentError(f"{what} is of no type known here; give a file of type .safetensors or {' '.join(_PICKLED)}")


def _unpickle(path: Path, what: str) -> object:
    try:
        return unpickle(path)
    except pickle.UnpicklingError as error:
        raise BadArgumentError(
            f"{what} is damaged or holds more than tensors, and reading that could run code; if you trust it, "
            "load it yourself and save model.state_dict() to a file"
        ) from error


def _tensors(loaded: object, what: str) -> dict[str, Tensor]:
    import torch

    for key in NESTED:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise BadArgumentError(f"{what} holds a {type(loaded).__name__}; expected a dictionary of tensors by name")
    tensors = {str(name): value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise BadArgumentError(f"{what} holds no tensors, only {', '.join(map(repr, list(loaded)[:5])) or 'nothing'}")
    return tensors


def put_weights(state: dict[str, Tensor], model: object, what: str) -> None:
    """Load weights into a model, or say what does not fit; ``what`` is how an error begins."""
    import torch

    if not isinstance(model, torch.nn.Module):
        raise BadArgumentError(f"{what} needs a torch.nn.Module to go to, and the model is a {type(model).__name__}")
    own = model.state_dict()
    for prefix in WRAPPERS:
        if all(name.startswith(prefix) for name in state) and not any(name.startswith(prefix) for name in own):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    shapes = [
        f"{name} is {tuple(state[name].shape)}, in the model {tuple(mine.shape)}"
        for name, mine in own.items()
        if name in state and not _fits(mine, state[name])
    ]
    if shapes:
        raise BadArgumentError(f"{what} is for another model: {_few(shapes)}")
    # Copying keeps tied weights tied; only what cannot be copied into replaces the model's own tensors.
    plain = (torch.Tensor, torch.nn.Parameter)
    assign = any(one.is_meta for one in model.parameters()) or any(type(one) not in plain for one in state.values())
    if assign:
        state = _tied(own, state)
    try:
        result = model.load_state_dict(state, strict=False, assign=assign)
    except RuntimeError as error:
        raise BadArgumentError(f"{what} cannot be loaded: {_in_one_line(error)}") from error
    missing = _missing(model, state, result.missing_keys)
    problems = [
        f"{text} {_few(names)}"
        for text, names in (("it lacks", missing), ("the model has no", result.unexpected_keys))
        if names
    ]
    if problems:
        raise BadArgumentError(f"{what} does not fit the model: {'; '.join(problems)}")


def _tied(own: Mapping[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with the tensors that are tied in the model under all their names, as one parameter."""
    import torch

    ties: dict[Hashable, list[str]] = {}
    for name, tensor in own.items():
        if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
            ties.setdefault(identity(tensor), []).append(name)
    found = dict(state)
    for names in ties.values():
        given = next((name for name in names if name in state), None)
        if given is not None and len(names) > 1:
            one = state[given]
            found.update(
                dict.fromkeys(names, torch.nn.Parameter(one, one.is_floating_point() and own[given].requires_grad))
            )
    return found


def _fits(mine: object, given: Tensor) -> bool:
    import torch
    from torch.nn.parameter import is_lazy

    return not isinstance(mine, torch.Tensor) or is_lazy(mine) or mine.shape == given.shape


def _missing(model: nn.Module, state: dict[str, Tensor], names: list[str]) -> list[str]:
    """Those that did not come under another name: files of safetensors hold tied weights once."""
    import torch

    own = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    loaded = {identity(tensor) for name, tensor in own.items() if name in state}
    return [name for name in names if name not in own or identity(own[name]) not in loaded]


def _few(names: list[str]) -> str:
    return f"{', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
