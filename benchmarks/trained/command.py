"""What the scripts that look at trained models share: their options, the models one by one, and the text they print."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trained import LOADERS, MissingError, Sources, Subject


def make_parser(
    about: str | None, *, models: Sequence[str] = tuple(LOADERS), samples: int, figures: bool = False
) -> argparse.ArgumentParser:
    """A parser with the options that all these scripts have; ``figures`` adds a file for these."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="with cifar10_subset.npz and resnet56_cifar10.th")
    known = ", ".join(LOADERS)
    parser.add_argument("--models", nargs="+", choices=LOADERS, default=list(models), metavar="NAME", help=known)
    parser.add_argument("--samples", type=int, default=samples, help=f"that qvis is given (default {samples})")
    parser.add_argument("--cache", type=Path, default=Path(".benchmarks"), metavar="FOLDER", help="of trained models")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the tables as well as print them")
    if figures:
        parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    return parser


class Script:
    """One run of a script: what was asked for, and what it has printed."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.chosen = parser.parse_args()
        self._texts: list[str] = []

    def show(self, text: str) -> None:
        """Print it, and keep it for the file."""
        self._texts.append(text)
        print(text, flush=True)

    def subjects(self) -> Iterator[Subject]:
        """The models that were asked for; of one that cannot be had it is shown why."""
        for name in self.chosen.models:
            try:
                yield LOADERS[name](Sources(self.chosen.cache, self.chosen.data))
            except (MissingError, ImportError) as error:  # noqa: PERF203
                self.show(f"{name}: left out, {error}\n")

    def write(self, figures: Any = None) -> None:
        """Write the files that were asked for: the text and, where there is an option for them, the figures."""
        if self.chosen.out is not None:
            self.chosen.out.write_text("\n".join(self._texts) + "\n")
        if getattr(self.chosen, "json", None) is not None:
            self.chosen.json.write_text(json.dumps(figures, indent=1))
