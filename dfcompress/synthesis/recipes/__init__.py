"""One file a published method; the folder is the registry of `--recipe`."""

import pkgutil


def recipe_names() -> list[str]:
    """All recipes, as `--recipe` takes them; imports none of them."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))
