"""The house: imports go downwards only, and nothing at the command line's door imports torch."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dfcompress

PACKAGE = Path(dfcompress.__file__).parent
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))

ENGINES = {"synthesis", "training", "quantization", "evaluation"}
VERB_FILES = {
    "synthesis/invert.py",
    "synthesis/record.py",
    "training/distill.py",
    "training/merge.py",
    "quantization/quantize.py",
    "quantization/export.py",
    "evaluation/doctor.py",
    "evaluation/evaluate.py",
    "evaluation/inspect.py",
    "evaluation/bench_step.py",
    "evaluation/bench_train.py",
    "evaluation/result.py",
    "evaluation/demo.py",
}
GROUND = {"run", "errors", "console", "device", "distributed", "randomness", "settings"}
ENTRANCE = {"", "__main__", "cli", "commands"}


def _imported(path: Path) -> Iterator[str]:
    """Dotted names inside the package that a file imports at run time."""
    tree = ast.parse((PACKAGE / path).read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dfcompress":
            yield from (f"{node.module}.{alias.name}".removeprefix("dfcompress").lstrip(".") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (
                alias.name.removeprefix("dfcompress").lstrip(".")
                for alias in node.names
                if alias.name.split(".")[0] == "dfcompress"
            )


def _room(name: str) -> str:
    return name.split(".")[0]


def _may_import(path: Path, target: str) -> bool:
    room, file = path.parts[0].removesuffix(".py"), path.as_posix()
    wanted = _room(target)
    if room in ENTRANCE | {"__init__"}:
        return True
    if wanted in GROUND:
        return True
    if room in GROUND:
        return False
    if room in {"models", "data"}:
        return wanted in {"models", "data"}
    if wanted in {"models", "data"} or wanted == room:
        return True
    return file in VERB_FILES and wanted in ENGINES


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_downwards_only(path):
    wrong = [name for name in _imported(path) if not _may_import(path, name)]
    assert not wrong, f"{path} imports upwards or sideways: {wrong}"


def test_every_verb_file_exists():
    assert {name for name in VERB_FILES if not (PACKAGE / name).exists()} == set()


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_only_the_console_prints(path):
    calls = [node for node in ast.walk(ast.parse((PACKAGE / path).read_text())) if isinstance(node, ast.Call)]
    names = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
    assert path.name == "console.py" or "print" not in names


def test_public_names_resolve_and_are_listed():
    assert dfcompress.__all__ == sorted(dfcompress.__all__)
    for name in dfcompress.__all__:
        assert getattr(dfcompress, name) is not None


def test_no_module_of_the_top_has_the_name_of_a_verb():
    assert {module.name for module in pkgutil.iter_modules(dfcompress.__path__)}.isdisjoint(dfcompress.__all__)


def test_every_public_name_stays_the_same_whatever_is_imported():
    """An imported submodule becomes an attribute of its package, in place of a function of that name."""
    code = (
        "import importlib, pkgutil, dfcompress\n"
        "names = [name for name in dfcompress.__all__ if name != '__version__']\n"
        "first = {name: getattr(dfcompress, name) for name in names}\n"
        "for module in pkgutil.walk_packages(dfcompress.__path__, 'dfcompress.'):\n"
        "    if not module.name.endswith('__main__'): importlib.import_module(module.name)\n"
        "print(*[name for name in names if not callable(first[name]) or getattr(dfcompress, name) is not first[name]])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("arguments", [["--help"], ["invert", "--help"], ["quantize", "--bots", "4w4a"], ["nonsense"]])
def test_help_and_usage_errors_import_no_torch(arguments):
    code = f"import sys; from dfcompress.cli import run; run({arguments!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_importing_the_package_imports_no_torch():
    code = "import sys, dfcompress; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
