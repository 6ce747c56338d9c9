"""What the `measure_*.py` beside this file share: running the installed command, and rows that are kept."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run(line: str) -> dict[str, Any]:
    """Print a command and run it with --json; its object."""
    sys.stderr.write(f"dfcompress {line}\n")
    done = subprocess.run(["dfcompress", *line.split(), "--json", "-q"], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


class Rows:
    """The rows in `folder`/rows.jsonl: those that are there are not made again."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "rows.jsonl"
        self.made = [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def make(self, measure: Callable[[], dict[str, Any]], **key: Any) -> None:
        """Keep what `measure` finds under `key`, unless something is there."""
        if not self.of(**key):
            self.made.append({**key, **measure()})
            with self.log.open("a") as file:
                file.write(json.dumps(self.made[-1]) + "\n")

    def of(self, **key: Any) -> list[dict[str, Any]]:
        """The rows of a key."""
        return [row for row in self.made if key.items() <= row.items()]
