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


def wait_for(text: str, terminal: Terminal) -> None:
    """Until the bar, which is drawn ten times a second by a thread of its own, has shown this."""
    end = time.monotonic() + 60
    while text not in terminal.getvalue():
        assert time.monotonic() < end, f"{text!r} was never shown"
        time.sleep(0.01)


def test_short_work_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    monkeypatch.setattr(progress, "AFTER_SECONDS", 600)
    with Work() as work:
        work.say("Loading")
        assert list(work.layers(LAYERS)) == list(LAYERS)
    assert terminal.getvalue() == ""


def test_longer_work_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    monkeypatch.setattr(progress, "AFTER_SECONDS", 0.01)
    with Work() as work:
        work.say("[red]Loading")
        wait_for("[red]Loading", terminal)
        for done, _ in enumerate(work.layers(LAYERS)):
            wait_for(f"{done}/3", terminal)
    assert "Reading layers" in terminal.getvalue()


def test_an_error_ends_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    monkeypatch.setattr(progress, "AFTER_SECONDS", 0.01)

    def fail() -> None:
        with Work() as work:
            work.say("Loading")
            wait_for("Loading", terminal)
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
