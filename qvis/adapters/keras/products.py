"""Which axes the products of two results sum over, in the letters of einsum: one for each axis, nothing left out."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_letters
from typing import Any


def of_einsum(subscripts: str, ranks: Sequence[int]) -> str | None:
    """An equation without dots, and with its result; None where an operand has a letter twice, or there are not two.

    >>> of_einsum("...a,ab", (3, 2))
    'cda,ab->cdb'
    """
    before, arrow, after = subscripts.replace(" ", "").partition("->")
    operands = before.split(",")
    if len(operands) != 2 or len(ranks) != 2:
        return None
    unused = [letter for letter in ascii_letters if letter not in subscripts]
    counts = [
        rank - len(one.replace("...", "")) if "..." in one else 0 for one, rank in zip(operands, ranks, strict=True)
    ]
    if min(counts) < 0:
        return None
    dots = "".join(unused[: max(counts)])
    if not arrow:
        plain = before.replace("...", "").replace(",", "")
        after = "..." + "".join(letter for letter in sorted(set(plain)) if plain.count(letter) == 1)
    operands = [one.replace("...", dots[len(dots) - count :]) for one, count in zip(operands, counts, strict=True)]
    fits = all(len(set(one)) == len(one) == rank for one, rank in zip(operands, ranks, strict=True))
    return f"{','.join(operands)}->{after.replace('...', dots)}" if fits else None


def of_axes(ranks: Sequence[int], axes: Sequence[Sequence[int]], shared: int = 0) -> str | None:
    """The equation of a product over axes of both operands; the first axes may be the same in both.

    >>> of_axes((3, 3), ((1,), (2,)), shared=1)
    'abc,adb->acd'
    """
    first, second = (rank for rank in ranks)
    one, rest = ascii_letters[:first], iter(ascii_letters[first:])
    summed = [[axis % rank for axis in of] for of, rank in zip(axes, ranks, strict=True)]
    if len(summed[0]) != len(summed[1]) or any(axis < shared for of in summed for axis in of):
        return None
    pairs = dict(zip(summed[1], summed[0], strict=True)) | {axis: axis for axis in range(shared)}
    other = "".join(one[pairs[axis]] if axis in pairs else next(rest) for axis in range(second))
    left = [letter for axis, letter in enumerate(one) if axis not in summed[0]]
    left += [letter for axis, letter in enumerate(other) if axis not in pairs]
    return f"{one},{other}->{''.join(left)}"


def of_operation(operation: Any, ranks: Sequence[int]) -> str | None:
    """The equation of an operation or layer of Keras; None where it has none, or follows the rule of NumPy's matmul."""
    kind = type(operation).__name__
    if len(ranks) != 2 or min(ranks) < 1:
        return None
    if kind == "Einsum":
        return of_einsum(str(operation.subscripts), ranks)
    if kind == "Tensordot":
        axes = operation.axes
        if isinstance(axes, int):
            axes = range(ranks[0] - axes, ranks[0]), range(axes)
        return of_axes(ranks, [[one] if isinstance(one, int) else list(one) for one in axes])
    if kind == "Dot" and hasattr(operation, "normalize"):  # the layer, which works sample by sample
        axes = operation.axes
        both = (axes, axes) if isinstance(axes, int) else tuple(axes)
        return None if operation.normalize else of_axes(ranks, [[one] for one in both], shared=1)
    if kind == "Dot":
        return of_axes(ranks, ((-1,), (-2 if ranks[1] > 1 else -1,)))
    return None
