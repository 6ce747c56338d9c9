"""Where a recipe comes from: a built-in file, an installed package, or a function that the user names.

    find_recipe("deepinversion")     # dfcompress/synthesis/recipes/deepinversion.py
    find_recipe("quiet")             # an installed package's entry point in the group dfcompress.recipes
    find_recipe("mine.py:quiet")     # a function of the user's own file, or package.module:quiet
    find_recipe(quiet)               # the function itself, in Python

The function takes keyword-only settings, each with a default, and returns a `Recipe`. Its module may have `PRESETS`,
settings by the name of a preset; the first preset is the default one.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from dfcompress.errors import BadInput, unknown
from dfcompress.settings import named_function
from dfcompress.synthesis import recipes
from dfcompress.synthesis.recipes import RECIPES, known_recipes, recipe_names

WITHOUT_PRESETS: Mapping[str, Mapping[str, Any]] = {"default": {}}


@dataclass(frozen=True)
class RecipeSource:
    """A function that returns a recipe, and the sha256 of its file (None for a built-in recipe)."""

    name: str
    function: Callable[..., Any]
    sha256: str | None = None

    @property
    def presets(self) -> Mapping[str, Mapping[str, Any]]:
        """Settings by the name of a preset; the first preset is the default one."""
        presets: Mapping[str, Mapping[str, Any]] = self.beside("PRESETS") or WITHOUT_PRESETS
        return presets

    @property
    def settings(self) -> dict[str, Any]:
        """The default of every setting; raises `BadInput` if a setting has none."""
        parameters = inspect.signature(self.function).parameters
        for name, parameter in parameters.items():
            if parameter.default is parameter.empty:
                raise BadInput(f"Setting {name!r} of recipe {self.name} has no default.", "Give every setting one.")
        return {name: parameter.default for name, parameter in parameters.items()}

    def beside(self, name: str) -> Any:
        """The object `name` of the function's module, None if there is none."""
        return inspect.unwrap(self.function).__globals__.get(name)


# Functions that the user named, by file and name: a file runs once, however often its recipe is requested.
_NAMED: dict[str, RecipeSource] = {}


def find_recipe(recipe: str | Callable[..., Any]) -> RecipeSource:
    """The source of a recipe by its name or function; code of a user's file runs only because the user names it.

    Raises `BadInput`, with the nearest name, if there is no such recipe.
    """
    if not isinstance(recipe, str):
        return _remembered(_path(recipe).as_posix() + f":{recipe.__qualname__}", recipe)
    if recipe in recipe_names():
        module = importlib.import_module(f"{recipes.__name__}.{recipe.replace('-', '_')}")
        return RecipeSource(recipe, getattr(module, module.__name__.rpartition(".")[2]))
    known = _NAMED.get(_place(recipe))
    if known and known.sha256 == _sha256(known.function):
        return known
    if ":" in recipe:
        return _remembered(recipe, named_function(recipe, option="--recipe", returns="a Recipe"))
    for entry in metadata.entry_points(group=RECIPES, name=recipe):
        return _remembered(recipe, entry.load())
    raise unknown("recipe", recipe, [*known_recipes(), "file.py:function"])


def _remembered(name: str, function: Callable[..., Any]) -> RecipeSource:
    source = _NAMED[_place(name)] = RecipeSource(name, function, _sha256(function))
    return source


def _place(name: str) -> str:
    """The name with the absolute path of its file."""
    path, _, function = name.rpartition(":")
    return f"{Path(path).resolve()}:{function}" if path.endswith(".py") else name


def _sha256(function: Callable[..., Any]) -> str:
    return hashlib.sha256(_path(function).read_bytes()).hexdigest()


def _path(function: Callable[..., Any]) -> Path:
    """The file of a function; raises `BadInput` if it has no file that could be compared when a run resumes."""
    plain = inspect.unwrap(function)
    if not inspect.isfunction(plain) or not (path := Path(plain.__code__.co_filename)).is_file():
        raise BadInput(f"Recipe {function!r} is not a function of a file.", "Write a function into a Python file.")
    return path
