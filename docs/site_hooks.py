"""What mkdocs adds to the pages of this folder: the README as index.md and the changelog; nothing is copied by hand.

Pages of the navigation that are not written yet are left out of it, so that the site can be built at any commit.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).resolve().parents[1]
TAKEN = {"index.md": "README.md", "changelog.md": "CHANGELOG.md"}


def on_config(config: Any) -> Any:
    """Leave pages out of the navigation that do not exist."""
    config.nav = _existing(config.nav)
    return config


def _existing(entries: list[Any]) -> list[Any]:
    kept = []
    for entry in entries:
        if isinstance(entry, str):
            kept += [entry] * (entry in TAKEN or (REPOSITORY / "docs" / entry).exists())
        else:
            ((title, inside),) = entry.items()
            kept.append({title: _existing(inside) if isinstance(inside, list) else inside})
    return kept


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie outside of this folder, their links as seen from here."""
    for page, source in TAKEN.items():
        text = re.sub(r"\]\(docs/", "](", (REPOSITORY / source).read_text())
        files.append(File.generated(config, page, content=text))
    return files
