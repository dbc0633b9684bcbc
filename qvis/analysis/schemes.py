"""Which grids are compared with each other by default, and what they are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from qvis.analysis.rounding import checked_bits
from qvis.errors import BadArgumentError
from qvis.quantization.grids import Scheme

WIDTHS = (8, 6, 4, 3, 2)
GROUPS = (128, 32)
UNIFORM = ("uniform", "power_of_two", "offset")
"""The kinds of even steps."""
RUNS_ON = {
    "uniform": "integers",
    "power_of_two": "integers",
    "offset": "integers",
    "logarithmic": "shifts",
    "kmeans": "lookup",
    "quantile": "lookup",
    "float8_e4m3fn": "float units",
    "float8_e5m2": "float units",
    "float4_e2m1": "float units",
}
"""What multiplies with the codes of each kind: integer engines as they are, or something else."""
LEFT_OUT = (
    "Clipping is searched for up to 6 bits, in groups and with zero points up to 4: beyond, nothing is worth clipping.",
    "Codebooks of k-means are fitted up to 6 bits per tensor and up to 4 per channel: beyond, or in groups, the"
    " codebooks weigh more than they save.",
    "Logarithmic grids are tried at 3 and 4 bits and quantiles up to 4: more bits only refine them near zero.",
    "Stochastic rounding is there once, at 4 bits per channel, to show its price: twice the noise of nearest levels.",
)
"""What the default schemes do without, and why."""


def default_schemes(bits: Sequence[int] = WIDTHS) -> tuple[Scheme, ...]:
    """Grids of each width that differ in one thing at a time.

    Uniform ones per tensor, per channel and in groups of 128 and 32, symmetric and not, with the whole range and
    clipped for the least noise, and with steps that are powers of two; codebooks, logarithmic ones and quantiles; the
    small floats of 8 and 4 bits; and stochastic rounding once.

    Parameters
    ----------
    bits
        Widths, 2 to 16.
    """
    found: list[Scheme] = []
    for width in dict.fromkeys(checked_bits(one) for one in bits):
        few = width <= 4
        found += [Scheme(bits=width, granularity=one) for one in ("tensor", "channel", *GROUPS)]
        found += [Scheme(bits=width, granularity=one, symmetric=False) for one in ("tensor", "channel", 32)]
        clipped = ("tensor", "channel", *GROUPS) if few else ("tensor", "channel") if width <= 6 else ()
        found += [Scheme(bits=width, granularity=one, range="mse") for one in clipped]
        found += [Scheme("power_of_two", width, one) for one in ("tensor", "channel")]
        if few:
            found += [
                Scheme(bits=width, symmetric=False, range="mse"),
                Scheme("power_of_two", width, range="mse"),
                Scheme("quantile", width),
                Scheme("quantile", width, 32),
            ]
        if width <= 6:
            found += [Scheme("kmeans", width, one) for one in (("tensor", "channel") if few else ("tensor",))]
        if width in (3, 4):
            found.append(Scheme("logarithmic", width))
        if width == 8:
            kinds = ("float8_e4m3fn", "float8_e5m2")
            found += [Scheme(kind, 8, one) for kind in kinds for one in ("tensor", "channel")]
        if width == 4:
            found += [Scheme("float4_e2m1", 4, one) for one in ("channel", 32)]
            found.append(Scheme(bits=4, rounding="stochastic"))
    return tuple(found)


def checked_schemes(schemes: Sequence[Scheme]) -> tuple[Scheme, ...]:
    """The schemes, each once; an error for what is none."""
    if isinstance(schemes, Scheme):
        schemes = (schemes,)
    for one in schemes:
        if not isinstance(one, Scheme):
            raise BadArgumentError(
                f"schemes: got {one!r}, expected qvis.quantization.grids.Scheme such as Scheme('uniform', bits=4)"
            )
    if not schemes:
        raise BadArgumentError("schemes: got none, expected at least one; leave it out for the default ones")
    return tuple(dict.fromkeys(schemes))


def label_schemes(schemes: Sequence[Scheme]) -> list[str]:
    """What each is called: its own words, and what else tells it from another with the same ones."""
    words = [str(one) for one in schemes]
    found = []
    for scheme, text in zip(schemes, words, strict=True):
        alike = [other for other, same in zip(schemes, words, strict=True) if same == text]
        for field in fields(Scheme):
            if len({getattr(other, field.name) for other in alike}) > 1:
                text += f", {field.name} {getattr(scheme, field.name)}"
        found.append(text)
    return found
