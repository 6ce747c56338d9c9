"""The demo is the main job: it must run from the installed command and end in working models."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from PIL import Image


@pytest.mark.slow
def test_the_demo_compresses_its_teacher_and_shows_it_on_real_images(tmp_path):
    line = [sys.executable, "-m", "dfcompress", "demo", "--json", "-q"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True)
    shown = json.loads(done.stdout)
    right = {row["model"]: row["correct"] for row in shown["rows"]}
    size = {row["model"]: row["bytes"] for row in shown["rows"]}
    assert right["teacher"] == 9951
    assert right["half-width student"] > 9500
    assert right["teacher 4w4a"] > 9850
    assert size["half-width student"] < 0.3 * size["teacher"]
    assert size["teacher 4w4a"] < 0.17 * size["teacher"]
    assert Image.open(tmp_path / shown["picture"]).size[0] > 300
