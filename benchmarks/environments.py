"""Makes the virtual environments that the benchmarks run the tools in, beside this file, and keeps them.

There are two, because the peer pins an old Bokeh and qvis is measured with the newest; both hold the same PyTorch. An
environment is made anew, or added to, only when what it should hold has changed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Environment:
    """A virtual environment: its folder beside this file, and what pip is asked to install."""

    folder: str
    requirements: tuple[str, ...]

    @property
    def python(self) -> Path:
        """Its interpreter."""
        inside = ("Scripts", "python.exe") if sys.platform == "win32" else ("bin", "python")
        return (HERE / self.folder).joinpath(*inside)

    def make(self) -> None:
        """Make it, unless it is there and holds all of this."""
        stamp = HERE / self.folder / "holds.json"
        wanted = json.dumps([self.requirements, sys.version, (CHECKOUT / "setup.cfg").read_text()])
        if stamp.exists() and stamp.read_text() == wanted and self.python.exists():
            return
        print(f"making {self.folder}: {' '.join(self.requirements)} (minutes the first time)", file=sys.stderr)
        if not self.python.exists():
            _run(sys.executable, "-m", "venv", str(HERE / self.folder))
        # Without this constraint pip would replace PyTorch by the newest that the packages' requirements allow.
        constraints = HERE / self.folder / "constraints.txt"
        constraints.write_text(f"{TORCH}\n")
        pip = (str(self.python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
        _run(*pip, "--constraint", str(constraints), TORCH, *self.requirements)
        stamp.write_text(wanted)


def _run(*command: str) -> None:
    # Only what goes wrong is shown: pip's warnings would drown the table, and stdout may be read by a machine.
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout}\n{' '.join(command)}\nfailed with exit status {done.returncode}, see above")


AIMET = Environment(".venv-aimet", ("aimet-torch==2.42.0", "bokeh==3.6.3"))
QVIS = Environment(".venv-qvis", ("--editable", str(CHECKOUT)))
ENVIRONMENTS = {"aimet": AIMET, "qvis": QVIS}
