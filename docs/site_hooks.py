"""What mkdocs adds to the pages of this folder: the README as index.md and the changelog; nothing is copied by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).resolve().parents[1]
TAKEN = {"index.md": "README.md", "changelog.md": "CHANGELOG.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie outside of this folder, their links as seen from here."""
    for page, source in TAKEN.items():
        text = re.sub(r"(\]\(|src=\")docs/", r"\1", (REPOSITORY / source).read_text())
        files.append(File.generated(config, page, content=text))
    return files
