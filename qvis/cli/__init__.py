"""The command line. Results go to stdout, messages and progress to stderr; each subcommand has a file of its own.

Exit codes: 0 fine, 1 a check failed, 2 wrong use or bad input (one line on stderr), 130 interrupted. Nothing here
imports NumPy, a framework or Bokeh until a command runs, so that ``qvis --help`` is instant.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from qvis.cli import (
    benchmark,
    bits,
    check,
    compare,
    compress,
    demo,
    equalize,
    grids,
    image,
    quantize,
    report,
    sensitivity,
)
from qvis.version import __version__

INTERRUPTED = 130
BROKEN_PIPE = 141
"""What a shell says of a program whose reader went away."""

app = typer.Typer(
    name="qvis",
    # plain help: it loads at once, and reads as well in a log
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(
    invoke_without_command=True,
    epilog="""\b
Examples:
  qvis demo
  qvis report net.py:make_net --weights trained.safetensors
  qvis check model.pt2 --fail-on watch

\b
A model is a file or folder, package.module:factory, or file.py:factory.
Exit codes: 0 fine, 1 a check failed, 2 wrong use or bad input.
""",
)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Shows what quantization will do to a model before it ships."""
    if version:
        typer.echo(f"qvis {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for name, command, examples in (
    ("report", report.report, report.EXAMPLES),
    ("sensitivity", sensitivity.sensitivity, sensitivity.EXAMPLES),
    ("compress", compress.compress, compress.EXAMPLES),
    ("equalize", equalize.equalize, equalize.EXAMPLES),
    ("bits", bits.bits, bits.EXAMPLES),
    ("grids", grids.grids, grids.EXAMPLES),
    ("compare", compare.compare, compare.EXAMPLES),
    ("quantize", quantize.quantize, quantize.EXAMPLES),
    ("benchmark", benchmark.benchmark, benchmark.EXAMPLES),
    ("check", check.check, check.EXAMPLES),
    ("image", image.image, image.EXAMPLES),
    ("demo", demo.demo, demo.EXAMPLES),
):
    # \b keeps the line breaks of what follows
    app.command(name, epilog="\b\n" + "\n".join(("Examples:", *(f"  {line}" for line in examples))))(command)

UsageError: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
"""Typer's own base of all complaints about how a command was typed, wherever this version of it keeps that."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``qvis`` with the arguments (default: those of the process) and return the exit code."""
    # names of layers may hold what the terminal's encoding does not
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # else the interpreter would try to flush once more when it ends, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _run(arguments: Sequence[str] | None) -> int:
    from qvis.errors import QvisError

    try:
        # Typer's own main would end the process by itself on an interruption or a broken pipe
        command = typer.main.get_command(app)
        with command.make_context("qvis", list(sys.argv[1:] if arguments is None else arguments)) as context:
            command.invoke(context)
        return 0
    except typer.Exit as end:
        return int(end.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("interrupted", INTERRUPTED)
    except UsageError as error:
        where = getattr(error, "ctx", None)
        see = where.command_path if where else "qvis"
        return _complain(f"{error.format_message().rstrip('.')}; see: {see} --help")  # type: ignore[attr-defined]
    except QvisError as error:
        if os.environ.get("QVIS_DEBUG"):
            raise
        return _complain(str(error))
    except BrokenPipeError:
        raise
    except Exception as error:
        if os.environ.get("QVIS_DEBUG"):
            raise
        return _complain(f"unexpected {type(error).__name__}: {error}; set QVIS_DEBUG=1 to see where")


def _complain(text: str, code: int = 2) -> int:
    """Always one line, whatever the message quotes."""
    printable = "".join(char if char.isprintable() else " " for char in text)
    print(f"qvis: error: {' '.join(printable.split())}", file=sys.stderr)
    return code
