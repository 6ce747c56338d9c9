"""Recipes of the user's own: by file and function, as a function, and as the documentation shows one."""

from __future__ import annotations

import inspect
import json
from importlib import metadata
from pathlib import Path

import pytest

import dfcompress
from dfcompress.cli import run
from dfcompress.data.synthetic_set import SyntheticSet
from dfcompress.errors import BadInput
from dfcompress.machine.execution import Compute
from dfcompress.synthesis import recipe as recipe_module
from dfcompress.synthesis.recipe import Synthesis, choose
from dfcompress.synthesis.recipe_source import find_recipe
from dfcompress.synthesis.recipes import RECIPES, known_recipes
from dfcompress.verbs.invert import invert

DEMO = Path(dfcompress.__file__).parent / "demo_files"
EAGER = Compute(device="cpu", precision="fp32", compile="off")
FILE = """
from dfcompress import Phase, Pixels, Recipe
from dfcompress.synthesis.losses import class_cross_entropy

PRESETS = {"short": {"steps": 2}, "long": {"steps": 9}}


def plain(*, steps: int = 5, lr: float = 0.1, batch_size: int = 2) -> Recipe:
    return Recipe(images=Pixels(), losses=[class_cross_entropy()], phases=[Phase(steps, lr)], batch_size=batch_size)


def wrong(*, steps: int = 5):
    return steps


def strict(steps):
    return steps
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FILE)
    return tmp_path / "mine.py"


LINE = ["invert", str(DEMO), "--recipe", "mine.py:plain", "--set", "lr=0.2", "--images", "4", "-o", "set"]
LINE += ["--device", "cpu", "--compile", "off", "--precision", "fp32", "-q"]


def test_the_example_of_the_documentation_builds_and_runs(tmp_path):
    """The docstring's code, as a file of its own; only the checkpoint and the folder are put in."""
    text = inspect.cleandoc(recipe_module.__doc__.partition("\n\n")[2].rpartition("\n\n")[0])
    example = tmp_path / "example.py"
    example.write_text(text)
    names = {"checkpoint": DEMO, "folder": tmp_path / "set", "__name__": "example"}
    exec(compile(text, str(example), "exec"), names)
    assert names["made"].images == 8
    metrics = [json.loads(line) for line in (tmp_path / "set" / "metrics.jsonl").read_text().splitlines()]
    assert set(metrics[-1]) >= {"cross_entropy", "bn_distance", "quiet"}


@pytest.mark.usefixtures("file")
def test_a_recipe_of_ones_own_is_named_by_file_and_function():
    assert run(LINE) == 0
    recipe = SyntheticSet(Path("set")).manifest["recipe"]
    settings = {"steps": 2, "lr": 0.2, "batch_size": 2}
    assert recipe == {"name": "mine.py:plain", "preset": "short", "settings": settings}
    assert choose("mine.py:plain", "long").recipe.steps == 9


def test_a_run_is_resumed_with_the_same_file_alone(file, capsys):
    assert run(LINE) == 0
    shard = Path("set/shard-00000.safetensors")
    before = shard.read_bytes()
    shard.unlink()
    assert run([*LINE, "--resume"]) == 0
    assert shard.read_bytes() == before
    shard.unlink()
    file.write_text(FILE + "\n# changed\n")
    assert run([*LINE, "--resume"]) == 2
    assert "file of recipe mine.py:plain has changed since set was begun" in capsys.readouterr().err
    assert not shard.exists()


def test_a_function_is_a_recipe_in_python(file, tmp_path):
    names = {}
    exec(compile(FILE, str(file), "exec"), names)
    one = Synthesis(recipe=names["plain"], images=2)
    by_name = Synthesis(recipe=f"{file}:plain", images=2)
    shards = []
    for number, synthesis in enumerate((one, by_name)):
        invert(DEMO, output=tmp_path / str(number), synthesis=synthesis, compute=EAGER)
        shards.append((tmp_path / str(number) / "shard-00000.safetensors").read_bytes())
    assert shards[0] == shards[1]


def test_an_installed_package_adds_recipes(file, monkeypatch):
    entry = metadata.EntryPoint("their-recipe", "mine:plain", RECIPES)

    def entry_points(*, group, name=entry.name):
        return [entry] if (group, name) == (RECIPES, entry.name) else []

    monkeypatch.syspath_prepend(str(file.parent))
    monkeypatch.setattr(metadata, "entry_points", entry_points)
    assert known_recipes()[-1] == "their-recipe"
    assert choose("their-recipe").recipe.batch_size == 2


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("mine.py:plane", "mine.py has no function 'plane'. Name a function that returns a Recipe"),
        ("other.py:plain", "other.py does not exist. Name a Python file"),
        ("mine.py:wrong", "mine.py:wrong gave a int. Let the function return a Recipe"),
        ("mine.py:strict", "'steps' of recipe mine.py:strict has no default. Give every setting one"),
        ("depdream", "no recipe 'depdream'. Did you mean 'deepdream'"),
        (len, "is not a function of a file"),
    ],
)
def test_what_is_no_recipe_is_refused(recipe, message):
    with pytest.raises(BadInput) as caught:
        choose(recipe)
    assert message in str(caught.value)


def test_what_a_users_own_code_raises_is_said_in_one_sentence(tmp_path):
    (tmp_path / "syntax.py").write_text("def plain(:\n")
    (tmp_path / "fails.py").write_text("def plain(*, steps=1):\n    raise ValueError('no steps')\n")
    with pytest.raises(BadInput, match=r"syntax.py cannot be run: SyntaxError: .*line 1.*Correct the file"):
        choose(f"{tmp_path}/syntax.py:plain")
    with pytest.raises(BadInput, match=r"fails.py:plain failed: ValueError: no steps\. Correct the function"):
        choose(f"{tmp_path}/fails.py:plain")


def test_a_file_runs_once(file):
    assert find_recipe(f"{file}:plain").function is find_recipe(f"{file}:plain").function
