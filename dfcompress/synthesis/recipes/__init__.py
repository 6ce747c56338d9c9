"""One file a published method; the folder is the registry of `--recipe`, to which installed packages add theirs."""

import pkgutil
from importlib import metadata

RECIPES = "dfcompress.recipes"


def recipe_names() -> list[str]:
    """All recipes of this folder, as `--recipe` takes them; imports none of them."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def known_recipes() -> list[str]:
    """The recipes of this folder, and those that installed packages have as entry points; imports none of them."""
    return recipe_names() + sorted({entry.name for entry in metadata.entry_points(group=RECIPES)} - {*recipe_names()})
