"""One file per published method; the folder is the registry of `--recipe`, to which installed packages add theirs."""

import pkgutil
from importlib import metadata

RECIPES = "dfcompress.recipes"


def recipe_names() -> list[str]:
    """The names of all recipes in this folder, as `--recipe` takes them; no recipe is imported."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def known_recipes() -> list[str]:
    """The recipes of this folder and of installed packages' entry points; no recipe is imported."""
    return recipe_names() + sorted({entry.name for entry in metadata.entry_points(group=RECIPES)} - {*recipe_names()})
