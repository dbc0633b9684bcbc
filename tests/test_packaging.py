"""What is installed, what is loaded, and who may import what."""

from __future__ import annotations

import ast
import configparser
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "qvis").rglob("*.py"))
FRAMEWORKS = {"torch", "torchvision", "torchao", "tensorflow", "keras", "h5py", "onnx", "onnxruntime", "transformers"}
OPTIONAL = {
    "ai_edge_litert": "ai-edge-litert",
    "torch": "torch",
    "h5py": "keras",
    "keras": "keras",
    "tensorflow": "tensorflow",
    "onnx": "onnx",
    "onnxruntime": "onnxruntime",
    "PIL": "pillow",
    "scipy": "scipy",
    "threadpoolctl": "threadpoolctl",
    "torchao": "torchao",
}
"""Imported modules that an extra installs, and a requirement of that extra."""
DISTRIBUTIONS = {"markupsafe": "jinja2", "click": "typer"}
"""Imported modules that come with another distribution, which needs them."""


@pytest.fixture(scope="module")
def metadata() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def listed(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def requirement_names(text: str) -> dict[str, str]:
    """Distribution -> what is said of its version."""
    pattern = re.compile(r"([A-Za-z0-9_.-]+)\s*(.*)")
    matches = [pattern.fullmatch(line) for line in listed(text)]
    return {match[1].lower(): match[2] for match in matches if match}


def imports(tree: ast.AST) -> Iterator[str]:
    """The modules that a file imports, wherever in it, except those for the type checker alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from (name for other in node.orelse for name in imports(ast.Module([other], [])))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))
            yield from imports(node)
        else:
            yield from imports(node)


def imported_packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(ast.parse(path.read_text(encoding="utf-8")))}


def modules_after(code: str) -> set[str]:
    """The top-level packages that a fresh interpreter has loaded after ``code``."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    return set(json.loads(done.stdout.splitlines()[-1]))


# ---------------------------------------------------------------------------------------------------------------------
# What is loaded


def test_importing_qvis_loads_no_framework_and_none_of_its_dependencies() -> None:
    loaded = modules_after("import qvis")
    assert not loaded & {*FRAMEWORKS, "bokeh", "jinja2", "typer", "rich", "safetensors", "numpy", "pandas"}


def test_the_public_functions_load_no_framework_and_no_bokeh() -> None:
    loaded = modules_after("import qvis\nfor name in qvis.__all__: getattr(qvis, name)")
    assert not loaded & {*FRAMEWORKS, "bokeh", "pandas", "typer", "rich"}


def test_the_help_of_the_command_line_loads_no_framework_and_no_bokeh() -> None:
    loaded = modules_after("from qvis.cli import main\nassert main(['--help']) == 0")
    assert not loaded & {*FRAMEWORKS, "bokeh", "jinja2", "numpy", "pandas"}


def test_every_public_name_can_be_imported() -> None:
    modules_after("from qvis import *")


# ---------------------------------------------------------------------------------------------------------------------
# Who imports what


def test_the_search_for_imports_finds_those_inside_functions_and_passes_over_those_for_types() -> None:
    code = """
if TYPE_CHECKING:
    import keras
else:
    import json
def read():
    try:
        from torch.nn import Linear
    except ImportError:
        import_module("onnx")
from . import tensorflow
"""
    assert set(imports(ast.parse(code))) == {"json", "torch.nn", "onnx"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_only_adapters_and_quantization_import_a_framework(path: Path) -> None:
    parts = path.relative_to(ROOT / "qvis").parts
    if parts[0] not in ("adapters", "quantization"):
        assert not imported_packages(path) & FRAMEWORKS


def test_whatever_qvis_imports_is_named_among_its_dependencies(metadata: configparser.ConfigParser) -> None:
    required = requirement_names(metadata["options"]["install_requires"])
    extras = {name for text in metadata["options.extras_require"].values() for name in requirement_names(text)}
    used = set().union(*map(imported_packages, SOURCES)) - set(sys.stdlib_module_names) - {"qvis"}
    assert {DISTRIBUTIONS.get(name, name) for name in used - set(OPTIONAL)} <= set(required)
    assert {OPTIONAL[name] for name in used & set(OPTIONAL)} <= extras


def test_each_dependency_has_a_lower_bound(metadata: configparser.ConfigParser) -> None:
    required = requirement_names(metadata["options"]["install_requires"])
    extra = requirement_names(metadata["options.extras_require"]["torch"])
    for name, version in {**required, **extra}.items():
        assert version.startswith(">="), f"{name} {version}"


def test_constraints_pin_every_direct_dependency(metadata: configparser.ConfigParser) -> None:
    groups = [metadata["options"]["install_requires"], *metadata["options.extras_require"].values()]
    direct = {name for text in groups for name in requirement_names(text)}
    lines = listed((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    pins = {line.partition("==")[0].lower() for line in lines if not line.startswith("#")}
    assert pins == direct


# ---------------------------------------------------------------------------------------------------------------------
# What is installed


def test_every_package_in_the_source_is_installed(metadata: configparser.ConfigParser) -> None:
    packages = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in SOURCES}
    packages |= {f"qvis.{path.parent.relative_to(ROOT).as_posix().replace('/', '.')}" for path in templates("py")}
    assert packages == set(listed(metadata["options"]["packages"]))


def templates(*suffixes: str) -> list[Path]:
    return [path for suffix in suffixes for path in sorted((ROOT / "templates").rglob(f"*.{suffix}"))]


def test_templates_are_found_through_the_installed_package() -> None:
    spec = find_spec("qvis.templates")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(next(iter(spec.submodule_search_locations)))
    for path in templates("jinja", "css", "js"):
        assert (folder / path.relative_to(ROOT / "templates")).is_file()


def test_the_command_is_installed() -> None:
    commands = [entry for entry in entry_points(group="console_scripts") if entry.name == "qvis"]
    assert commands
    assert callable(commands[0].load())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names of the files in a wheel made of a copy of the source, so that the checkout stays as it is."""
    pytest.importorskip("setuptools", minversion="77", reason="builds a wheel without the network")
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("qvis", "templates"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.rst", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    build = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", build], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def test_a_wheel_holds_every_module(wheel: set[str]) -> None:
    assert {path.relative_to(ROOT).as_posix() for path in SOURCES} <= wheel


def test_a_wheel_holds_templates_weights_and_the_marker_of_types(wheel: set[str]) -> None:
    assert {f"qvis/{path.relative_to(ROOT).as_posix()}" for path in templates("jinja", "css", "js", "py")} <= wheel
    assert "qvis/models/digits.safetensors" in wheel
    assert "qvis/models/digits_layers.npz" in wheel
    assert "qvis/py.typed" in wheel


def test_a_wheel_holds_nothing_that_only_the_checkout_needs(wheel: set[str]) -> None:
    assert {name.partition("/")[0] for name in wheel if ".dist-info/" not in name} == {"qvis"}


def test_the_shipped_weights_are_small() -> None:
    assert (ROOT / "qvis/models/digits.safetensors").stat().st_size <= 400_000
