"""Finds the weights in a folder, laid out as on the Hugging Face hub: one file, or shards with an index."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from qvis.adapters.checkpoint.stored import Contents, Stored, natural, reading
from qvis.errors import BadArgumentError
from qvis.layers import Skipped

INDEX = ".index.json"
_SINGLE = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "adapter_model.safetensors",
    "consolidated.safetensors",
    "pytorch_model.bin",
)
"""Usual names, the best first: what is pickled comes last."""
_ENDINGS = (".safetensors", ".bin")


def holds_weights(folder: Path) -> bool:
    """Whether there is an index or a file of weights in the folder."""
    return any(name.endswith((INDEX, *_ENDINGS)) for name in _names(folder))


def _names(folder: Path) -> list[str]:
    try:
        return sorted((one.name for one in folder.iterdir()), key=natural)
    except OSError as error:
        raise BadArgumentError(f"model: {str(folder)!r} cannot be read: {error.strerror}") from error


def choose(folder: Path) -> Path:
    """The index, or the one file of weights, of a folder.

    Raises
    ------
    BadArgumentError
        There are several, and nothing says which one is meant.
    """
    names = _names(folder)
    indices = [name for name in names if name.endswith(INDEX)]
    usual = (*(f"{name}{INDEX}" for name in _SINGLE), *_SINGLE)
    files = [name for name in names if name.endswith(_ENDINGS)]
    safe = [name for name in files if name.endswith(".safetensors")]
    chosen = [name for name in usual if name in names][:1]
    if not chosen:
        chosen = next((some for some in (indices, safe, files) if some), [])
    if len(chosen) != 1:
        listed = ", ".join(map(repr, chosen[:3]))
        raise BadArgumentError(
            f"model: the folder {str(folder)!r} holds {len(chosen)} files of weights ({listed}, ...) and no single "
            f"*{INDEX} that says what is in which; add it, or give one of them"
        )
    return folder / chosen[0]


def load(index: Path, load_shard: Callable[[Path], Contents]) -> Contents:
    """All tensors that an index names, in the natural order of their names.

    Raises
    ------
    BadArgumentError
        The index is damaged, a shard is missing or lies outside the folder, or a tensor is not in its shard.
    """
    places = _places(index)
    files = sorted(set(places.values()), key=natural)
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        listed = ", ".join(map(repr, missing[:4])) + (", ..." if len(missing) > 4 else "")
        raise BadArgumentError(f"model: {str(index)!r} names {len(files)} files, of which {listed} missing; add them")
    shards = {name: load_shard(index.parent / name) for name in files}
    tensors: dict[str, Stored] = {}
    skipped = [one for shard in shards.values() for one in shard.skipped]
    ties: dict[str, str] = {}
    for name, shard in shards.items():
        ties.update(shard.ties)
        for tensor in shard.tensors:
            if places.get(tensor.name) == name:
                tensors[tensor.name] = tensor
            elif tensor.name not in places:
                skipped.append(Skipped(tensor.name, f"is in {name}, and {index.name} does not name it"))
    lost = [name for name in places if name not in tensors and name not in ties]
    if lost:
        raise BadArgumentError(
            f"model: {str(index)!r} says that {lost[0]!r} is in {places[lost[0]]!r}, and it is not"
            f"{f' ({len(lost)} such tensors)' if len(lost) > 1 else ''}; get both files of one version"
        )
    ordered = tuple(tensors[name] for name in sorted(tensors, key=natural))
    return Contents(shards[files[0]].framework if files else "index", ordered, tuple(skipped), ties)


def _places(index: Path) -> dict[str, str]:
    """The file of each tensor, all of them within the folder."""
    with reading(index, "no index of weights", "get it anew"):
        content: Any = json.loads(index.read_text(encoding="utf-8"))
        table = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(table, dict) or not all(isinstance(one, str) and one for one in table.values()):
            raise ValueError("it has no table 'weight_map' of names of files")
    for name in sorted(set(table.values())):
        # Judged by its name, not by where links lead: in a download cache every file is a link out of the folder.
        parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
        if ".." in parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor or "\0" in name:
            raise BadArgumentError(f"model: {str(index)!r} points to {name!r}, outside its folder; that is refused")
    return table
