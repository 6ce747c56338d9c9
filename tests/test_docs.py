"""The documentation is true to the code: `python tests/test_docs.py` writes docs/recipes.md anew."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import click
import pytest

from dfcompress.cli import root
from dfcompress.synthesis.recipes import recipe_names

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
COMMANDS = root.list_commands(None)


def recipes_page() -> str:
    """docs/recipes.md, from the docstrings, signatures and presets of the recipe files."""
    parts = ["# Recipes", "", "Made from the docstrings by `python tests/test_docs.py`; a test compares.", ""]
    for name in recipe_names():
        module = importlib.import_module(f"dfcompress.synthesis.recipes.{name.replace('-', '_')}")
        function = getattr(module, name.replace("-", "_"))
        defaults = {key: value.default for key, value in inspect.signature(function).parameters.items()}
        parts += [f"## `{name}`", "", module.__doc__.strip(), "", f"Source: {module.PAPER}.", ""]
        parts += [f"| setting | {' | '.join(f'`{preset}`' for preset in module.PRESETS)} |"]
        parts += ["|---" * (1 + len(module.PRESETS)) + "|"]
        for key, default in defaults.items():
            cells = " | ".join(str(preset.get(key, default)) for preset in module.PRESETS.values())
            parts.append(f"| `{key}` | {cells} |")
        parts.append("")
    return "\n".join(parts)


def test_the_recipes_page_is_the_one_the_code_makes():
    assert (DOCS / "recipes.md").read_text() == recipes_page()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_page_that_shows_how_to_call_it(command):
    assert f"dfcompress {command}" in (DOCS / f"{command}.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_that_is_mentioned_exists(page):
    known = {"--help", "--version", "--upgrade", "--extra-index-url", "--nproc-per-node", "--ntasks", "--gpus-per-task"}
    known |= {"--no-deps", "--no-build-isolation", "--no-index", "--durations", "--dist"}  # Of pip and pytest.
    known |= {"--only", "--seeds", "--sources"}  # Of docs/measure_quantization.py.
    known |= {"--write"}  # Of docs/measure_support.py.
    for name in COMMANDS:
        command = root.get_command(click.Context(root), name)
        for part in [command, *getattr(command, "commands", {}).values()]:
            known |= {
                spelling for parameter in part.params for spelling in (*parameter.opts, *parameter.secondary_opts)
            }
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", page.read_text()))
    assert mentioned <= known, mentioned - known


def test_the_readme_begins_with_the_two_lines():
    first_screen = "\n".join((REPOSITORY / "README.md").read_text().splitlines()[:45])
    assert "pip install . && dfcompress demo" in first_screen
    assert "pip install '.[dev]' && pytest" in first_screen
    assert "![" in first_screen
    assert "@@" not in (REPOSITORY / "README.md").read_text()


def test_every_file_of_the_package_has_its_place_in_the_architecture():
    text = (DOCS / "architecture.md").read_text()
    package = REPOSITORY / "dfcompress"
    open_folders = {"commands", "recipes", "architectures", "observers"}
    rooms = [path for path in package.rglob("*.py") if path.parent.name not in open_folders]
    rooms = [path for path in rooms if path.parent.name != "verbs" or path.name.startswith("_")]
    missing = [path.name for path in rooms if path.name not in text and not path.name.startswith("__")]
    assert not missing


if __name__ == "__main__":
    (DOCS / "recipes.md").write_text(recipes_page())
