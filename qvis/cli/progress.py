"""How far the work has come: a bar on stderr, for people only, and only where there is time to read it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from threading import Timer
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

    from qvis.layers import Layer
    from qvis.quantization.methods import TrainingStep

AFTER_SECONDS = 0.5
"""Shorter work shows nothing."""


class Work:
    """A stretch of work that shows a bar once it has taken :data:`AFTER_SECONDS`; silent when not on a terminal.

    >>> with Work() as work:
    ...     work.say("Loading the model")
    ...     analysis = analyze(model, progress=work.layers)
    """

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._timer: Timer | None = None

    def __enter__(self) -> Work:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
                redirect_stdout=False,
            )
            self._timer = Timer(AFTER_SECONDS, self._bar.start)
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None and self._timer is not None:
            self._timer.cancel()
            self._timer.join()
            if self._bar.live.is_started:
                self._bar.stop()

    def say(self, what: str) -> None:
        """Name what is done now, when it is not known how long it takes."""
        if self._bar is not None:
            self._clear(self._bar)
            self._bar.add_task(what, total=None)

    def layers(self, layers: Sequence[Layer]) -> Iterator[Layer]:
        """Yield the layers and move the bar; for the argument ``progress`` of the functions of qvis."""
        return self.steps(layers, "Reading layers")

    def steps(self, items: Sequence[Any], what: str, /) -> Iterator[Any]:
        """Yield the items and move the bar; for the argument ``track`` of the functions of qvis."""
        if self._bar is None:
            yield from items
            return
        self._clear(self._bar)
        task = self._bar.add_task(what, total=len(items))
        for item in items:
            yield item
            self._bar.advance(task)

    def train(self, step: TrainingStep, /) -> None:
        """Show how far training has come; for the argument ``watch`` of :func:`qvis.quantize`.

        The end of each epoch is printed as well, for logs too, since what training came to is a result.
        """
        right = "" if step.accuracy is None else f", {100 * step.accuracy:.1f} % right"
        what = f"Epoch {step.epoch} of {step.epochs}: loss {step.loss:.4f}{right}"
        if step.step == step.steps:
            # above the bar, which may be drawn
            console = None if self._bar is None else self._bar.console
            print(what, file=sys.stderr) if console is None else console.print(what, markup=False, highlight=False)
        if self._bar is None:
            return
        done = (step.epoch - 1) * step.steps + step.step
        if not self._bar.tasks or self._bar.tasks[0].total != step.epochs * step.steps:
            self._clear(self._bar)
            self._bar.add_task(what, total=step.epochs * step.steps)
        self._bar.update(self._bar.task_ids[0], description=what, completed=done)

    @staticmethod
    def _clear(bar: Progress) -> None:
        for task in bar.task_ids:
            bar.remove_task(task)
