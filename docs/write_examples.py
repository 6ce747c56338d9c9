"""Renew what the terminal shows in the pages of the commands: `python docs/write_examples.py quantize prune`.

In a block of code behind the line `<!-- run -->` every line that begins with `$ ` is run in an empty folder, and what
it writes to stdout takes the place of the lines below it; progress and notices on stderr are left out. In the folder
are `lenet5`, the model that the package ships, `mnist-test`, its 10,000 test images, `images`, 512 images made from the
model where a line names them, and `resnet20.th` where DFCOMPRESS_TEST_DATA has it. Without names all pages are renewed.
The numbers depend on the machine; no test compares.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import dfcompress

DOCS = Path(__file__).resolve().parent
SHIPPED = Path(dfcompress.__file__).parent / "demo_files"
BLOCK = re.compile(r"(<!-- run -->\n```\w*\n)(\$ .*?)(?=```)", re.S)


def main() -> None:
    """Renew the pages named, each in a folder of its own."""
    for page in [DOCS / f"{name}.md" for name in sys.argv[1:]] or sorted(DOCS.glob("*.md")):
        text = page.read_text()
        if BLOCK.search(text):
            with tempfile.TemporaryDirectory() as folder:
                furnish(Path(folder))
                if "--data images" in "".join(found[2] for found in BLOCK.finditer(text)):
                    printed("dfcompress invert lenet5 --images 512 -o images", folder)
                page.write_text(BLOCK.sub(lambda found, inside=folder: found[1] + run(found[2], inside), text))


def furnish(folder: Path) -> None:
    """Put the models and images of the examples there."""
    for name, pattern in (("lenet5", "[cm]*"), ("mnist-test", "t10k*")):
        (folder / name).mkdir()
        for file in SHIPPED.glob(pattern):
            shutil.copy(file, folder / name)
    released = Path(os.environ.get("DFCOMPRESS_TEST_DATA", "")) / "checkpoints/resnet20-12fca82f.th"
    if released.exists():
        shutil.copy(released, folder / "resnet20.th")


def run(block: str, folder: str) -> str:
    """The block's lines with what each of them prints now."""
    lines = re.findall(r"^\$ .*$", block, re.M)
    return "".join(f"{line}\n{printed(line.removeprefix('$ '), folder)}" for line in lines)


def printed(line: str, folder: str) -> str:
    """What a line writes to stdout; of one that fails also the error."""
    command = line.replace("dfcompress", f"{sys.executable} -m dfcompress", 1)
    environment = {**os.environ, "PYTHONPATH": str(DOCS.parent)}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.stdout + (done.stderr.splitlines()[-1] + "\n" if done.returncode else "")


if __name__ == "__main__":
    main()
