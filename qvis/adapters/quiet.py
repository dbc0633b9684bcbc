"""Keeps frameworks from printing: what they write with Python, and what their C++ writes to the process itself."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from io import StringIO

_LOGGERS = ("absl", "tensorflow", "keras")


@contextmanager
def quietly() -> Iterator[None]:
    """Until it is left, nothing is printed, logged by TensorFlow, or warned of."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for descriptor in (1, 2):
            stack.enter_context(_to_nowhere(descriptor))
        stack.enter_context(redirect_stdout(StringIO()))
        stack.enter_context(redirect_stderr(StringIO()))
        for logger in map(logging.getLogger, _LOGGERS):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL + 1)
        yield


@contextmanager
def _to_nowhere(descriptor: int) -> Iterator[None]:
    """What is written to a file descriptor of the process is lost."""
    _flush()
    try:
        saved = os.dup(descriptor)
    except OSError:  # it is closed anyway
        yield
        return
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
        yield
    finally:
        _flush()
        os.dup2(saved, descriptor)
        os.close(saved)


def _flush() -> None:
    """What was written before must not wait until it is lost, nor what is lost until it is written."""
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        with suppress(AttributeError, OSError, ValueError):
            stream.flush()  # type: ignore[union-attr]
