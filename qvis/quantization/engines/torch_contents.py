"""What is in a ``.pt2`` or ``.safetensors`` file: read as data, nothing in it is executed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from qvis.quantization.contents import Arithmetic, Contents, Operation

if TYPE_CHECKING:
    from qvis.adapters.torch.exported import Call, Program

WEIGHTS = {
    **dict.fromkeys([f"aten.conv{n}d" for n in (1, 2, 3)], "weight"),
    **dict.fromkeys([f"aten.conv_transpose{n}d" for n in (1, 2, 3)], "weight"),
    "aten.convolution": "weight",
    "aten.linear": "weight",
    "aten.bilinear": "weight",
    "aten.embedding": "weight",
    "aten.embedding_bag": "weight",
    "aten.matmul": "other",
    "aten.bmm": "mat2",
    "aten.mm": "mat2",
    "aten._int_mm": "mat2",
    "aten.addmm": "mat2",
    "aten.lstm": "params",
    "aten.gru": "params",
    "aten.rnn_tanh": "params",
    "aten.rnn_relu": "params",
}
"""Operations that multiply with a weight, and the argument that is one."""
KERNELS = ("aten.conv1d", "aten.conv2d", "aten.convolution", "aten.linear", "aten.addmm", "aten.mm")
"""Those that oneDNN carries out with integers; all others compute with dequantized weights."""
_MULTIPLIED = ("input", "self", "mat1")

_SAME = ("relu", "hardtanh", "relu6", "clamp", "clamp_min", "max_pool1d", "max_pool2d", "max_pool3d")
"""What integers can do without knowing their step."""
_COMPUTED = (
    *_SAME,
    *("add", "sub", "mul", "mean", "sum"),
    *(f"{kind}avg_pool{n}d" for kind in ("", "adaptive_") for n in (1, 2, 3)),
)
"""What integers can do."""
_MOVES = frozenset(
    (  # noqa: SIM905
        "_assert_tensor_metadata _to_copy _unsafe_view alias arange cat chunk clone constant_pad_nd contiguous "
        "detach dropout empty eq expand feature_dropout flatten flip full gather ge getitem gt index index_select "
        "le lift_fresh_copy logical_and logical_not lt masked_fill movedim narrow ne new_zeros numpy_T ones "
        "ones_like pad permute pixel_shuffle pixel_unshuffle repeat reshape roll scalar_tensor select slice split "
        "squeeze stack sym_constrain_range_for_size sym_size t to transpose tril triu unbind unflatten unsqueeze "
        "upsample_nearest2d view where zeros zeros_like"
    ).split()
)
"""What moves numbers, makes them, or compares them."""


_ROUNDING = ("abs", "amax", "div", "clamp", "round", "to", "_to_copy")
_SCALING = ("to", "_to_copy", "mul", "add", "reshape")
"""What rounds rows of numbers by their own range before a product of integers, and what scales that product."""


def contents_of_program(path: Path) -> Contents:
    """The operations and the numbers of an exported program."""
    from qvis.adapters.torch.archive import load

    program = load(path)
    sizes: Counter[str] = Counter()
    for source in {source.key: source for source in (*program.parameters.values(), *program.buffers.values())}.values():
        tensor = source.get()
        sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel() * tensor.element_size()
    return Contents(tuple(_Reading(program).operations()), dict(sizes), path.stat().st_size)


def contents_of_tensors(path: Path) -> Contents:
    """The numbers of a safetensors file."""
    from qvis.adapters.checkpoint.safetensors import load
    from qvis.adapters.encodings import ENCODINGS

    sizes: Counter[str] = Counter()
    for one in load(path).tensors:
        if one.dtype in ENCODINGS:
            sizes[one.dtype] += ENCODINGS[one.dtype].bytes_for(prod(one.shape))
    return Contents((), dict(sizes), path.stat().st_size)


class _Reading:
    def __init__(self, program: Program) -> None:
        from qvis.adapters.torch.exported import names_by_path

        self.program = program
        self.names = names_by_path(program)
        self.made: dict[str, Call] = {call.result: call for call in program.calls if call.result}
        self.users: dict[str, list[Call]] = {}
        for call in program.calls:
            for value in (value for values in call.tensors.values() for value in values):
                self.users.setdefault(value, []).append(call)
        self.rounding: set[str] = set()
        """Values on the way into a product of integers and out of it."""
        self.ends: dict[str, str] = {}
        """What such a product is once it is scaled."""
        for call in program.calls:
            if call.operation == "aten._int_mm":
                self._follow(call)
        self.integer: set[str] = set()
        """Values that an operation with integers has made and that have not been rounded yet."""

    def operations(self) -> list[Operation]:
        """In the order of the program."""
        found = []
        for call in self.program.calls:
            arithmetic = Arithmetic.NONE if call.result in self.rounding else self._arithmetic(call)
            if arithmetic is Arithmetic.INTEGER:
                self.integer.add(call.result)
            found.append(Operation(call.result or call.operation, call.operation, arithmetic, self._layer(call)))
        return found

    def _follow(self, product: Call) -> None:
        """Find what rounds the input of a product of integers, and what scales the product."""
        pending = list(product.tensors.get("self", ()))
        while pending:
            call = self.made.get(pending.pop())
            if call is not None and call.operation.rpartition(".")[2] in _ROUNDING and call.result not in self.rounding:
                self.rounding.add(call.result)
                pending += [value for values in call.tensors.values() for value in values]
        last = product
        while last is product or not last.operation.endswith("reshape"):
            users = [user for user in self.users.get(last.result, ()) if "_assert" not in user.operation]
            if len(users) != 1 or users[0].operation.rpartition(".")[2] not in _SCALING:
                break
            last = users[0]
            self.rounding.add(last.result)
        self.ends[product.result] = last.result

    def _arithmetic(self, call: Call) -> Arithmetic:
        library, _, name = call.operation.rpartition(".")
        name = name.rstrip("_") if not name.startswith("_") else name
        if "quantize" in name or "choose_qparams" in name or library != "aten" or name in _MOVES:
            return Arithmetic.NONE
        if call.operation in WEIGHTS:
            weights = call.tensors.get(WEIGHTS[call.operation], [])
            first = next((call.tensors[one] for one in _MULTIPLIED if one in call.tensors), [])
            if all(map(self._is_stored_integer, _matrices(self.program, self, weights))) and weights:
                rounded = bool(first) and call.operation in KERNELS and all(map(self._is_rounded, first))
                return Arithmetic.INTEGER if rounded else Arithmetic.HYBRID
            return Arithmetic.FLOAT
        if name not in _COMPUTED:
            return Arithmetic.FLOAT
        given = [value for values in call.tensors.values() for value in values]
        fine = [self._is_rounded(value) or self._back(value) in self.integer for value in given]
        return Arithmetic.INTEGER if given and all(fine) and self._goes_to_integers(call.result) else Arithmetic.FLOAT

    def _layer(self, call: Call) -> str:
        return next(iter(self.layers(call)), "")

    def layers(self, call: Call) -> tuple[str, ...]:
        """The layers whose weight an operation takes; several where each is a part of its output's channels."""
        for value in call.tensors.get(WEIGHTS.get(call.operation, ""), []):
            path = self.program.origins.get(self.stored(value), "")
            if path in self.names:
                parts = tuple(name for name in self.names[path] if name.startswith(f"{path}."))
                return parts or self.names[path][:1]
        return ()

    def _back(self, value: str) -> str:
        """What a value is a part or another order of."""
        call = self.made.get(value)
        while call is not None and call.operation.rpartition(".")[2] in _MOVES:
            given = [one for values in call.tensors.values() for one in values]
            if not given:
                break
            value = given[0]
            call = self.made.get(value)
        return value

    def stored(self, value: str) -> str:
        """The stored tensor that a value is, maybe dequantized."""
        call = self.made.get(self._back(value))
        if call is not None and "dequantize" in call.operation:
            return self._back(next(iter(call.tensors.values()))[0])
        return self._back(value)

    def _is_stored_integer(self, value: str) -> bool:
        source = self.program.source(self.program.origins.get(self.stored(value), ""))
        return source is not None and not source.get().is_floating_point()

    def _is_rounded(self, value: str) -> bool:
        """Whether it is integers, times a step that is known before the program runs."""
        call = self.made.get(self._back(value))
        if call is None or "dequantize" not in call.operation:
            return False
        inner = self.made.get(self._back(next(iter(call.tensors.values()))[0]))
        if inner is None or "quantize" not in inner.operation:
            return False
        steps = [one for name, values in inner.tensors.items() if name not in ("input", "self") for one in values]
        return not any("choose_qparams" in self._maker(one) for one in steps)

    def _maker(self, value: str) -> str:
        call = self.made.get(value)
        return "" if call is None else call.operation

    def _goes_to_integers(self, value: str) -> bool:
        """Whether all that takes a value rounds it, or hands it on to what does."""
        users = self.users.get(value, [])
        return bool(users) and all(
            "quantize" in user.operation
            or (
                user.operation.rpartition(".")[2] in (*_MOVES, *_SAME, "add", "mul")
                and self._goes_to_integers(user.result)
            )
            for user in users
        )


def _matrices(program: Program, reading: _Reading, values: list[str]) -> list[str]:
    """The weights among what an operation takes: not the biases that lie between them."""
    if len(values) == 1:
        return values
    sources: Mapping[str, object] = program.origins
    found = []
    for value in values:
        source = program.source(str(sources.get(reading.stored(value), "")))
        if source is not None and source.get().ndim > 1:
            found.append(value)
    return found
