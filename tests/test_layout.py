"""The house: imports go downwards only, and nothing at the command line's door imports torch."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from collections.abc import Collection, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import dfcompress

PACKAGE = Path(dfcompress.__file__).parent
TESTS = Path(__file__).parent
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))

# Rooms from the top floor down: a room imports its own floor's ground and what lies below, no neighbour.
FLOORS = (
    {"__main__"},
    {"cli", "__init__"},
    {"commands"},
    {"verbs"},
    {"synthesis", "training", "quantization", "pruning", "evaluation", "reporting"},
    {"models", "data"},
    {
        "arguments",
        "run",
        "command_line",
        "errors",
        "console",
        "machine",
        "distributed",
        "randomness",
        "schedules",
        "settings",
    },
)
SIDE_BY_SIDE = (FLOORS[-2], FLOORS[-1])


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


def _floor(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def _may_import(path: Path, target: str) -> bool:
    room, wanted = path.parts[0].removesuffix(".py"), target.split(".")[0] or "__init__"
    if _floor(room) == _floor(wanted):
        return room == wanted or FLOORS[_floor(room)] in SIDE_BY_SIDE
    return _floor(room) < _floor(wanted)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_downwards_only(path):
    wrong = [name for name in _imported(path) if not _may_import(path, name)]
    assert not wrong, f"{path} imports upwards or sideways: {wrong}"


def test_no_two_files_import_each_other():
    """Nor do longer rings of files: an import inside a function counts, too."""
    files = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in MODULES}
    imported = {name: {_file_of(each, files) for each in _imported(path)} - {name, ""} for name, path in files.items()}
    list(TopologicalSorter(imported).static_order())  # raises CycleError, naming the ring


def test_the_ground_floor_holds_what_several_rooms_need():
    """A file of `models/` or `data/` that a single room above imports, and no other file of the two, stands there."""
    files = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in MODULES}
    rooms: dict[str, set[str]] = {file: set() for file in ("", *files)}
    for user, path in files.items():
        for imported in _imported(path):
            rooms[_file_of(imported, files)].add(user.split(".")[0])
    ground = [file for file in files if file.startswith(("models.", "data.")) and ".architectures." not in file]
    assert len(ground) > 20
    assert [file for file in ground if len(rooms[file]) < 2 and not rooms[file] & FLOORS[-2]] == []


def _file_of(name: str, files: Collection[str]) -> str:
    """The file that an imported name stands in; nothing for the package's own door."""
    while name and name not in files:
        name = name.rpartition(".")[0]
    return name


def test_every_verb_is_a_file_of_its_name():
    verbs = {name for name, home in dfcompress._HOME.items() if home.startswith("verbs.") and name.islower()}
    assert {PACKAGE / f"verbs/{name}.py" for name in verbs} == set((PACKAGE / "verbs").glob("[!_]*.py"))


def test_every_command_is_a_verb():
    files = {path.stem for path in (PACKAGE / "commands").glob("[!_]*.py")}
    assert files - {"bench"} <= set(dfcompress.__all__)


def test_the_tests_mirror_the_tree():
    """A file of tests stands where the file that it tests stands; what tests the whole stands at the top."""
    files = [path.relative_to(TESTS) for path in TESTS.rglob("*/test_*.py")]
    assert files
    modules = {path.with_name(path.name.lstrip("_")) for path in MODULES}
    strays = [str(file) for file in files if file.with_name(file.name.removeprefix("test_")) not in modules]
    assert strays == []


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


@pytest.mark.parametrize(
    ("arguments", "late"),
    [
        (["inspect"], {"torchvision", "torch._dynamo", "sympy", "onnx", "timm"}),
        (["invert", "--dry-run"], {"torchvision", "onnx", "timm"}),
        (["quantize", "--dry-run"], {"torchvision", "onnx", "timm"}),
    ],
)
def test_nothing_large_is_imported_before_it_is_needed(arguments, late):
    """torchvision takes 0.3 s of CPU time and torch's compiler 1.3 s, of the 3.3 s that `inspect` takes with them."""
    verb, *options = arguments
    call = [verb, str(PACKAGE / "demo_files"), *options]
    code = (
        f"import sys; from dfcompress.cli import run; assert run({call}) == 0\n"
        f"print('early:', *({late} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "early:"
