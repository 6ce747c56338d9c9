"""docs/tutorial.md is true: its lines run in their order and print what the page shows, but for the numbers.

Images are fewer and steps shorter than on the page; `-m release` runs the lines as they stand (about ten minutes).
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from conftest import shared_file

from dfcompress.cli import run

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tutorial.md"
SHORTER = ("--images 512", "--images 32 --batch-size 32 --steps 2 --compile off")
# Numbers differ, and so does what is said of them: warnings, whether a difference is noise, and where it lies.
NUMBERS = re.compile(r"[+-]?\d[\d,.]*(e[+-]\d+)?%?")
OF_THIS_MACHINE = r"[\d.]+ times faster$|not faster here: .*|, as sums saturate.*?=1: \d+"
SAID = re.compile(rf"^warning: .*\n|within noise|better|worse|answers, .*|{OF_THIS_MACHINE}", re.M)


def lines_of_the_page() -> list[tuple[str, str]]:
    """Each command of the page, and what the page shows below it."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", PAGE.read_text(), re.S):
        for part in re.split(r"(?m)^\$ ", block)[1:]:
            line, _, shown = part.partition("\n")
            found.append((line, shown))
    return found


def skeleton(printed: str) -> list[str]:
    """The words of each line."""
    return [" ".join(NUMBERS.sub("#", line).split()) for line in SAID.sub("", printed).splitlines() if line.strip()]


def run_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str], long: str, short: str) -> None:
    for name, file in (("resnet20-12fca82f.th", "checkpoints/resnet20-12fca82f.th"), ("cifar10-test.npz", TEST)):
        (tmp_path / name).symlink_to(shared_file(file))
    for line, shown in lines_of_the_page():
        program, *words = shlex.split(line.replace(long, short))
        assert program == "dfcompress"
        assert run(words) == 0, line
        assert skeleton(capsys.readouterr().out) == skeleton(shown), line


TEST = "cifar10-test-846.npz"


def test_the_lines_of_the_tutorial_run_and_print_what_it_shows(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_the_page(tmp_path, capsys, *SHORTER)


@pytest.mark.release
def test_the_tutorial_as_it_stands(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_the_page(tmp_path, capsys, "", "")
