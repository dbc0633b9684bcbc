"""The bar on stderr."""

from __future__ import annotations

import io
import time

import numpy as np
import pytest

from qvis.cli import progress
from qvis.cli.progress import Work
from qvis.layers import Layer

LAYERS = tuple(Layer(f"layer{i}", "Linear", (1, 1), "float32", lambda: np.ones((1, 1))) for i in range(3))


class Terminal(io.StringIO):
    """Takes what is written and says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def use_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Replace stderr; no fixture, since pytest puts its own stderr in place between a fixture and its test."""
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return stream


def test_short_work_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    with Work() as work:
        work.say("Loading")
        assert list(work.layers(LAYERS)) == list(LAYERS)
    assert terminal.getvalue() == ""


def test_longer_work_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    monkeypatch.setattr(progress, "AFTER_SECONDS", 0.01)
    with Work() as work:
        work.say("[red]Loading")
        time.sleep(0.3)
        for _ in work.layers(LAYERS):
            time.sleep(0.15)
    shown = terminal.getvalue()
    assert "[red]Loading" in shown
    assert "Reading layers" in shown
    assert "2/3" in shown


def test_an_error_ends_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    monkeypatch.setattr(progress, "AFTER_SECONDS", 0.01)

    def fail() -> None:
        with Work() as work:
            work.say("Loading")
            time.sleep(0.2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert terminal.getvalue().rstrip().endswith("\x1b[2K")  # the line is cleared
    assert "\x1b[?25h" in terminal.getvalue()  # the cursor is back


def test_nothing_is_shown_where_stderr_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(progress, "AFTER_SECONDS", 0.0)
    with Work() as work:
        work.say("Loading")
        time.sleep(0.05)
        assert list(work.layers(LAYERS)) == list(LAYERS)
    assert stream.getvalue() == ""
