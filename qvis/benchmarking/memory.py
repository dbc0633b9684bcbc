"""Finds how much memory a model takes, each in a fresh process: in one that ran others before, nobody could tell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qvis.benchmarking.contenders import Contender
from qvis.benchmarking.peak import write_inputs
from qvis.data.arrays import is_array
from qvis.running import Batch

SECONDS = 300
"""A process that takes longer is ended."""


def peak_memory(contender: Contender, batch: Batch) -> tuple[int | None, str]:
    """By how many bytes a fresh process grows when it opens the file and runs the batch once, or why that is unknown.

    What importing the engine takes is not counted.
    """
    if contender.file is None:
        return None, "it is in memory already; save it to a file, and give that"
    if sys.platform == "win32":
        return None, "Windows does not tell a process the peak of its memory"
    batch = contender.arrange(batch)
    if not all(is_array(one) for one in (*batch.args, *batch.kwargs.values())):
        return None, "its inputs are nests of arrays, which cannot be handed to another process"
    with TemporaryDirectory(prefix="qvis-") as folder:
        inputs = Path(folder) / "inputs.npz"
        write_inputs(inputs, batch)
        command = ["-m", "qvis.benchmarking.peak", str(contender.file.resolve()), str(inputs), str(contender.threads)]
        return _ask([sys.executable, *command], Path(folder))


def _ask(command: list[str], folder: Path) -> tuple[int | None, str]:
    # the other process finds what this one finds, wherever it was started
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path)}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace", timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return None, f"running it in a process of its own took more than {SECONDS} seconds"
    except OSError as error:
        return None, f"no process could be started: {error}"
    found: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        # frameworks may print as well
        with suppress(ValueError):
            found = dict(json.loads(line)) if line.startswith("{") else found
    if "bytes" in found:
        return int(found["bytes"]), ""
    why = found.get("failed") or next(reversed(done.stderr.split("\n")[:-1]), "") or f"exit status {done.returncode}"
    return None, f"running it in a process of its own failed: {' '.join(why.split())[:300]}"
